"""MLX folders: the same names as ours, floats as they are or affine-quantised as `mlx_lm convert -q` writes them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from radlads.errors import fail
from radlads.folder import CONFIG_DTYPES, ModelFolder, open_folder
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
    if writing.bits is not None:
        check_wish(source, writing)
        quantisation = {"group_size": writing.group_size, "bits": writing.bits, "mode": "affine"}
        event["quantization"] = quantisation
        settings |= dict.fromkeys(KEYS, quantisation)
        tensors = dict(quantised(source.spec, tensors, writing))
    return folder_output(source, tensors, settings, event, key, {"format": "mlx"})


def check_wish(source: Source, writing: Writing) -> None:
    """R101 for widths that MLX lacks, or for what is quantised already."""
    if source.quantised:
        why = "the model is quantised already, and quantising it again would lose twice"
        raise fail("R101", where=source.path, why=why, fix="Start from the float model, or leave out -q to dequantise it")
    if writing.bits not in BITS or writing.group_size not in GROUP_SIZES:
        why = f"{writing.bits} bits in groups of {writing.group_size}: bits are {BITS}, group sizes {GROUP_SIZES}"
        raise fail("R101", where="--q-bits", why=why, fix="Choose one of these")


def quantised(spec: ModelSpec, tensors: dict[str, Lazy], writing: Writing) -> Iterator[tuple[str, Lazy]]:
    """The tensors with each matrix as words, scales and biases, by the policy of `mlx_lm convert` with our model file.

    Matrices whose rows divide into groups are quantised, but for those marked `keep`. Each part reads the source for itself.
    """
    bits, group = writing.bits or 0, writing.group_size
    rows = spec.tensors()
    for name, tensor in tensors.items():
        matrix = name.endswith(".weight") and len(tensor.shape) == 2 and not tensor.shape[-1] % group
        if not matrix or rows[name].keep:
            yield name, tensor
            continue
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
