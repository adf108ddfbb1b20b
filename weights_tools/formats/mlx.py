"""MLX folders: the same names as ours, floats as they are or affine-quantised as `mlx_lm convert -q` writes them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from radlads.errors import fail
from radlads.folder import CONFIG_DTYPES, ModelFolder, open_folder, tensor_bytes
from radlads.quantised import BITS, GROUP_SIZES, KEYS, Quantised
from radlads.spec import ModelSpec
from radlads.tensors import Entry, Raw, encode
from radlads.weights_tools.formats.affine import dequantise, quantise, scales_and_biases
from radlads.weights_tools.formats.format import Output, Reading, Source, Writing
from radlads.weights_tools.formats.hf import folder_output, source_of
from radlads.weights_tools.lazy import Lazy, stored

NAME = "mlx"
PARTS = (".scales", ".biases")


def read(path: Path, reading: Reading) -> Source:
    """A folder with affine-quantised weights, dequantised as it is read; R2xx where it is broken or quantised otherwise."""
    folder = open_folder(path, variant=reading.variant, config_from=reading.config)
    tensors = {
        name: dequantised(entry, folder.quantised[name]) if name in folder.quantised else stored(entry)
        for name, entry in folder.weights.items()
    }
    widths = sorted({f"{few.bits}-bit, groups of {few.group_size}" for few in folder.quantised.values()})
    return source_of(folder, NAME, " and ".join(widths) or "floats", tensors, list(entries_of(folder)))


def entries_of(folder: ModelFolder) -> Iterator[tuple[str, Entry]]:
    """Every stored tensor by its name in the files; three of them are one quantised matrix."""
    for name, entry in folder.weights.items():
        yield name, entry
        if few := folder.quantised.get(name):
            stem = name.removesuffix(".weight")
            yield from zip((stem + part for part in PARTS), (few.scales, few.biases), strict=True)


def dequantised(words: Entry, few: Quantised) -> Lazy:
    """The floats behind the words of a matrix."""

    def read_rows(start: int, stop: int) -> Raw:
        w, s, b = (stored(entry).read(start, stop) for entry in (words, few.scales, few.biases))
        return dequantise(w, s, b, few.scales.dtype, few.bits)

    return Lazy(few.scales.dtype, (words.shape[0], words.shape[1] * 32 // few.bits), read_rows)


def plan(source: Source, writing: Writing, key: str) -> Output:
    """A folder for MLX; R101 for a quantisation that is not possible."""
    tensors = source.in_dtype(writing.dtype)
    dtype = CONFIG_DTYPES[writing.dtype or source.dtype]
    event: dict[str, Any] = {"to": NAME, "dtype": dtype}
    settings: dict[str, Any] = {"dtype": dtype}
    if writing.bits is None:
        return folder_output(source, tensors, settings, event, key, {"format": "mlx"})
    check_wish(source, writing)
    asked = {"group_size": writing.group_size, "bits": writing.bits, "mode": "affine"}
    chosen = policy(source.spec, asked)
    own = {name.removesuffix(".weight"): how for name, how in chosen.items() if how != asked}
    event["quantization"] = asked
    settings |= dict.fromkeys(KEYS, asked | own)
    made = dict(quantised(tensors, chosen))
    output = folder_output(source, made, settings, event, key, {"format": "mlx"})
    return replace(output, notices=(*output.notices, *told(source.spec, chosen, asked, made)))


def policy(spec: ModelSpec, asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of each matrix that is quantised, as `mlx_lm convert` finds them with our model file."""
    chosen = {}
    for name, row in spec.tensors().items():
        if name.endswith(".weight") and len(row.shape) == 2 and not row.shape[-1] % asked["group_size"]:
            how = row.quantisation()
            if how:
                chosen[name] = asked if how is True else how
    return chosen


def told(spec: ModelSpec, chosen: dict[str, dict[str, Any]], asked: dict[str, Any], made: Mapping[str, Lazy]) -> Iterator[str]:
    """Which tensors get which bits, and why: docs/log.md has the drift that each kind causes over 10,000 tokens."""
    rows = spec.tensors()
    groups: dict[str, list[str]] = {}
    for name, row in rows.items():
        how = chosen.get(name)
        if how is not None:
            label = f"{how['bits']} bits in groups of {how['group_size']}"
            label += ", as asked" if rows[name].quantisation() is True else ", because the state and the gate carry errors on"
        elif row.keep:
            label = "kept as they are, because they set what the state keeps and cost few bytes"
        elif len(row.shape) == 2:
            label = f"kept as they are, because their rows do not divide into groups of {asked['group_size']}"
        else:
            label = "kept as they are: norms and biases"
        groups.setdefault(label, []).append(name)
    for label, names in groups.items():
        kinds = dict.fromkeys(rows[name].name.removesuffix(".weight") for name in names)
        weights = sum(math.prod(rows[name].shape) for name in names)
        yield f"{label}: {', '.join(kinds)} ({weights:,} weights)"
    stored_bytes = sum(tensor_bytes((tensor.dtype, tensor.shape)) for tensor in made.values())
    yield f"{8 * stored_bytes / spec.parameters():.2f} bits per weight overall"


def check_wish(source: Source, writing: Writing) -> None:
    """R101 for widths that MLX lacks, or for what is quantised already."""
    if source.quantised:
        why = "the model is quantised already, and quantising it again would lose twice"
        raise fail("R101", where=source.path, why=why, fix="Start from the float model, or leave out -q to dequantise it")
    if writing.bits not in BITS or writing.group_size not in GROUP_SIZES:
        why = f"{writing.bits} bits in groups of {writing.group_size}: bits are {BITS}, group sizes {GROUP_SIZES}"
        raise fail("R101", where="--q-bits", why=why, fix="Choose one of these")


def quantised(tensors: dict[str, Lazy], chosen: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Lazy]]:
    """The tensors, each chosen matrix as words, scales and biases; each of these parts reads the source for itself."""
    for name, tensor in tensors.items():
        if name not in chosen:
            yield name, tensor
            continue
        bits, group = chosen[name]["bits"], chosen[name]["group_size"]
        stem, (n, columns) = name.removesuffix(".weight"), tensor.shape
        cost = 4 * columns
        yield name, Lazy("U32", (n, columns * bits // 32), partial(quantised_words, tensor, bits, group), cost)
        for part, ending in enumerate(PARTS, 1):
            values = partial(group_values, tensor, bits, group, part)
            yield stem + ending, Lazy(tensor.dtype, (n, columns // group), values, cost)


def quantised_words(tensor: Lazy, bits: int, group_size: int, start: int, stop: int) -> Raw:
    """The packed words of some rows."""
    return quantise(tensor.read(start, stop), tensor.dtype, bits, group_size)


def group_values(tensor: Lazy, bits: int, group_size: int, part: int, start: int, stop: int) -> Raw:
    """The scales (part 1) or biases (part 2) of some rows."""
    return encode(scales_and_biases(tensor.read(start, stop), tensor.dtype, bits, group_size)[part], tensor.dtype)
