"""GGUF: teachers of the llama, qwen2 and qwen3 architectures, and RAD-RWKV6 as rwkv6qwen2; docs/formats.md has the tables."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from radlads.errors import RadladsError, fail
from radlads.families import read_config
from radlads.folder import TOKEN_KEYS, check_manifest
from radlads.spec import DEFAULT_OPTIONS, ModelSpec, Ranks
from radlads.tensors import FLOATS, Raw
from radlads.weights_tools.formats import gguf_tokenizer as tokenizer
from radlads.weights_tools.formats.format import Reading, Source, StoredTensor, fit
from radlads.weights_tools.formats.ggml import DECODERS
from radlads.weights_tools.formats.gguf_file import TYPES, GgufEntry, GgufFile, read_gguf
from radlads.weights_tools.formats.gguf_rules import ROPE_FREQS, RWKV6, TEACHERS, rope_factors, rules_of
from radlads.weights_tools.formats.gguf_writer import plan
from radlads.weights_tools.lazy import Lazy, cast, read_at
from radlads.weights_tools.rules import to_ours

__all__ = ["NAME", "plan", "read"]
NAME = "gguf"
BLOCKS = {name: (values, nbytes) for name, values, nbytes in TYPES.values()}
FLOAT_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
LLAMA3 = (8.0, 32.0)  # the factors of published Llama 3.x models


def read(path: Path, reading: Reading) -> Source:
    """A GGUF file; R202 broken, R204 settings that do not fit, R205 an architecture or a type that is not known."""
    file = read_gguf(path)
    meta: dict[str, Any] = file.metadata
    arch = meta.get("general.architecture")
    architectures = (*dict.fromkeys(TEACHERS.values()), RWKV6)
    if arch not in architectures:
        known = ", ".join(architectures)
        raise fail("R205", where=path, why=f"its architecture is {arch!r}; known: {known}", fix="Use another file")
    notices: list[str] = []
    spec, config = described(path, file, arch, notices)
    entries = {name: entry for name, entry in file.tensors.items() if name != ROPE_FREQS}
    try:
        tensors = to_ours(rules_of(spec), {name: floats(entry) for name, entry in entries.items()})
    except KeyError as error:
        why = f"{error.args[0]} has no place in the architecture {arch}"
        raise fail("R203", where=path, why=why, fix="Use another file") from None
    originals = {name: dtype for name, dtype in table(meta, "radlads.dtypes", path).items() if dtype in FLOATS}
    tensors = {name: cast(tensor, originals.get(name, tensor.dtype)) for name, tensor in tensors.items()}
    own_ids = {name: ids for name, ids in table(meta, "radlads.config", path).items() if name in TOKEN_KEYS}
    kinds = sorted({entry.type for entry in entries.values()})
    return Source(
        path=path,
        format=NAME,
        layout=f"{arch}, {', '.join(kinds)}",
        spec=spec,
        tensors=fit(path, spec, tensors),
        stored=[StoredTensor(entry.name, entry.type, entry.shape, path.name, entry.nbytes) for entry in file.tensors.values()],
        inputs=(path,),
        config={**config, **tokenizer.token_ids(meta), **own_ids},
        files=tokenizer.files_of(meta, path),
        manifest=manifest_in(meta, spec, path),
        notices=tuple(notices),
        quantised=any(kind in DECODERS for kind in kinds),
    )


def table(meta: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The JSON table under one of our own keys, empty where there is none; R204."""
    try:
        value = json.loads(meta.get(key, "{}"))
    except (TypeError, ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise fail("R204", where=f"{path}: {key}", why="it is no JSON table", fix="Convert the model again")
    return value


def manifest_in(meta: Mapping[str, Any], spec: ModelSpec, path: Path) -> dict[str, Any] | None:
    """Our record of the model, None where there is none; R204."""
    record = table(meta, "radlads.manifest", path)
    if record:
        check_manifest(record, spec, f"{path}: radlads.manifest")
    return record or None


def floats(entry: GgufEntry) -> Lazy:
    """A stored tensor as floats: as it is, or decoded to float32; R205 for a type without a decoder."""
    width = math.prod(entry.shape[1:])
    if entry.type in FLOAT_TYPES:
        dtype = np.dtype(FLOAT_TYPES[entry.type])

        def read_floats(start: int, stop: int) -> Raw:
            values = bytes_at(entry, dtype, (stop - start) * width, start * width * dtype.itemsize)
            return values.reshape(stop - start, *entry.shape[1:])

        return Lazy(entry.type, entry.shape, read_floats)
    decode = DECODERS.get(entry.type)
    if decode is None:
        known = ", ".join((*FLOAT_TYPES, *DECODERS))
        why = f"{entry.name} has the type {entry.type}; known: {known}"
        raise fail("R205", where=entry.path, why=why, fix="Use a file of another quantisation")
    values, nbytes = BLOCKS[entry.type]
    rows = entry.shape[0] if len(entry.shape) > 1 else 1
    per_row = math.prod(entry.shape) // rows // values

    def read_blocks(start: int, stop: int) -> Raw:
        if len(entry.shape) == 1:  # the one row may be asked for in parts
            return read_row(entry, decode, per_row)[start:stop]
        count = (stop - start) * per_row
        data = bytes_at(entry, np.dtype(np.uint8), count * nbytes, start * per_row * nbytes)
        with np.errstate(all="ignore"):
            return decode(data.reshape(count, nbytes)).reshape(stop - start, *entry.shape[1:])

    return Lazy("F32", entry.shape, read_blocks)


def read_row(entry: GgufEntry, decode: Callable[[Any], Raw], count: int) -> Raw:
    """A decoded tensor of one axis."""
    data = bytes_at(entry, np.dtype(np.uint8), entry.nbytes, 0)
    return decode(data.reshape(count, -1)).reshape(entry.shape)


def bytes_at(entry: GgufEntry, dtype: "np.dtype[Any]", count: int, offset: int) -> Raw:
    """Values of a stored tensor."""
    return read_at(entry.path, dtype, count, entry.offset + offset)


def described(path: Path, file: GgufFile, arch: str, notices: list[str]) -> tuple[ModelSpec, dict[str, Any]]:
    """(spec, config) from our own key, or put together from the metadata; R204."""
    if "radlads.spec" in file.metadata:
        try:
            return ModelSpec.from_dict(table(file.metadata, "radlads.spec", path)), {}
        except (TypeError, ValueError) as error:
            raise fail("R204", where=f"{path}: radlads.spec", why=str(error), fix="Convert the model again") from None
    try:
        config = config_of(path, file, arch)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise fail("R204", where=path, why=f"its settings are of the wrong kind: {error}", fix="Use another file") from None
    notices += told(file, arch)
    try:
        spec = read_config(config)
        return (student(spec, file, notices) if arch == RWKV6 else spec), config
    except RadladsError as error:
        where = f"{path} ({error.where.removeprefix('config.json: ')})"
        raise fail(error.code, where=where, why=error.why, fix=error.fix) from None
    except (KeyError, TypeError, ValueError) as error:
        raise fail("R204", where=path, why=f"its settings do not fit together: {error}", fix="Use another file") from None


def config_of(path: Path, file: GgufFile, arch: str) -> dict[str, Any]:
    """A Hugging Face config of the model in the file."""
    meta = file.metadata

    def setting(key: str, default: object = None) -> Any:
        return shortest(meta.get(f"{arch}.{key}", default))

    for key in ("expert_count", "attention.sliding_window", "rope.scaling.attn_factor"):
        if setting(key):
            raise fail("R205", where=path, why=f"{arch}.{key} is set, which is not supported", fix="Choose another teacher")
    embedding = file.tensors.get("token_embd.weight")
    head_size = setting("wkv.head_size") if arch == RWKV6 else setting("attention.key_length")
    hidden = setting("embedding_length", 0)
    heads = hidden // head_size if arch == RWKV6 and head_size else setting("attention.head_count")
    config = {
        "model_type": "qwen2" if arch == RWKV6 else arch,
        "hidden_size": hidden,
        "intermediate_size": setting("feed_forward_length"),
        "num_hidden_layers": setting("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": setting("attention.head_count_kv", heads) or heads,
        "head_dim": head_size or (hidden // heads if heads else None),
        "vocab_size": embedding.shape[0] if embedding else None,
        "max_position_embeddings": setting("context_length", 32768),
        "rms_norm_eps": setting("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": setting("rope.freq_base", 1e4),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }
    scaling = rope_scaling(path, file, config, setting)
    return {**config, **({"rope_scaling": scaling} if scaling else {})}


def told(file: GgufFile, arch: str) -> Iterator[str]:
    """What the metadata leave open, and what is taken as llama.cpp takes it."""
    if f"{arch}.attention.layer_norm_rms_epsilon" not in file.metadata:
        yield f"norm epsilon 1e-06: the file has no {arch}.attention.layer_norm_rms_epsilon"
    if arch != RWKV6 and f"{arch}.rope.freq_base" not in file.metadata:
        yield f"rotary base 10000: the file has no {arch}.rope.freq_base"


def shortest(value: object) -> object:
    """A float32 of the metadata as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def rope_scaling(path: Path, file: GgufFile, config: dict[str, Any], setting: Callable[..., Any]) -> dict[str, Any] | None:
    """The scaling of RoPE: by a key, or by the table of frequencies of a Llama 3.x model."""
    kind = setting("rope.scaling.type", "none")
    if ROPE_FREQS in file.tensors:
        stored = floats(file.tensors[ROPE_FREQS]).whole()
        for factor in LLAMA3:
            scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 8192}  # fmt: skip
            if np.allclose(stored, rope_factors(config["head_dim"], config["rope_theta"], scaling), rtol=1e-4):
                return scaling
        raise fail("R205", where=path, why="its table of RoPE frequencies is not that of Llama 3.x", fix="Choose another teacher")
    if kind == "linear":
        return {"rope_type": "linear", "factor": setting("rope.scaling.factor", 1.0)}
    if kind != "none":
        raise fail("R205", where=path, why=f"the RoPE scaling {kind!r} is not supported", fix="Choose another teacher")
    return None


def student(teacher: ModelSpec, file: GgufFile, notices: list[str]) -> ModelSpec:
    """The spec of an rwkv6qwen2 file of others; its ranks are those of its tensors."""
    shift, decay = file.tensors["blk.0.time_mix_w2.weight"], file.tensors["blk.0.time_mix_decay_w1.weight"]
    bias = "blk.0.time_mix_receptance.bias" in file.tensors
    notices.append("the log-decay is clamped at -5, as published models are; GGUF does not say and llama.cpp does not clamp")
    return replace(
        teacher,
        qkv_bias=bias,
        mixers=("rwkv6",) * teacher.L,
        mixer=DEFAULT_OPTIONS["rwkv6"],
        ranks=Ranks(tokenshift=shift.shape[-1], decay=decay.shape[0]),
    )
