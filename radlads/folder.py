"""A model folder: config, spec, weights, manifest. Opening checks everything before a tensor is read; saving is atomic.

No code of a folder is ever run: `auto_map` and `model_file` are for other programs.
"""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from radlads import __version__
from radlads.adapters import CONFIG as ADAPTER
from radlads.adapters import Adapter
from radlads.errors import RadladsError, fail
from radlads.families import write_config
from radlads.families.published import is_published, spec_of
from radlads.files import check_space, new_folder, read_json, sha256, stamps, to_json, write_file
from radlads.mixers.table import Row
from radlads.quantised import KEYS, Quantised, settings_of, take_quantised
from radlads.spec import ModelSpec
from radlads.tensors import (
    DTYPES,
    FLOATS,
    INDEX,
    OTHER_SUFFIXES,
    SINGLE,
    Entry,
    Named,
    Plan,
    Planned,
    Raw,
    blocks,
    contained,
    decode,
    is_plain_name,
    listed,
    open_weights,
    other_weights,
    read_raw,
    unconverted,
    write_weights,
)

MANIFEST = "radlads.json"
CONFIG = "config.json"
VERDICT = "verify.json"  # what `radlads verify` found; true of this folder alone
SCHEMA = 1
SHARD_BYTES = 5_000_000_000
CONFIG_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
FOLDER = "Give the folder that holds config.json and the weights"  # the fix where a path is none
ALL_ONES = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}  # exponent bits of infinity and NaN


@dataclass(frozen=True)
class ModelFolder:
    """An opened folder: `weights` holds the entries that the model reads, in the spec's order (empty if not asked for).

    Of a matrix named in `quantised` the entry holds the packed words; only MLX computes with them.
    """

    path: Path
    config: dict[str, Any]
    spec: ModelSpec
    weights: dict[str, Entry] = field(default_factory=dict)
    manifest: dict[str, Any] | None = None
    notices: tuple[str, ...] = ()  # what had to be inferred of a published model
    quantised: dict[str, Quantised] = field(default_factory=dict)
    adapter: Adapter | None = None  # what engines apply to the weights (radlads.adapted.with_adapter)

    @property
    def name(self) -> str:
        """What to call the model: its folder's name, or for the folder `model` of a run the run's."""
        path = self.path.resolve()
        return path.parent.name if path.name == "model" and path.parent.name else path.name

    @property
    def stage(self) -> int | None:
        """0 to 3 for a student made by radlads, None for a teacher."""
        return None if self.manifest is None or self.spec.recurrent is None else self.manifest["stage"]

    @property
    def dtype(self) -> str:
        """The dtype that most bytes of the weights have, in safetensors' spelling."""
        sizes = Counter[str]()
        for name, entry in self.weights.items():
            sizes[self.floats(name, entry)[0].dtype] += entry.nbytes
        return sizes.most_common(1)[0][0] if sizes else "F32"

    def check_finite(self, allow: bool = False) -> list[str]:
        """Names of the tensors that hold NaN or infinity; R207 if the model reads one, unless `allow` is set."""
        rows = self.spec.tensors()
        bad = [name for name, entry in self.weights.items() if not all(map(is_finite, self.floats(name, entry)))]
        read = [name for name in bad if rows[name].read]
        if read and not allow:
            why = f"{len(read)} tensors hold NaN or infinity: {listed(read)}"
            raise fail("R207", where=self.path, why=why, fix="Get the weights again, or pass --allow-nonfinite where offered")
        if bad:
            logging.getLogger(__name__).warning("%s: NaN or infinity in %s", self.path, listed(bad))
        return bad

    def floats(self, name: str, entry: Entry) -> tuple[Entry, ...]:
        """The stored floats of a tensor: its own, or the scales and biases of a quantised one."""
        few = self.quantised.get(name)
        return (entry,) if few is None else (few.scales, few.biases)


def is_finite(entry: Entry) -> bool:
    """True if no value of a floating-point tensor is NaN or infinite; reads it in blocks."""
    ones = ALL_ONES[entry.dtype]
    return not any(((bits(block) & ones) == ones).any() for block in blocks(read_raw(entry)))


def bits(raw: Raw) -> Raw:
    """Raw values as unsigned integers of the same width."""
    return raw.view(f"<u{raw.itemsize}")


