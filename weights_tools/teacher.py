"""A recipe's teacher as a folder: one that is a single file, or lies in an archive, is made a folder first."""

import fcntl
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from radlads.demo import resolve
from radlads.errors import fail
from radlads.files import make_parent, new_file, sha256
from radlads.recipe import Recipe, TeacherFile
from radlads.weights_tools.convert import convert
from radlads.weights_tools.formats.format import Writing

ARCHIVES = (".whl", ".zip")
DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def teacher_folder(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Path:
    """The folder of a recipe's teacher, made below `folder` where the recipe names a file or an archive that holds it.

    Raises R201 where there is neither, with the way to get it, and where a file is not the one the recipe means.
    """
    assert recipe.teacher is not None
    path, known = resolve(recipe.teacher), recipe.teacher_file
    if path.is_dir():
        return path
    if not path.exists() and known is not None and Path(known.archive).is_file():
        path = Path(known.archive)
    if not path.exists():
        raise missing(recipe.teacher, known)
    make_parent(folder / "any")
    with one_at_a_time(folder):
        if path.suffix in ARCHIVES:
            path = unpacked(path, Path(recipe.teacher).name, folder)
        if known is not None and (found := sha256(path)) != known.sha256:
            why = f"its SHA-256 is {found}, and the recipe means {known.sha256}"
            raise fail("R201", where=path, why=why, fix=f"Run `{known.get}`, or take another recipe for another teacher")
        final = folder / path.stem
        if not final.exists():
            say(f"{path} as a folder: {final}")
        return convert(path, final, "hf", writing=Writing(dtype=DTYPES[recipe.precision]), say=say).path


def missing(name: str, known: TeacherFile | None) -> Exception:
    """R201 with the way to get a teacher that is not there."""
    fix = "Name a folder or a file with --teacher"
    if known is not None:
        fix = f"Run `{known.get}`, or name the file with --teacher"
    elif name.count("/") == 1 and not name.startswith((".", "/")):
        fix = f"Download it (`hf download {name} --local-dir {name}`) or name a folder with --teacher"
    return fail("R201", where=name, why="there is no such file or folder", fix=fix)


def unpacked(archive: Path, wanted: str, folder: Path) -> Path:
    """The only model file of an archive, or the one called `wanted`, copied to `folder`. Raises R201."""
    try:
        with zipfile.ZipFile(archive) as packed:
            found = [entry for entry in packed.infolist() if Path(entry.filename).suffix == ".gguf"]
            found = [entry for entry in found if Path(entry.filename).name == wanted] or found
            if len(found) != 1:
                why = f"it holds {len(found) or 'no'} .gguf files"
                raise fail("R201", where=archive, why=why, fix="Unpack it and name the file with --teacher")
            target = folder / Path(found[0].filename).name
            if not (target.is_file() and target.stat().st_size == found[0].file_size):
                with packed.open(found[0]) as source, new_file(target, found[0].file_size) as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise fail("R201", where=archive, why=f"it cannot be unpacked ({error})", fix="Get the file again") from None
    return target


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Processes that start together make the folder once."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
