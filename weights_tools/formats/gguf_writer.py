"""Laying out a GGUF file: what llama.cpp needs, our own keys by which nothing is lost, and why a model cannot be held."""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from radlads.folder import MANIFEST
from radlads.spec import ModelSpec
from radlads.weights_tools.formats import gguf_tokenizer as tokenizer
from radlads.weights_tools.formats.format import (
    EMBEDDING,
    HEAD,
    Output,
    Source,
    Writing,
    manifest_of,
    pieces_of,
    record_of,
    refuse,
)
from radlads.weights_tools.formats.gguf_file import TYPES
from radlads.weights_tools.formats.gguf_rules import ROPE_FREQS, RWKV6, TEACHERS, rope_factors, rules_of
from radlads.weights_tools.lazy import Lazy, cast, widened
from radlads.weights_tools.output import OutputFile, Segment, fixed
from radlads.weights_tools.rules import to_theirs

NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
ALIGNMENT = 32
# Tensors that llama.cpp wants in float32, beside all of one axis.
PRECISE = ("time_mix_w1", "time_mix_w2", "time_mix_decay_w1", "time_mix_decay_w2", "time_mix_lerp_fused")


def plan(source: Source, writing: Writing, key: str) -> Output:
    """One file; R205 with the reasons where llama.cpp has no such architecture, or GGUF no such tokenizer."""
    spec = source.spec
    reasons = obstacles(spec)
    if reasons:
        raise refuse(source.path, "GGUF", reasons, "Write --to hf, mlx or pth instead")
    ours = source.in_dtype(writing.dtype)
    if spec.recurrent and spec.tie_embeddings:
        ours = {**ours, HEAD: ours[EMBEDDING]}  # llama.cpp wants a head of its own
    theirs = to_theirs(rules_of(spec), ours)
    stored = {name: cast(tensor, "F32") if precise(name, tensor) else tensor for name, tensor in theirs.items()}
    if spec.rope_scaling and spec.rope_scaling["rope_type"] == "llama3" and not spec.recurrent:
        factors = rope_factors(spec.N, spec.rope_theta, spec.rope_scaling)
        stored = {ROPE_FREQS: Lazy("F32", factors.shape, lambda start, stop: factors[start:stop]), **stored}
    event = {"to": "gguf", "dtype": writing.dtype or "stored"}
    own = {"radlads.manifest": json.dumps(record_of(source, event)), "radlads.conversion": key}
    meta = {**metadata(source, ours, writing.dtype or source.dtype), **own}
    meta |= tokenizer.metadata_of(source.files, source.token_ids, spec.V, source.path)
    file = OutputFile("model.gguf", [fixed("header", header(meta, stored)), *data(stored)])
    notices = clamp_notices(spec, source.tensors)
    return Output([file], lambda hashes: {MANIFEST: manifest_of(source, event, key, hashes, {})}, notices)


def obstacles(spec: ModelSpec) -> list[str]:
    """Why llama.cpp could not run the model; empty if it can."""
    if spec.recurrent is None:
        return [] if spec.family in TEACHERS else [f"teachers of the family {spec.family} are not written"]
    flags = spec.mixer
    found = {
        f"llama.cpp has no architecture with the {spec.recurrent} mixer, only RAD-RWKV6": spec.recurrent != "rwkv6",
        f"layers {', '.join(map(str, spec.kept_layers))} are softmax, and rwkv6qwen2 has none": bool(spec.kept_layers),
        f"the gate is {flags.gate}, and rwkv6qwen2 has a full one": flags.gate != "full",
        "rwkv6qwen2 has no RoPE": flags.rope,
        "rwkv6qwen2 always has token shift": not flags.token_shift,
        "rwkv6qwen2 always balances the key": not flags.balance,
        "rwkv6qwen2 has no group norm": flags.groupnorm,
        "rwkv6qwen2 has no norm of q and k": spec.qk_norm,
        "rwkv6qwen2 has no bias on the output or the feed-forward": spec.output_bias or spec.mlp_bias,
        "rwkv6qwen2 needs heads that fill the hidden size": spec.C != spec.D,
    }
    if spec.recurrent != "rwkv6":
        return list(found)[:1]
    return [reason for reason, holds in found.items() if holds]


