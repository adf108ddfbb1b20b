"""MLX folders: the same names as ours, floats as they are or affine-quantised as `mlx_lm convert -q` writes them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from radlads.errors import RadladsError, fail
from radlads.families import read_config
from radlads.folder import CONFIG, CONFIG_DTYPES, inherited, read_manifest
from radlads.folder import ModelFolder as Folder
from radlads.spec import ModelSpec
from radlads.tensors import FLOATS, Entry, Raw, encode, open_weights
from radlads.weights_tools.formats.affine import BITS, GROUP_SIZES, dequantise, quantise, scales_and_biases
from radlads.weights_tools.formats.format import Output, Reading, Source, StoredTensor, Writing, fit
from radlads.weights_tools.formats.hf import folder_output, read_config_file
from radlads.weights_tools.lazy import Lazy, stored
from radlads.weights_tools.standalone import ENTRIES

NAME = "mlx"
KEYS = ("quantization", "quantization_config")
PARTS = (".scales", ".biases")


def read(path: Path, reading: Reading) -> Source:
    """A folder with affine-quantised weights, dequantised as it is read; R2xx where it is broken or quantised otherwise."""
    config = read_config_file(path)
    settings = quantisation_of(path, config)
    float_config = {name: value for name, value in config.items() if name not in KEYS}
    try:
        spec = read_config(float_config)
    except RadladsError as error:
        raise fail(error.code, where=path / error.where, why=error.why, fix=error.fix) from None
    entries = open_weights(path)
    tensors = fit(path, spec, dict(floats(path, entries, settings)))
    manifest = read_manifest(path, spec)
    folder = Folder(path, config, spec, entries, manifest)
    return Source(
        path=path,
        format=NAME,
        layout=f"{settings['bits']}-bit, groups of {settings['group_size']}",
        spec=spec,
        tensors=tensors,
        stored=[StoredTensor(name, entry.dtype, entry.shape, entry.path.name, entry.nbytes) for name, entry in entries.items()],
        inputs=tuple(sorted({entry.path for entry in entries.values()})),
        config=config,
        files={file.name: file for file in inherited(folder) if file.name not in ENTRIES},
        manifest=manifest,
        quantised=True,
    )


def quantisation_of(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the quantisation; R205 unless it is affine with one of the supported widths."""
    settings: Any = config.get(KEYS[0]) or config.get(KEYS[1])
    known = isinstance(settings, dict) and settings.get("mode", "affine") == "affine"
    if not known or settings.get("bits") not in BITS or settings.get("group_size") not in GROUP_SIZES:
        why = f"the quantisation is not affine with {BITS} bits and groups of {GROUP_SIZES}"
        raise fail("R205", where=path / CONFIG, why=why, fix="Use the unquantised model")
    return dict(settings)


def floats(path: Path, entries: dict[str, Entry], settings: dict[str, Any]) -> Iterator[tuple[str, Lazy]]:
    """Every tensor as floats; three stored tensors make one quantised."""
    for name, entry in entries.items():
        stem = name.removesuffix(".weight")
        if name.endswith(PARTS) and name.rpartition(".")[0] + ".weight" in entries:
            continue
        if entry.dtype != "U32":
            yield name, stored(entry)
            continue
        own = {**settings, **settings[stem]} if isinstance(settings.get(stem), dict) else settings
        yield name, quantised_tensor(path, name, entries, own["bits"], own["group_size"])


def quantised_tensor(path: Path, name: str, entries: dict[str, Entry], bits: int, group_size: int) -> Lazy:
    """The floats behind `name` and its scales and biases; R203 unless the three fit together."""
    stem = name.removesuffix(".weight")
    try:
        words, scales, biases = entries[name], entries[f"{stem}.scales"], entries[f"{stem}.biases"]
    except KeyError as error:
        raise fail("R203", where=path, why=f"{error.args[0]} is missing", fix="Quantise the model again") from None
    columns = words.shape[-1] * 32 // bits if len(words.shape) == 2 and bits in BITS else 0
    shape = (words.shape[0], columns // group_size) if columns and not columns % group_size else None
    if scales.shape != shape or biases.shape != shape or scales.dtype != biases.dtype or scales.dtype not in FLOATS:
        why = f"{name} {list(words.shape)}, scales {list(scales.shape)} and biases {list(biases.shape)} do not fit together"
        raise fail("R203", where=path, why=f"{why} at {bits} bits in groups of {group_size}", fix="Quantise the model again")

    def read_rows(start: int, stop: int) -> Raw:
        w, s, b = (stored(entry).read(start, stop) for entry in (words, scales, biases))
        return dequantise(w, s, b, scales.dtype, bits)

    return Lazy(scales.dtype, (words.shape[0], columns), read_rows)


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
