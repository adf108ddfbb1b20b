"""Bad model folders: changes of a sound one in two shards, each with the code and the words of its refusal."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from radlads.folder import MANIFEST
from radlads.tensors import INDEX, SINGLE, Raw, read_header, read_raw, write_weights
from tests.models import tiny_teacher

DIMS: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, HEAD, DEEP = "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"


def edit(path: Path, **changes: object) -> None:
    """Change keys of config.json; None removes one."""
    config = {**json.loads((path / "config.json").read_text()), **changes}
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def sound(path: Path) -> Path:
    """A very small Qwen3 folder in two shards."""
    tiny_teacher(path, **DIMS)
    stored = {name: (entry.dtype, np.array(read_raw(entry))) for name, entry in read_header(path / SINGLE).items()}
    (path / SINGLE).unlink()
    names = sorted(stored)
    halves = {FIRST: names[: len(names) // 2], SECOND: names[len(names) // 2 :]}
    for shard, part in halves.items():
        write_shard(path / shard, {name: stored[name] for name in part})
    write_index(path, {name: shard for shard, part in halves.items() for name in part})
    return path


def write_shard(path: Path, stored: dict[str, tuple[str, Raw]]) -> None:
    """Write name -> (dtype, raw) as one file."""
    plan = {name: (dtype, raw.shape) for name, (dtype, raw) in stored.items()}
    write_weights(path, [(name, dtype, raw) for name, (dtype, raw) in stored.items()], plan)


def write_index(path: Path, places: dict[str, Any]) -> None:
    """Write the index of a set."""
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def places(path: Path) -> dict[str, str]:
    """Tensor -> shard, as the index has it."""
    return json.loads((path / INDEX).read_text())["weight_map"]


def move(name: str, shard: object) -> Callable[[Path], object]:
    """The index says that `name` lies in `shard`."""
    return lambda path: write_index(path, {**places(path), name: shard})


def tensor(shard: str, name: str, value: tuple[str, Raw] | None) -> Callable[[Path], object]:
    """Put a tensor into a shard, or take it out."""

    def change(path: Path) -> None:
        stored = {key: (entry.dtype, np.array(read_raw(entry))) for key, entry in read_header(path / shard).items()}
        stored.pop(name, None)
        write_shard(path / shard, {**stored, name: value} if value else stored)

    return change


def link_out(name: str) -> Callable[[Path], object]:
    """A file of the folder becomes a link to its copy outside."""

    def change(path: Path) -> None:
        (path / name).rename(path.parent / f"outside-{name}")
        (path / name).symlink_to(f"../outside-{name}")

    return change


def cut(name: str, count: int) -> Callable[[Path], object]:
    """The file loses its last bytes."""
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - count)


def replaced(name: str, data: bytes) -> Callable[[Path], object]:
    """The file has other content."""
    return lambda path: (path / name).write_bytes(data)


def filled(dtype: str, shape: tuple[int, ...], value: float = 0.0) -> tuple[str, Raw]:
    """A tensor of one value."""
    return dtype, np.full(shape, value, {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I32": np.int32}[dtype])


def pipe(name: str) -> Callable[[Path], object]:
    """The file becomes a pipe that nobody writes to."""

    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name)

    return change


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "unknown architecture": ({"model_type": "mamba"}, "R205"),
    "no architecture": ({"model_type": None}, "R205"),
    "architecture a list": ({"model_type": [1]}, "R20[45]"),
    "no layers": ({"num_hidden_layers": 0}, "R204"),
    "negative layers": ({"num_hidden_layers": -1}, "R204"),
    "2^31 layers": ({"num_hidden_layers": 2**31}, "R204"),
    "half a layer": ({"num_hidden_layers": 2.5}, "R204"),
    "true layers": ({"num_hidden_layers": True}, "R204"),
    "many layers": ({"num_hidden_layers": 4096}, "R203"),
    "layers missing": ({"num_hidden_layers": None}, "R204"),
    "heads do not divide": ({"num_key_value_heads": 3, "num_attention_heads": 4}, "R204"),
    "odd head": ({"head_dim": 3}, "R204"),
    "vocab too small": ({"vocab_size": 299}, "R203"),
    "vocab too large": ({"vocab_size": 301}, "R203"),
    "huge hidden": ({"hidden_size": 2**31 - 1}, "R203"),
    "tied as text": ({"tie_word_embeddings": "no"}, "R204"),
    "unknown rope": ({"rope_parameters": {"rope_type": "su"}}, "R205"),
    "rope a list": ({"rope_parameters": [1]}, "R204"),
    "theta zero": ({"rope_parameters": {"rope_theta": 0}}, "R204"),
    "eps text": ({"rms_norm_eps": "1e-6"}, "R204"),
    "quantised": ({"quantization_config": {"bits": 4}}, "R205"),
    "MLX 7-bit": ({"quantization": {"bits": 7, "group_size": 64}}, "R205"),
    "MLX mxfp4": ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "R205"),
    "GPTQ": ({"quantization_config": {"bits": 4, "group_size": 128, "quant_method": "gptq"}}, "R205"),
    "gelu": ({"hidden_act": "gelu"}, "R205"),
    "sliding window": ({"use_sliding_window": True}, "R205"),
    "biases asked for": ({"attention_bias": True}, "R203"),
}

# row of the catalogue and name -> (change, code, words the message must hold)
SETS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "40 NaN in a weight": (tensor(SECOND, NORM, filled("F32", (8,), np.nan)), "R207", NORM),
    "40 infinity in a weight": (tensor(SECOND, NORM, filled("F32", (8,), -np.inf)), "R207", NORM),
    "44 mixed dtypes between shards": (
        lambda path: (tensor(FIRST, HEAD, filled("F16", (300, 8)))(path), tensor(SECOND, NORM, filled("BF16", (8,)))(path)),
        "R203",
        "mixed",
    ),
    "45 tied head that differs": (lambda path: edit(path, tie_word_embeddings=True), "R203", "ties lm_head"),
    "46 index with ../": (move(NORM, f"../{SECOND}"), "R203", "plain name"),
    "47 absolute name in the index": (move(NORM, f"/{SECOND}"), "R203", "plain name"),
    "47 name of a device": (move(NORM, "/dev/zero"), "R203", "plain name"),
    "47 name with NUL": (move(NORM, "m\0.safetensors"), "R203", "plain name"),
    "47 name that is a number": (move(NORM, 5), "R203", "plain name"),
    "48 shard is a link out of the folder": (link_out(FIRST), "R201", "leaves the model folder"),
    "48 index is a link out of the folder": (link_out(INDEX), "R201", "leaves the model folder"),
    "48 config is a link out of the folder": (link_out("config.json"), "R201", "leaves the model folder"),
    "48 shard is a link to itself": (
        lambda path: ((path / FIRST).unlink(), (path / FIRST).symlink_to(FIRST)),
        "R201",
        FIRST,
    ),
    "49 all shards missing": (lambda path: ((path / FIRST).unlink(), (path / SECOND).unlink()), "R201", "2 of 2 shards missing"),
    "50 shard not in the index": (
        lambda path: write_shard(path / "model-3.safetensors", {"x": filled("F32", (1,))}),
        "R203",
        "model-3",
    ),
    "50 tensor not in the index": (tensor(FIRST, "x", filled("F32", (1,))), "R203", "disagree about 1 tensors: x"),
    "51 key in the index, not in the shard": (tensor(SECOND, NORM, None), "R203", f"disagree about 1 tensors: {NORM}"),
    "52 key in two shards": (tensor(FIRST, NORM, filled("F32", (8,))), "R203", f"tensor {NORM} lies in"),
    "54 shard of another model": (tensor(SECOND, DEEP, filled("F32", (8, 12))), "R203", f"{DEEP} is [8, 12]"),
    "54 whole numbers for a weight": (tensor(SECOND, DEEP, filled("I32", (12, 8))), "R203", "is I32"),
    "55 shard cut by one byte": (cut(SECOND, 1), "R202", "the file is cut"),
    "55 shard cut in the header": (lambda path: os.truncate(path / SECOND, 100), "R202", "the file is cut"),
    "55 empty shard": (lambda path: os.truncate(path / SECOND, 0), "R202", "0 bytes"),
    "55 shard with bytes at its end": (
        lambda path: (path / SECOND).write_bytes((path / SECOND).read_bytes() + b"x"),
        "R202",
        "follow",
    ),
    "56 config missing": (lambda path: (path / "config.json").unlink(), "R201", "config.json"),
    "56 config empty": (replaced("config.json", b""), "R204", "JSON"),
    "56 config a list": (replaced("config.json", b"[]"), "R204", "config.json"),
    "56 config with a key twice": (replaced("config.json", b'{"model_type": "qwen3", "model_type": "llama"}'), "R204", "twice"),
    "56 config of 10,000 brackets": (replaced("config.json", b"[" * 10_000), "R204", "nested"),
    "56 config with NaN": (replaced("config.json", b'{"rms_norm_eps": NaN}'), "R204", "NaN"),
    "56 config of 5 MB": (replaced("config.json", b" " * 5_000_000), "R201", "larger than"),
    "56 manifest a list": (replaced(MANIFEST, b"[]"), "R204", "manifest"),
    "56 manifest of a newer schema": (replaced(MANIFEST, b'{"schema": 99}'), "R204", "schema"),
    "56 manifest of stage 9": (replaced(MANIFEST, b'{"schema": 1, "stage": 9}'), "R204", "stage"),
    "56 index empty": (replaced(INDEX, b""), "R203", "JSON"),
    "56 index without a map": (replaced(INDEX, b"{}"), "R203", "weight_map"),
    "56 index with a name twice": (replaced(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}'), "R203", "twice"),
    "64 tokenizer not JSON": (replaced("tokenizer.json", b"{"), "R206", "tokenizer"),
    "81 config is a pipe": (pipe("config.json"), "R201", "no regular file"),
    "81 shard is a pipe": (pipe(FIRST), "R201", ""),
    "81 shard is a folder": (lambda path: ((path / FIRST).unlink(), (path / FIRST).mkdir()), "R201", ""),
    "81 tokenizer is a pipe": (pipe("tokenizer.json"), "R206", "no regular file"),
}  # fmt: skip
