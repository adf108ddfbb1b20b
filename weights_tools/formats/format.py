"""What every format has in common: a model as it was read, the wish for an output, and the check that names and shapes fit."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import radlads
from radlads.errors import RadladsError, fail
from radlads.files import to_json
from radlads.folder import SCHEMA, TOKEN_KEYS, check_rows
from radlads.provenance import carried_license, hub_origin, license_of
from radlads.spec import ModelSpec
from radlads.tensors import Entry, Raw, decode
from radlads.weights_tools.lazy import Lazy, cast, finite
from radlads.weights_tools.output import OutputFile

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FINISHED = 3  # the stage of a student that says nothing of it
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file has it: name, type in the format's own spelling, shape, file, bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    nbytes: int


@dataclass(frozen=True)
class Reading:
    """What the user says about the input: a folder or file with its config, the era of an RAD-RWKV7 model, and the stage of a
    student whose files do not say."""

    config: str | None = None
    variant: str | None = None
    stage: int | None = None


@dataclass(frozen=True)
class Writing:
    """What the user wants: a dtype of `DTYPES` (None keeps each tensor's own), for MLX affine quantisation, for Hugging Face
    the layout of a published model."""

    dtype: str | None = None
    bits: int | None = None
    group_size: int = 64
    layout: str | None = None
    single: bool = False  # one file under the output's own name, not a folder


@dataclass(frozen=True)
class Source:
    """A model as it was read: float tensors under our names in the spec's order, nothing of them in memory yet."""

    path: Path
    format: str
    layout: str  # what kind of the format, for people
    spec: ModelSpec
    tensors: dict[str, Lazy]
    stored: list[StoredTensor]
    inputs: tuple[Path, ...]  # the weights files
    config: dict[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path | bytes] = field(default_factory=dict)  # tokenizer, chat template and the like
    manifest: dict[str, Any] | None = None
    notices: tuple[str, ...] = ()
    quantised: bool = False
    hashes: Callable[[], Mapping[str, str]] = dict  # SHA-256 of the inputs, once they are read to the end
    told_stage: int | None = None  # of a student without a manifest: what the user or its name says
    teacher: Mapping[str, Any] = field(default_factory=dict)  # of a student of others: what its config says, or --config is

    @property
    def stage(self) -> int | None:
        """0 to 3 for a student, None for a teacher and where nothing says."""
        if self.spec.recurrent is None:
            return None
        return self.told_stage if self.manifest is None else self.manifest["stage"]

    @property
    def dtype(self) -> str:
        """The dtype that most bytes have, in safetensors' spelling."""
        return most_bytes(self.tensors.values())

    @property
    def token_ids(self) -> dict[str, Any]:
        """Begin, end and padding ids as config.json has them."""
        return {key: self.config[key] for key in TOKEN_KEYS if key in self.config}

    def in_dtype(self, dtype: str | None) -> dict[str, Lazy]:
        """The tensors, all in one float dtype or each in its own."""
        return {name: cast(tensor, dtype) if dtype else tensor for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Output:
    """The plan of an output: large files, and the small ones once the hashes of the large ones are known."""

    files: list[OutputFile]
    small_files: Callable[[Mapping[str, str]], Mapping[str, bytes | Path]] = lambda hashes: {}
    notices: tuple[str, ...] = ()  # what the output does not say or do


def most_bytes(tensors: Iterable[Lazy | Entry]) -> str:
    """The dtype that most bytes of some tensors have."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


class Format(Protocol):
    """A format: `read` opens a file or folder, `plan` lays out the output or refuses with the reason (R205, R101)."""

    NAME: str

    def read(self, path: Path, reading: Reading) -> Source: ...

    def plan(self, source: Source, writing: Writing, key: str) -> Output: ...


def fit(path: Path, spec: ModelSpec, tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The tensors in the spec's order; R203 names all that are missing, unknown, of another shape or no floats."""
    rows, found = spec.tensors(), dict(tensors)
    if spec.tie_embeddings and HEAD in found and EMBEDDING in found:
        check_tied(path, found.pop(HEAD), found[EMBEDDING])
    check_rows(path, rows, {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()})
    return {name: found[name] for name in rows}


def check_tied(path: Path, head: Lazy, embedding: Lazy) -> None:
    """R203 unless a stored head equals the embedding it is said to be tied to."""
    same = head.shape == embedding.shape
    if same:
        pairs = zip(cast(head, "F32").pieces(), cast(embedding, "F32").pieces(), strict=True)
        same = all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in pairs)
    if not same:
        why = "the config ties lm_head to the embedding, yet a different head is stored"
        raise fail("R203", where=path, why=why, fix="Set tie_word_embeddings to false in the config")


def checked(source: Source, tensors: Mapping[str, Lazy], allow: bool, say: Callable[[str], None]) -> dict[str, Lazy]:
    """The tensors with a look at every piece read: R207 for NaN or infinity, unless allowed or in what no model reads; a word
    about those of the teacher's that hold one value throughout, as where a download or a training went wrong."""
    rows = source.spec.tensors()
    told: set[str] = set()
    values: dict[str, Raw | None] = {}  # the one value of a tensor so far, None where there are several

    def watch(name: str, tensor: Lazy) -> Lazy:
        matrix = len(tensor.shape) == 2
        watched = rows[name].copied and (matrix or not name.endswith(".bias"))

        def follow(raw: Raw, stop: int) -> None:
            flat = raw.reshape(-1)
            known = values.setdefault(name, flat[:1].copy())
            if known is None or (flat[:1024] != known).any() or (flat != known).any():
                values[name] = None
            elif stop == tensor.shape[0] and (matrix or not known.any()):
                values[name] = None  # told once, however often it is read
                say(f"{name} holds one value throughout: {float(decode(known, tensor.dtype)[0]):g}")

        def read(start: int, stop: int) -> Raw:
            raw = tensor.read(start, stop)
            whole = finite(raw, tensor.dtype)
            if whole and watched and raw.size:
                follow(raw, stop)
            if not whole and name not in told:
                if rows[name].read and not allow:
                    why = f"{name} holds NaN or infinity"
                    raise fail("R207", where=source.path, why=why, fix="Get the weights again, or pass --allow-nonfinite")
                told.add(name)
                say(f"{name} holds NaN or infinity" + ("" if rows[name].read else "; no model reads it"))
            return raw

        return Lazy(tensor.dtype, tensor.shape, read)

    return {name: watch(name, tensor) for name, tensor in tensors.items()}


def manifest_of(
    source: Source, event: Mapping[str, Any], key: str, hashes: Mapping[str, str], small: Mapping[str, bytes | Path]
) -> bytes:
    """radlads.json of an output: its record, and hashes of the inputs and of all files."""
    files = {**hashes, **{name: hashlib.sha256(content_of(content)).hexdigest() for name, content in small.items()}}
    record = record_of(source, event, source.hashes())
    return to_json({**record, "files": dict(sorted(files.items())), "conversion": key}).encode()


def record_of(source: Source, event: Mapping[str, Any], hashes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the source's manifest says, its licence, and this conversion, with the hashes of its inputs where they are known, at
    the end of the history."""
    old = dict(source.manifest or {})
    stage = old.get("stage") if source.spec.recurrent is None else FINISHED if source.stage is None else source.stage
    place = source.path if source.path.is_dir() else source.path.parent
    name = source.path.resolve().name
    origin: dict[str, Any] = {
        "name": name,
        **hub_origin(place),
        "files": {path.name: path.stat().st_size for path in source.inputs},
    }
    if hashes:
        origin["sha256"] = dict(hashes)
    told = {"kind": "convert", "from": source.format, **event, "source": origin}
    if source.notices:
        told["notices"] = list(source.notices)
    terms = {} if carried_license(old) else license_of(place, None)
    new = {"schema": SCHEMA, "stage": stage, "history": [*old.get("history", []), told]}
    known = {"license": terms, "teacher": dict(source.teacher)}
    return {**old, **{key: value for key, value in known.items() if value}, **new}


def work_key(source: Source, writing: Writing, target: str, allow: bool) -> str:
    """Names the work: two runs with the same key write the same bytes."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.inputs]
    small = {name: hashlib.sha256(content_of(content)).hexdigest() for name, content in source.files.items()}
    parts = [radlads.__version__, target, asdict(writing), allow, stats, small, source.spec.to_dict(), source.config]
    parts += [str(source.path.resolve()), source.manifest, source.stage, dict(source.teacher)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def content_of(content: Path | bytes) -> bytes:
    """The bytes of a small file."""
    return content if isinstance(content, bytes) else content.read_bytes()


def refuse(path: Path, target: str, reasons: Sequence[str], fix: str) -> RadladsError:
    """R205: the format cannot hold the model, with every reason."""
    return fail("R205", where=path, why=f"{target} cannot hold this model: {'; '.join(reasons)}", fix=fix)


def pieces_of(tensor: Lazy) -> Callable[[Mapping[str, int]], Iterator[Raw]]:
    """The tensor as the pieces of a segment."""
    return lambda checks: tensor.pieces()