def open_folder(
    path: Path | str, *, weights: bool = True, variant: str | None = None, config_from: Path | str | None = None
) -> ModelFolder:
    """Open and check a model folder; `weights=False` reads the config alone (and headers where the config needs them).

    `config_from` is a folder or JSON file whose config is read instead; `variant` is the era of a published RAD-RWKV7 model.

    R201 unreadable, R202 bad weights file, R203 tensors that do not fit, R204 bad config or manifest, R205 unsupported.
    """
    path = Path(path)
    check_folder(path, weights, config_from is None)
    source = config_path(path, config_from)
    config = read_json(source)
    settings = settings_of(source, config)
    stored = open_weights(path) if weights or is_published(config) else {}
    kept = dict(stored)
    quantised = take_quantised(path, settings, kept)
    shapes = {name: float_shape(entry, quantised.get(name)) for name, entry in kept.items()}
    floats = {key: value for key, value in config.items() if key not in KEYS} if settings else config
    try:
        found = spec_of(floats, shapes, variant=variant)
        spec = found.spec
        rows = spec.tensors()
    except RadladsError as error:
        raise fail(error.code, where=placed(error.where, path, source), why=error.why, fix=error.fix) from None
    except (TypeError, ValueError) as error:
        raise fail("R204", where=path / CONFIG, why=str(error), fix="Get the file again from its source") from None
    manifest = read_manifest(path, spec)
    kept = {name: entry for name, entry in kept.items() if name not in found.ignored}
    fitted = fitting(path, spec, rows, kept, quantised) if weights else {}
    return ModelFolder(path, config, spec, fitted, manifest, found.notices, quantised)


def check_folder(path: Path, weights: bool = True, config: bool = True) -> None:
    """R201 unless it is a folder with a config (where `config` is to be its own), and not of another format: then with the
    conversion to do first (config alone is enough if no `weights` are wanted)."""
    if path.is_dir():
        if (path / ADAPTER).is_file() and not (path / CONFIG).exists():
            fix = "Give the folder of its model, and this one with --adapter-path; or look at it with `radlads inspect`"
            raise fail("R201", where=path, why="it holds an adapter, no model", fix=fix)
        if (weights or not (path / CONFIG).exists()) and (other := other_weights(path)):
            raise unconverted(path, f"its weights are {other}")
        if config and not os.path.lexists(path / CONFIG):
            raise fail("R201", where=path, why=f"it is no model folder: it holds no {CONFIG}", fix=FOLDER)
    elif path.is_file() and path.suffix in OTHER_SUFFIXES:
        raise unconverted(path, "it is a file of another format")
    else:
        why = "it is no folder" if path.exists() else "there is no such folder"
        raise fail("R201", where=path, why=why, fix=FOLDER)


