"""The register of formats, and how a path tells which one it is."""

from pathlib import Path

from radlads.errors import fail
from radlads.files import open_regular
from radlads.folder import CONFIG
from radlads.quantised import KEYS
from radlads.tensors import INDEX, SINGLE
from radlads.weights_tools.formats import gguf, hf, mlx, pth
from radlads.weights_tools.formats.format import Format, Reading, Source
from radlads.weights_tools.formats.gguf_file import MAGIC
from radlads.weights_tools.formats.pth_file import ZIP

FORMATS: dict[str, Format] = {module.NAME: module for module in (hf, mlx, pth, gguf)}  # type: ignore[misc]


def recognise(path: Path) -> tuple[str, Path]:
    """(format, the file or folder to read) of what a user names; R201 where it is none of them."""
    if path.is_dir():
        if (path / SINGLE).exists() or (path / INDEX).exists():
            quantised = (path / CONFIG).exists() and set(hf.read_config_file(path)) & set(KEYS)
            return (mlx.NAME if quantised else hf.NAME), path
        return only_file(path)
    with open_regular(path) as file:
        start = file.read(8)
    if start.startswith(MAGIC):
        return "gguf", path
    if start.startswith(ZIP):
        return "pth", path
    why = "it is neither a GGUF file nor a zip of PyTorch's"
    raise fail("R201", where=path, why=why, fix="Give a model folder, a .gguf or a .pth file")


def only_file(folder: Path) -> tuple[str, Path]:
    """The one GGUF or PyTorch file of a folder without safetensors, R201 for several; none is for `hf` to complain about."""
    found = sorted(path for path in folder.iterdir() if path.suffix in (".gguf", ".pth", ".pt", ".bin") and path.is_file())
    if not found:
        return hf.NAME, folder
    if len(found) > 1:
        why = f"it holds {len(found)} weights files, and none of safetensors"
        raise fail("R201", where=folder, why=why, fix="Name one of the files")
    return recognise(found[0])


def open_source(path: Path | str, reading: Reading | None = None) -> Source:
    """The model at `path`, whatever its format; R2xx."""
    name, place = recognise(Path(path))
    return FORMATS[name].read(place, reading or Reading())
