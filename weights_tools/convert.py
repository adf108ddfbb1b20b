"""From any format to any other, tensor by tensor: refused as a whole before a byte is written, or written as a whole."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from radlads.errors import fail
from radlads.files import read_json, stamps
from radlads.folder import MANIFEST, check_ours
from radlads.weights_tools.formats import FORMATS, open_source
from radlads.weights_tools.formats.format import Output, Reading, Source, Writing, checked, work_key
from radlads.weights_tools.inputs import InputHashes
from radlads.weights_tools.output import Report, clear, write_output

log = logging.getLogger(__name__)
FILE_SUFFIXES = {"pth": ".pth", "gguf": ".gguf"}
FORMAT_OF = {suffix: name for name, suffix in FILE_SUFFIXES.items()}


@dataclass(frozen=True)
class Conversion:
    """What was done: the source as it was read, where the output lies, and whether it was there already."""

    source: Source
    path: Path
    written: bool
    nbytes: int


def convert(
    path: Path | str,
    output: Path | str,
    target: str,
    *,
    reading: Reading | None = None,
    writing: Writing | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
    say: Callable[[str], None] = log.warning,
) -> Conversion:
    """Write the model at `path` as `target` under `output`; nothing is done where that very output stands already.

    R101 for a wish the format does not know, R2xx for a bad input, R205 where the format cannot hold the model, R207 for
    NaN or infinity, R401 and R402 for the output.
    """
    final = Path(output)
    if final.suffix in FORMAT_OF and FORMAT_OF[final.suffix] != target:
        fix = f"Pass --to {FORMAT_OF[final.suffix]}, or choose a name without {final.suffix}"
        raise fail("R101", where=final, why=f"it has the name of a file, and {target} would make it a folder", fix=fix)
    writing = replace(writing or Writing(), single=final.suffix == FILE_SUFFIXES.get(target))
    if writing.bits is not None and target != "mlx":
        raise fail("R101", where="--quantize", why=f"{target} is written in floats here", fix="Quantise with --to mlx")
    if writing.layout is not None and target != "hf":
        raise fail("R101", where="--layout", why=f"{target} has no layouts to choose from", fix="Choose it with --to hf")
    source, plan = open_source(path, reading), FORMATS[target].plan
    return write(source, final, target, plan, writing, allow_nonfinite, overwrite=overwrite, report=report, say=say)


def write(
    source: Source,
    final: Path,
    target: str,
    plan: Callable[[Source, Writing, str], Output],
    writing: Writing,
    allow_nonfinite: bool = False,
    *,
    overwrite: bool = False,
    report: Report | None = None,
    say: Callable[[str], None] = log.warning,
) -> Conversion:
    """Write `source` as `plan` lays it out, unless that very output stands under `final` already. Raises as `convert`."""
    check_apart(source, final)
    if overwrite:
        check_ours(final)
    key = work_key(source, writing, target, allow_nonfinite)
    inputs = InputHashes(source.inputs)
    guarded = replace(source, tensors=checked(source, source.tensors, allow_nonfinite, say), hashes=inputs.result)
    output_plan = plan(guarded, writing, key)
    for notice in (*source.notices, *output_plan.notices):
        say(notice)
    nbytes = sum(file.nbytes for file in output_plan.files)
    if is_done(final, output_plan, key, writing.single):
        clear(final)
        return Conversion(source, final, False, nbytes)
    before = stamps(source.inputs)

    def small_files(hashes: dict[str, str]) -> object:
        if stamps(source.inputs) != before:
            raise fail("R201", where=source.path, why="it changed while it was read", fix="Start again")
        return output_plan.small_files(hashes)

    def follow(done: int, total: int) -> None:
        inputs.reached(done / total)
        if report:
            report(done, total)

    with inputs:
        write_output(
            final,
            output_plan.files,
            key=key,
            small_files=small_files,  # type: ignore[arg-type]
            single=writing.single,
            overwrite=overwrite,
            report=follow,
        )
    return Conversion(source, final, True, nbytes)


def check_apart(source: Source, final: Path) -> None:
    """R401 if the output is the input, lies in it or holds it."""
    target, origin = final.resolve(), source.path.resolve()
    if target == origin or origin in target.parents or (target in origin.parents and target.suffix not in FILE_SUFFIXES.values()):
        raise fail("R401", where=final, why=f"it is, holds or lies in the input {origin}", fix="Choose another place")


def is_done(final: Path, planned: Output, key: str, single: bool) -> bool:
    """True if the very output that is planned stands at `final` already."""
    if single:
        return final.is_file() and same_start(final, planned)
    manifest = read_json(final / MANIFEST) if (final / MANIFEST).is_file() else {}
    sizes = {file.name: file.nbytes for file in planned.files}
    return (
        isinstance(manifest, dict)
        and manifest.get("conversion") == key
        and all((final / name).is_file() and (final / name).stat().st_size == size for name, size in sizes.items())
    )


def same_start(final: Path, planned: Output) -> bool:
    """True if a single file has the planned size and first segment, which names the work."""
    file = planned.files[0]
    if final.stat().st_size != file.nbytes:
        return False
    start = b"".join(bytes(piece) for piece in file.segments[0].pieces({}))
    with open(final, "rb") as there:
        return there.read(len(start)) == start
