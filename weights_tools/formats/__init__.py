"""The register of formats, and how a path tells which one it is."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from radlads.errors import fail
from radlads.families import FAMILIES
from radlads.files import open_regular
from radlads.folder import CONFIG
from radlads.provenance import named_teacher, stated_teacher
from radlads.quantised import KEYS
from radlads.tensors import INDEX, SINGLE, check_impostor
from radlads.weights_tools.formats import gguf, hf, mlx, pth
from radlads.weights_tools.formats.format import FINISHED, Format, Reading, Source
from radlads.weights_tools.formats.gguf_file import MAGIC
from radlads.weights_tools.formats.pth_file import ZIP

FORMATS: dict[str, Format] = {module.NAME: module for module in (hf, mlx, pth, gguf)}  # type: ignore[misc]

NAMED = {".gguf": "gguf", ".pth": "pth", ".pt": "pth", ".bin": "pth"}
RUN_NAME = re.compile(r"L\d+-D\d+-.+-([123])")


def recognise(path: Path) -> tuple[str, Path]:
    """(format, the file or folder to read) of what a user names; R201 where it is none of them."""
    if path.is_dir():
        if (path / SINGLE).exists() or (path / INDEX).exists():
            quantised = (path / CONFIG).exists() and set(hf.read_config_file(path)) & set(KEYS)
            return (mlx.NAME if quantised else hf.NAME), path
        return only_file(path)
    with open_regular(path) as file:
        start = file.read(32)
    if start.startswith(MAGIC):
        return "gguf", path
    if start.startswith(ZIP):
        return "pth", path
    if path.suffix in NAMED:  # the reader of what it is called says what is wrong with it
        return NAMED[path.suffix], path
    if path.suffix == ".safetensors":
        raise fail("R201", where=path, why="it is one file of a model", fix="Give the folder that holds it and its config.json")
    check_impostor(path, start)
    why = "it is neither a GGUF file nor a zip of PyTorch's"
    raise fail("R201", where=path, why=why, fix="Give a model folder, a .gguf or a .pth file")


def only_file(folder: Path) -> tuple[str, Path]:
    """The one GGUF or PyTorch file of a folder without safetensors, R201 for several; none is for `hf` to complain about."""
    found = sorted(path for path in folder.iterdir() if path.suffix in NAMED and path.is_file())
    if not found:
        return hf.NAME, folder
    if len(found) > 1:
        why = f"it holds {len(found)} weights files, and none of safetensors"
        raise fail("R201", where=folder, why=why, fix="Name one of the files")
    return recognise(found[0])


def open_source(path: Path | str, reading: Reading | None = None) -> Source:
    """The model at `path`, whatever its format; R2xx, R101 for a stage where there is nothing to say."""
    reading = reading or Reading()
    name, place = recognise(Path(path))
    source = FORMATS[name].read(place, reading)
    if source.spec.recurrent is not None and "teacher" not in (source.manifest or {}):
        source = replace(source, teacher=teacher_of(source, reading.config))
    if source.spec.recurrent is not None and source.manifest is None:
        stage, notice = stage_by_name(place) if reading.stage is None else (reading.stage, f"stage {reading.stage}: as asked")
        return replace(source, told_stage=stage, notices=(*source.notices, notice))
    if reading.stage is not None:
        why = "the model's own record says it" if source.spec.recurrent else "a teacher has none"
        raise fail("R101", where="--stage", why=why, fix="Leave it out")
    return source


def teacher_of(source: Source, config: str | None) -> dict[str, Any]:
    """What is known of the teacher of a student that others made: the folder whose config was named, or what a config says."""
    folder = Path(config) if config else None
    if folder is None or not folder.is_dir() or source.config.get("model_type") not in FAMILIES:
        return stated_teacher(source.config)
    taken = [file for file in source.files.values() if isinstance(file, Path) and file.parent == folder]
    return named_teacher(folder, source.spec.family, taken)


def stage_by_name(path: Path) -> tuple[int | None, str]:
    """The stage that upstream's name of a run or checkpoint tells (L28-D3584-qwen2-rwkv7-2.pth), and a word about it."""
    found = next((match for name in (path.stem, path.resolve().parent.name) if (match := RUN_NAME.fullmatch(name))), None)
    if found is None:
        return None, f"no stage: nothing says; converted, it counts as finished, stage {FINISHED} (--stage overrides)"
    number = int(found[1])
    stage = max(1, number - 1)
    later = f"; runs since then mean stage {number} by it" if stage != number < 3 else ""
    return stage, f"stage {stage}: -{number} in its name, as upstream numbered until May 2025{later} (--stage overrides)"