def float_shape(entry: Entry, few: Quantised | None) -> tuple[int, ...]:
    """The shape of a stored tensor, or of the floats behind the words of a quantised one."""
    return entry.shape if few is None else (*entry.shape[:-1], entry.shape[-1] * 32 // few.bits)


def placed(where: str, path: Path, config: Path) -> str:
    """The place of an error about a config, a flag or the weights of a folder, with its path."""
    if where.startswith("config.json"):
        return f"{config}{where.removeprefix('config.json')}"
    return where if where.startswith("--") else str(path / where)


def config_path(path: Path, config_from: Path | str | None) -> Path:
    """The config to read: the folder's own, or that of another folder or file."""
    if config_from is None:
        return contained(path, CONFIG)
    other = Path(config_from)
    return contained(other, CONFIG) if other.is_dir() else other


def read_manifest(path: Path, spec: ModelSpec) -> dict[str, Any] | None:
    """The checked manifest, None where there is none; R204."""
    if not os.path.lexists(path / MANIFEST):
        return None
    manifest = read_json(contained(path, MANIFEST))
    check_manifest(manifest, spec, path / MANIFEST)
    return manifest


def check_manifest(manifest: object, spec: ModelSpec, where: object) -> None:
    """R204 unless it is a manifest of our schema with a stage that the model can have."""
    stages = (0, 1, 2, 3) if spec.recurrent else (0, 1, 2, 3, None)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        why = f"it is no manifest of schema {SCHEMA}"
        raise fail("R204", where=where, why=why, fix="Update radlads, or make the folder again")
    stage = manifest.get("stage")
    if isinstance(stage, bool | float) or not isinstance(stage, int | None) or stage not in stages:
        raise fail("R204", where=where, why=f"stage {stage!r} is none of 0 to 3", fix="Make the folder again")
    for name, kind in (("history", list), ("files", dict)):
        if not isinstance(manifest.get(name, kind()), kind):
            raise fail("R204", where=where, why=f"{name} is of the wrong kind", fix="Make the folder again")


def fitting(
    path: Path, spec: ModelSpec, rows: Mapping[str, Row], stored: dict[str, Entry], quantised: Mapping[str, Quantised]
) -> dict[str, Entry]:
    """The entries of the spec's tensors in its order; R203 names all that are missing, unknown or of another shape."""
    stored = {name: entry for name, entry in stored.items() if not name.endswith(".rotary_emb.inv_freq")}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if spec.tie_embeddings and head in stored and embedding in stored:
        check_tied(path, stored.pop(head), stored[embedding])
    kinds = {
        name: (float_shape(entry, few := quantised.get(name)), entry.dtype if few is None else few.scales.dtype)
        for name, entry in stored.items()
    }
    mixed = {"F16", "BF16"} <= {entry.dtype for entry in stored.values()}
    check_rows(path, rows, kinds, ["F16 and BF16 are mixed, as if the shards came from two models"] if mixed else [])
    return {name: stored[name] for name in rows}


def check_rows(
    path: Path, rows: Mapping[str, Row], stored: Mapping[str, tuple[tuple[int, ...], str]], more: Sequence[str] = ()
) -> None:
    """R203 naming all tensors of `stored` {name: (shape, dtype)} that are missing, unknown, of another shape or no floats, and
    `more` faults that were found."""
    faults = [f"{name} is missing" for name in rows if name not in stored]
    faults += [f"{name} is unknown" for name in stored if name not in rows]
    for name, (shape, dtype) in stored.items():
        if name in rows and shape != rows[name].shape:
            faults.append(f"{name} is {list(shape)}, the config needs {list(rows[name].shape)}")
        elif dtype not in FLOATS:
            faults.append(f"{name} is {dtype}, not one of {', '.join(FLOATS)}")
    faults += more
    if faults:
        why = f"{len(faults)} faults: {listed(faults)}"
        raise fail("R203", where=path, why=why, fix="Check that config and weights belong together")


def check_tied(path: Path, head: Entry, embedding: Entry) -> None:
    """R203 unless a stored head equals the embedding it is said to be tied to."""
    same = head.shape == embedding.shape and head.dtype in FLOATS and embedding.dtype in FLOATS
    if same and head.dtype == embedding.dtype:
        pairs = zip(blocks(read_raw(head)), blocks(read_raw(embedding)), strict=True)
        same = all(np.array_equal(bits(a), bits(b)) for a, b in pairs)
    elif same:
        rows = zip(read_raw(head), read_raw(embedding), strict=True)
        same = all(np.array_equal(decode(a, head.dtype), decode(b, embedding.dtype)) for a, b in rows)
    if not same:
        why = "the config ties lm_head to the embedding, yet a different lm_head.weight is stored"
        raise fail("R203", where=path, why=why, fix="Set tie_word_embeddings to false in config.json, or remove lm_head.weight")


def save_folder(
    final: Path | str,
    *,
    spec: ModelSpec,
    tensors: Iterable[Named],
    source: ModelFolder | None,
    dtype: str,
    manifest: Mapping[str, Any],
    extra_files: Mapping[str, bytes] | None = None,
    config_extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    dtypes: Mapping[str, str] | None = None,
) -> ModelFolder:
    """Write a model folder, complete or not at all, and open it.

    `tensors` yields (name, dtype, raw bits) in the spec's order; all have `dtype` but those named in `dtypes`.
    Non-weight files come from `source` byte for byte, `extra_files` win. R401 and R402, and then nothing is left.
    """
    final, extra_files = Path(final), extra_files or {}
    check_target(final, source, overwrite)
    plan = {name: ((dtypes or {}).get(name, dtype), row.shape) for name, row in spec.tensors().items()}
    copied = inherited(source) if source else []
    inputs = {entry.path for entry in source.weights.values()} if source else set()
    before = stamps(inputs)
    needed = sum(map(tensor_bytes, plan.values())) + sum(file.stat().st_size for file in copied)
    check_space(final.parent, needed)
    with new_folder(final, overwrite=overwrite) as folder:
        for file in copied:
            shutil.copyfile(file, folder / file.name)
        for name, data in extra_files.items():
            if not is_plain_name(name) or name in (CONFIG, MANIFEST) or name.endswith(WEIGHT_SUFFIXES):
                raise ValueError(f"{name!r} cannot be an extra file")
            write_file(folder / name, data)
        config = {**write_config(spec), "dtype": CONFIG_DTYPES[dtype]}
        kept = {key: source.config[key] for key in TOKEN_KEYS if source and key in source.config}
        kept |= code_keys(source, copied) if source else {}
        write_file(folder / CONFIG, to_json({**config, **kept, **(config_extra or {})}))
        write_shards(folder, tensors, plan)
        if stamps(inputs) != before:
            raise fail("R201", where=source.path if source else final, why="it changed while it was read", fix="Start again")
        history = list(source.manifest.get("history", [])) if source and source.manifest else []
        hashes = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        record = {"schema": SCHEMA, "stage": None, "radlads": __version__, "history": history, "files": hashes, **manifest}
        write_file(folder / MANIFEST, to_json(record))
    return open_folder(final)


def check_target(final: Path, source: ModelFolder | None, overwrite: bool) -> None:
    """R401 if the output is the input, lies in it or holds it, or if overwriting would remove what is no model folder."""
    target = Path(os.path.realpath(final))
    if source is not None:
        origin = Path(os.path.realpath(source.path))
        if target == origin or origin in target.parents or target in origin.parents:
            raise fail("R401", where=final, why=f"it is, holds or lies in the input {origin}", fix="Choose a folder elsewhere")
    if overwrite:
        check_ours(final)


def check_ours(final: Path, mark: str = MANIFEST) -> None:
    """R401 for a folder that may not be overwritten, because no file `mark` says that we wrote it."""
    target = Path(os.path.realpath(final))
    if target.is_dir() and any(target.iterdir()) and not (target / mark).is_file():
        why = f"it holds no {mark}, so it is not replaced"
        raise fail("R401", where=final, why=why, fix="Choose another folder, or remove it yourself")


def inherited(source: ModelFolder) -> list[Path]:
    """Files that go on to the next folder: neither weights nor config; code and model card only from a folder of ours."""
    ours = source.manifest is not None
    skipped = {CONFIG, MANIFEST, VERDICT} if ours else {CONFIG, MANIFEST, VERDICT, "README.md"}
    names = sorted(path.name for path in source.path.iterdir() if path.is_file())
    return [
        contained(source.path, name)
        for name in names
        if name not in skipped
        and not name.startswith(".")
        and not name.endswith((*WEIGHT_SUFFIXES, ".index.json"))
        and (ours or not name.endswith(".py"))
    ]


def code_keys(source: ModelFolder, copied: list[Path]) -> dict[str, Any]:
    """The config keys by which transformers and mlx-lm find model code, where that code comes along in `copied`."""
    names = {file.name for file in copied}
    found: dict[str, Any] = {}
    if isinstance(file := source.config.get("model_file"), str) and file in names:
        found["model_file"] = file
    classes = source.config.get("auto_map")
    if isinstance(classes, dict) and all(isinstance(x, str) and f"{x.partition('.')[0]}.py" in names for x in classes.values()):
        found["auto_map"] = classes
    return found


def tensor_bytes(planned: Planned) -> int:
    """Bytes of one planned tensor."""
    dtype, shape = planned
    total = np.dtype(DTYPES[dtype]).itemsize
    for size in shape:
        total *= size
    return total


def write_shards(folder: Path, tensors: Iterable[Named], plan: Plan) -> None:
    """Write the weights as one file, or as shards of at most `SHARD_BYTES` with their index."""
    shards = list(split(plan))
    stream = iter(tensors)
    places: dict[str, str] = {}
    for number, part in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_weights(folder / name, islice(stream, len(part)), part)
        places |= dict.fromkeys(part, name)
    if next(stream, None) is not None:
        raise ValueError("more tensors came than the spec has")
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(tensor_bytes, plan.values()))}, "weight_map": places}
        write_file(folder / INDEX, to_json(index))


def split(plan: Plan) -> Iterator[dict[str, Planned]]:
    """The plan in parts of at most `SHARD_BYTES`, order kept; a larger tensor stands alone."""
    part: dict[str, Planned] = {}
    size = 0
    for name, planned in plan.items():
        if part and size + tensor_bytes(planned) > SHARD_BYTES:
            yield part
            part, size = {}, 0
        part[name] = planned
        size += tensor_bytes(planned)
    yield part
