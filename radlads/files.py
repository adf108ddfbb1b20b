"""The only writer of the house: complete under the final name, or absent. Also strict JSON, hashes and free space.

Everything is written beside its final name, synced and renamed. A killed writer leaves a hidden `.NAME.*.partial`,
which the next writer of that name removes.
"""

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from radlads.errors import RadladsError, fail

JSON_LIMIT = 4 * 2**20
JSON_DEPTH = 64
# Bounds on what parsing can allocate, far above the largest model's header.
JSON_COUNTS = {b"{": 400_000, b"[": 800_000, b",": 4_000_000}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256(path: Path | str) -> str:
    """SHA-256 of a file in hex; R201 if it cannot be read."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamps(paths: Iterable[Path]) -> list[tuple[str, int, int, int]]:
    """(name, size, time, inode) of files, to notice a change under our hands."""
    stats = [(path, path.stat()) for path in sorted(paths) if path.exists()]
    return [(path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in stats]


def open_regular(path: Path | str) -> io.BufferedReader:
    """Open a regular file for reading; R201 for anything else (a folder, a pipe, a device, nothing)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise fail("R201", where=path, why="it is no regular file", fix="Give a file")
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise fail("R201", where=path, why=reason(error), fix="Check the path and its permissions") from None


def read_bytes(path: Path | str, limit: int) -> bytes:
    """Content of a regular file of at most `limit` bytes; R201 otherwise."""
    with open_regular(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise fail("R201", where=path, why=reason(error), fix="Check the disk") from None
    if len(data) > limit:
        raise fail("R201", where=path, why=f"it is larger than {limit:,} bytes", fix="Give the right file")
    return data


def read_json(path: Path | str, *, code: str = "R204", limit: int = JSON_LIMIT) -> Any:
    """Value of a JSON file; `code` for bad syntax, a key given twice, NaN, or more than 64 levels; R201 if unreadable."""
    try:
        value = parse_json(read_bytes(path, limit))
        if deeper_than(value, JSON_DEPTH):
            raise ValueError(f"it is nested deeper than {JSON_DEPTH} levels")
    except ValueError as error:
        raise fail(code, where=path, why=f"not valid JSON: {error}", fix="Get the file again from its source") from None
    return value


def parse_json(data: bytes, parse_int: Any = int) -> Any:
    """Value of UTF-8 JSON without the liberties of `json`: ValueError for a key given twice, NaN, infinity, or too many items."""
    if any(data.count(sign) > limit for sign, limit in JSON_COUNTS.items()):
        raise ValueError("it has too many items")
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=refuse_constant, parse_int=parse_int
        )  # fmt: skip
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 text at byte {error.start}") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of the pairs; ValueError if a key stands twice, where readers disagree about which one counts."""
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {max(counts, key=counts.__getitem__)[:100]!r} stands twice")
    return table


def refuse_constant(text: str) -> NoReturn:
    """ValueError: NaN and Infinity are no JSON."""
    raise ValueError(f"{text} is no JSON number")


def deeper_than(value: object, limit: int) -> bool:
    """True if tables and lists are nested more than `limit` deep."""
    level = [value]
    for _ in range(limit + 1):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [child for children in inner for child in children]
        if not level:
            return False
    return True


def to_json(value: object) -> str:
    """JSON as the files of a model folder have it: two spaces, a line feed at the end."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """A value in JSON's own types: arrays and tensors as lists, NaN and infinity, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return value


def write_file(path: Path | str, data: bytes | str) -> None:
    """Write a whole file atomically (text as UTF-8); R401 or R402, and then nothing has changed."""
    with new_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def new_file(path: Path | str, needed_bytes: int = 0) -> Iterator[io.BufferedWriter]:
    """A file open for writing that appears under `path` when the block ends well, and never otherwise.

    The name keeps its suffix while it is written. `needed_bytes` is the size that R402 names when the disk is full.
    """
    final = Path(path)
    with as_output_error(final, needed_bytes):
        make_parent(final)
        temp = partial_name(final)
        # 0o666 under the umask: the mode that the user's other files get
        fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(fd, "wb") as file:
                hold(fd)
                yield file
                file.flush()
                os.fsync(fd)
                os.replace(temp, final)
            sync_folder(final.parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temp)
            raise