def clamp_notices(spec: ModelSpec, tensors: Mapping[str, Lazy]) -> tuple[str, ...]:
    """What the missing clamp of llama.cpp does to this model: nothing, if no input can bring the log-decay below it.

    With d = time_decay + tanh(.) W2, no d exceeds time_decay + sum |W2|; the clamp acts where exp(d) > -clamp.
    """
    if spec.mixer.clamp is None or spec.recurrent != "rwkv6":
        return ()
    limit, beyond = math.log(-spec.mixer.clamp), 0
    for layer in range(spec.L):
        prefix = f"model.layers.{layer}.self_attn.time_decay"
        base, pair = (tensors[prefix + ending] for ending in ("", "_w2"))
        with np.errstate(all="ignore"):  # weights that are not finite are refused elsewhere
            highest = widened(base.whole(), base.dtype).reshape(-1) + np.abs(widened(pair.whole(), pair.dtype)).sum(0)
        beyond += not bool((highest <= limit).all())
    what = f"llama.cpp does not clamp the log-decay at {spec.mixer.clamp:g}"
    if not beyond:
        return (f"{what}; in this model no input can reach the clamp, so it computes the same",)
    return (f"{what}; where an input reaches it (possible in {beyond} of {spec.L} layers) it forgets faster than here",)


def precise(name: str, tensor: Lazy) -> bool:
    """Whether llama.cpp wants the tensor in float32."""
    return len(tensor.shape) == 1 or any(part in name for part in PRECISE)


def metadata(source: Source, ours: Mapping[str, Lazy], dtype: str) -> dict[str, Any]:
    """Everything but the tokenizer: llama.cpp's keys, and ours by which nothing is lost on the way back."""
    spec = source.spec
    arch = RWKV6 if spec.recurrent else TEACHERS[spec.family]
    keys: dict[str, Any] = {
        "context_length": 1048576 if spec.recurrent else spec.max_positions,
        "embedding_length": spec.D,
        "block_count": spec.L,
        "feed_forward_length": spec.F,
        "attention.layer_norm_rms_epsilon": spec.rms_norm_eps,
        "attention.head_count_kv": spec.Hkv,
    }
    if spec.recurrent:
        keys |= {
            "attention.head_count": 0,  # wanted by llama.cpp, never used
            "wkv.head_size": spec.N,
            "time_mix_extra_dim": spec.ranks.tokenshift,
            "time_decay_extra_dim": spec.ranks.decay,
            "token_shift_count": 1,
        }
    else:
        keys |= {"attention.head_count": spec.H, "attention.key_length": spec.N, "attention.value_length": spec.N}
        keys |= {"rope.freq_base": float(spec.rope_theta), "rope.dimension_count": spec.N, "vocab_size": spec.V}
        if spec.rope_scaling and spec.rope_scaling["rope_type"] == "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(spec.rope_scaling["factor"])}
    changed = {name: tensor.dtype for name, tensor in ours.items() if tensor.dtype != "F32"}
    general = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": source.path.resolve().stem,
        "general.file_type": FILE_TYPES[dtype],
        "general.quantization_version": 2,
    }
    own = {
        "radlads.spec": json.dumps(spec.to_dict()),
        "radlads.dtypes": json.dumps(changed),
        "radlads.config": json.dumps(source.token_ids),
    }
    return {**general, **{f"{arch}.{name}": value for name, value in keys.items()}, **own}


def header(meta: Mapping[str, Any], tensors: Mapping[str, Lazy]) -> bytes:
    """Magic, metadata and the list of tensors, padded to the alignment."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(meta))]
    parts += [text(key) + value(item) for key, item in meta.items()]
    offset = 0
    for name, tensor in tensors.items():
        sizes = tensor.shape[::-1]
        parts.append(text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, NUMBERS[tensor.dtype], offset))
        offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
    joined = b"".join(parts)
    return joined + b"\0" * (-len(joined) % ALIGNMENT)


def data(tensors: Mapping[str, Lazy]) -> Sequence[Segment]:
    """The tensors, each padded to the alignment."""
    segments: list[Segment] = []
    for name, tensor in tensors.items():
        segments.append(Segment(name, tensor.nbytes, pieces_of(tensor)))
        if padding := -tensor.nbytes % ALIGNMENT:
            segments.append(fixed(f"{name} padding", b"\0" * padding))
    return segments


def text(string: str) -> bytes:
    """A string of the format."""
    encoded = string.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def value(item: Any) -> bytes:
    """A value with its type: booleans, uint32 (int32 in lists), float32, strings, lists of one type."""
    if isinstance(item, list):
        if all(isinstance(entry, str) for entry in item):
            return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(text, item))
        return struct.pack("<IIQ", 9, 5, len(item)) + struct.pack(f"<{len(item)}i", *item)
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    return struct.pack("<I", 8) + text(item)