@contextmanager
def new_folder(final: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder beside `final` that takes its name when the block ends well, and vanishes otherwise.

    R401 if `final` exists, unless it is an empty folder or `overwrite` is set; the old one is removed last.
    """
    final = Path(final)
    with as_output_error(final, 0):
        check_free(final, overwrite)
        make_parent(final)
        temp = partial_name(final)
        os.mkdir(temp)
        lock = os.open(temp, os.O_RDONLY)
        try:
            hold(lock)
            yield temp
            sync_tree(temp)
            swap_in(temp, final, overwrite)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        finally:
            os.close(lock)


def hold(fd: int) -> None:
    """Lock what is being written, for as long as this process lives; file systems without locks are let be."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX)


def check_free(final: Path, overwrite: bool) -> None:
    """R401 if something stands at `final` that may not be replaced."""
    if not os.path.lexists(final):
        return
    if final.is_dir() and not final.is_symlink():
        if overwrite or not any(final.iterdir()):
            return
        raise fail("R401", where=final, why="the folder exists", fix="Choose another folder, or pass --overwrite")
    raise fail("R401", where=final, why="a file or link of that name exists", fix="Choose another name")


def check_space(folder: Path | str, needed_bytes: int) -> None:
    """R402 with the needed and free bytes if the disk of `folder` (or its nearest existing parent) has too few."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise no_space(folder, needed_bytes, free)


def no_space(where: object, needed: int, free: int) -> RadladsError:
    """The R402 error; `needed` is 0 where the size was not known."""
    amount = f"{needed:,} bytes are needed and {free:,} free" if needed else f"only {free:,} bytes are free"
    return fail("R402", where=where, why=amount, fix="Free some space or choose another disk")


@contextmanager
def as_output_error(final: Path, needed_bytes: int) -> Iterator[None]:
    """Turn an OSError of the block into R402 (disk or quota full) or R401."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            place = final.parent if final.parent.exists() else Path(".")
            raise no_space(final, needed_bytes, shutil.disk_usage(place).free) from None
        raise fail("R401", where=final, why=reason(error), fix="Check the path and its permissions") from None


def reason(error: Exception) -> str:
    """The cause of an OSError without its number and path."""
    return (getattr(error, "strerror", None) or str(error)).lower()


def make_parent(final: Path) -> None:
    """Make the folder that will hold `final`, and clear what killed writers of the same name left there."""
    final.parent.mkdir(parents=True, exist_ok=True)
    leftover = re.compile(rf"\.{re.escape(final.name)}\.(new|old)\.[0-9a-f]{{8}}\.partial{re.escape(final.suffix)}")
    for path in list(final.parent.iterdir()):
        if match := leftover.fullmatch(path.name):
            remove_abandoned(path, final, match[1])


def remove_abandoned(path: Path, final: Path, kind: str) -> None:
    """Remove a leftover ("new" or "old") whose writer is gone; its lock would be held otherwise."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if kind == "old" and not os.path.lexists(final):
                os.rename(path, final)  # killed between the two renames of an overwrite: the old folder is the only one
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(fd)


def partial_name(final: Path, kind: str = "new") -> Path:
    """A fresh hidden name beside `final` with the same suffix, for MLX appends a missing one."""
    return final.with_name(f".{final.name}.{kind}.{secrets.token_hex(4)}.partial{final.suffix}")


def swap_in(temp: Path, final: Path, overwrite: bool) -> None:
    """Give `temp` its final name; an old folder steps aside first and is removed last."""
    check_free(final, overwrite)
    old = None
    if final.exists() and any(final.iterdir()):
        old = partial_name(final, "old")
        os.rename(final, old)
    try:
        os.rename(temp, final)
    except OSError:
        if old is not None:
            os.rename(old, final)
        raise
    sync_folder(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below `folder`, and itself, to the disk."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_path(Path(root, name))
        sync_folder(Path(root))


def sync_folder(folder: Path) -> None:
    """Sync a folder's list of names; file systems that cannot do this are let be."""
    with suppress(OSError):
        sync_path(folder)


def sync_path(path: Path) -> None:
    """fsync one file or folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
