"""Adapters: a few tensors that change a model and leave its folder alone. The format is mlx-lm's, and peft's by one rule.

A folder of adapter_config.json and adapters.safetensors. "lora" and "dora" hold `<module>.lora_a` A (in, r), `.lora_b` B (r, out)
and, of dora, `.m` (out): the weight becomes W' = W + scale (A B)^T, of dora each row scaled to the norm m. "full" holds
weights themselves; "state" the state before the first token, `layers.i.wkv` (1, H, N, N) and `layers.i.shift` (1, 1, D).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from radlads.errors import RadladsError, fail
from radlads.files import read_json, to_json, write_file
from radlads.spec import ModelSpec
from radlads.tensors import Entry, contained, encode, read_float32, read_header, write_weights

CONFIG = "adapter_config.json"
SCHEMA = 1
WEIGHTS, PEFT_WEIGHTS = "adapters.safetensors", "adapter_model.safetensors"
KINDS = ("lora", "dora", "full", "state")
# What peft calls the parts of an adapter, and puts in front of every name; its two matrices are the transposes of ours.
PEFT_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
PEFT_PREFIX = "base_model.model."
# Settings of a peft adapter that change what it computes in a way that mlx-lm's format cannot say, and their plain values.
PEFT_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
}

Array = npt.NDArray[Any]
Tensors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Adapter:
    """An adapter of one of KINDS that fits its model; `rank`, `scale` and `dropout` are of lora and dora."""

    path: Path
    kind: str
    entries: dict[str, Entry]
    rank: int = 0
    scale: float = 1.0
    dropout: float = 0.0
    model: str | None = None  # fingerprint of the model it was made with, where its config says so
    from_peft: bool = False

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor as float32, in mlx-lm's orientation."""
        x = read_float32(self.entries[name])
        return np.ascontiguousarray(x.T) if self.from_peft and x.ndim == 2 else np.array(x)

    def tensors(self) -> Tensors:
        """All of them."""
        return {name: self.array(name) for name in self.entries}

    def modules(self) -> list[str]:
        """Full names of the adapted modules of lora and dora."""
        return [name.removesuffix(".lora_a") for name in self.entries if name.endswith(".lora_a")]

    def content_hash(self) -> str:
        """`content_hash` of its tensors, of which one at a time is in memory."""
        return content_hash((name, self.array(name)) for name in sorted(self.entries))

    def fingerprint(self) -> str:
        """A hash of all that it computes."""
        return hashlib.sha256(f"{self.kind} {self.scale} {self.content_hash()}".encode()).hexdigest()


@dataclass(frozen=True)
class Settings:
    """What a new adapter is to be; `keys` names modules below a layer, None takes every linear one."""

    kind: str = "lora"
    layers: int = 16  # the last ones; fewer where the model has fewer
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] | None = None


def linear_modules(spec: ModelSpec, layer: int) -> list[str]:
    """Names of the linear modules of a layer, below it: self_attn.q_proj, mlp.up_proj and so on."""
    prefix = f"model.layers.{layer}."
    rows = spec.tensors()
    found = (name for name in rows if name.startswith(prefix) and name.endswith(".weight") and len(rows[name].shape) == 2)
    return [name.removeprefix(prefix).removesuffix(".weight") for name in found]


def chosen_modules(spec: ModelSpec, settings: Settings) -> list[str]:
    """Full names of the modules that a new lora or dora adapts. Raises R101 for a key that no layer has."""
    layers = range(spec.L - min(settings.layers, spec.L), spec.L)
    known = {layer: linear_modules(spec, layer) for layer in layers}
    for key in settings.keys or ():
        if not any(key in modules for modules in known.values()):
            names = sorted({name for modules in known.values() for name in modules})
            why = f"no layer that is trained has a linear module {key!r}"
            raise fail("R101", where="lora_parameters.keys", why=why, fix=f"Use some of: {', '.join(names)}")
    chosen = ((layer, name) for layer in layers for name in known[layer] if settings.keys is None or name in settings.keys)
    return [f"model.layers.{layer}.{name}" for layer, name in chosen]


def full_names(spec: ModelSpec, layers: int) -> list[str]:
    """Names of the weights that full fine-tuning of the last layers changes: all of them that a forward pass reads."""
    first = spec.L - min(layers, spec.L)
    rows = spec.tensors()
    inside = (name for name in rows if name.startswith("model.layers.") and int(name.split(".")[2]) >= first)
    return [name for name in inside if rows[name].read]


def state_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state adapter; softmax layers have none."""
    return {f"layers.{i}.{slot}": (1, *shape) for i, held in enumerate(spec.state()) for slot, shape in held.items()}


def first_values(spec: ModelSpec, settings: Settings, seed: int) -> Tensors:
    """What a new lora, dora or state begins with, the same on every backend; it changes nothing yet.

    A is uniform within 1 / sqrt(in), as mlx-lm and peft draw it, B and the state are zero; m is the norm of each row of W,
    which the backends know.
    """
    if settings.kind == "state":
        return {name: np.zeros(shape, np.float32) for name, shape in state_shapes(spec).items()}
    rows, rng, found = spec.tensors(), np.random.default_rng(seed), {}
    for module in chosen_modules(spec, settings):
        out, inner = rows[f"{module}.weight"].shape
        found[f"{module}.lora_a"] = rng.uniform(-(inner**-0.5), inner**-0.5, (inner, settings.rank)).astype(np.float32)
        found[f"{module}.lora_b"] = np.zeros((settings.rank, out), np.float32)
    return found


def read_config(path: Path) -> dict[str, Any]:
    """The config of an adapter's folder. Raises R201, R204."""
    if not path.is_dir():
        why = "it is no folder" if path.exists() else "there is no such folder"
        raise fail("R201", where=path, why=why, fix=f"Give the folder that holds {CONFIG}")
    config = read_json(contained(path, CONFIG))
    if not isinstance(config, dict):
        raise fail("R204", where=path / CONFIG, why="it holds no table", fix="Get the adapter again")
    return config


def stored_adapter(path: Path, config: Mapping[str, Any]) -> Adapter:
    """An adapter by its config and the header of its tensors alone, which may fit no model. Raises R201, R202, R204, R205."""
    return read_peft(path, config) if "peft_type" in config else read_mlx(path, config)


def read_mlx(path: Path, config: Mapping[str, Any]) -> Adapter:
    """An adapter in mlx-lm's format. Raises R201, R202, R204."""
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise bad_config(path, f"fine_tune_type {str(kind)[:40]!r} is none of {', '.join(KINDS)}")
    about = config.get("radlads")
    about = about if isinstance(about, dict) else {}
    if about.get("schema", SCHEMA) != SCHEMA:
        raise bad_config(path, f"its schema is {str(about['schema'])[:20]}, and this radlads reads {SCHEMA}", "Update radlads")
    entries, model = read_header(contained(path, WEIGHTS)), about.get("model")
    model = model if isinstance(model, str) else None
    if kind in ("full", "state"):
        return Adapter(path, kind, entries, model=model)
    given = config.get("lora_parameters")
    rank, scale, dropout = checked_numbers(path, given if isinstance(given, dict) else {}, ("rank", "scale", "dropout"))
    return Adapter(path, kind, entries, rank, scale, dropout, model)


def read_peft(path: Path, config: Mapping[str, Any]) -> Adapter:
    """A LoRA or DoRA adapter in peft's format. Raises R201, R202, R204, R205 for what mlx-lm's format cannot say."""
    odd = [key for key, plain in PEFT_PLAIN.items() if config.get(key) not in plain]
    if config["peft_type"] != "LORA" or odd:
        why = f"{odd[0]} is set" if odd else f"peft_type {str(config['peft_type'])[:40]!r} is not LORA"
        raise fail("R205", where=path / CONFIG, why=why, fix="Use plain LoRA or DoRA of one rank, or merge it with peft")
    rank, alpha, dropout = checked_numbers(path, config, ("r", "lora_alpha", "lora_dropout"))
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    names = {ending: part for part, ending in PEFT_PARTS.items()}
    entries = {}
    for name, entry in read_header(contained(path, PEFT_WEIGHTS)).items():
        found = re.fullmatch(r"(?:base_model\.model\.)?(.+?)\.(lora_[AB]\.weight|lora_magnitude_vector)", name)
        if found is None:
            raise fail("R205", where=path, why=f"{name} is no part of a LoRA adapter", fix="Use plain LoRA or DoRA")
        entries[f"{found[1]}.{names[found[2]]}"] = entry
    return Adapter(path, "dora" if config.get("use_dora") else "lora", entries, rank, scale, dropout, from_peft=True)


def checked_numbers(path: Path, given: Mapping[str, Any], names: tuple[str, str, str]) -> tuple[int, float, float]:
    """Rank, scale (or alpha) and dropout under these names; R204 unless they are numbers that can be used."""
    rank, scale, dropout = given.get(names[0]), given.get(names[1]), given.get(names[2]) or 0.0
    whole = isinstance(rank, int) and not isinstance(rank, bool) and 0 < rank < 2**16
    reals = all(isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e9 for x in (scale, dropout))
    if not whole or not reals or not 0 <= dropout < 1:
        raise bad_config(path, f"{', '.join(names)}: one is missing or no usable number")
    return int(given[names[0]]), float(given[names[1]]), float(dropout)


def bad_config(path: Path, why: str, fix: str = "Get the adapter again from its source") -> RadladsError:
    """R204 at the config of an adapter."""
    return fail("R204", where=path / CONFIG, why=why, fix=fix)


def is_adapter(path: str | Path) -> bool:
    """Whether a path looks like the folder of an adapter, and not like that of a model."""
    return (Path(path) / CONFIG).is_file() and not (Path(path) / "config.json").exists()


def base_of(path: str | Path) -> str | None:
    """The model that an adapter's config names."""
    config = read_config(Path(path))
    found = [config.get(key) for key in ("model", "base_model_name_or_path")]
    return next((name for name in found if isinstance(name, str) and name), None)


def write_adapter(
    path: Path,
    tensors: Mapping[str, Array],
    settings: Settings,
    spec: ModelSpec,
    *,
    fingerprint: str | None,
    dtype: str = "F32",
    number: str | None = None,
    **told: Any,
) -> None:
    """Write an adapter in mlx-lm's format, each file atomically; `told` goes into the config.

    `fingerprint` is that of its model; with a `number` the weights are also written under a name that begins with it.
    Raises R401 or R402.
    """
    if number is not None:
        write_tensors(path / f"{number}{WEIGHTS}", tensors, dtype)
    write_tensors(path / WEIGHTS, tensors, dtype)
    stored = read_header(path / WEIGHTS)
    config: dict[str, Any] = {**told, "fine_tune_type": settings.kind}
    if settings.kind in ("lora", "dora"):
        layers = [int(name.split(".")[2]) for name in tensors]
        keys = sorted({name.rpartition(".")[0].split(".", 3)[3] for name in tensors})
        config["num_layers"] = spec.L - min(layers)
        config["lora_parameters"] = {
            "rank": settings.rank, "scale": settings.scale, "dropout": settings.dropout, "keys": keys,
        }  # fmt: skip
    origin = {} if fingerprint is None else {"model": fingerprint}
    config["radlads"] = {"schema": SCHEMA, **origin, "sha256": Adapter(path, settings.kind, stored).content_hash()}
    write_file(path / CONFIG, to_json(config))


def write_peft(path: Path, tensors: Mapping[str, Array], settings: Settings, base: str) -> None:
    """Write a lora or dora as a folder that stock peft loads; the inverse of how it is read. Raises R101, R401, R402."""
    if settings.kind not in ("lora", "dora"):
        why = f"peft has no adapter of the kind {settings.kind!r}"
        raise fail("R101", where=path, why=why, fix="Keep it in this format; radlads uses it on both backends")
    renamed = {}
    for name, x in tensors.items():
        module, _, part = name.rpartition(".")
        renamed[f"{PEFT_PREFIX}{module}.{PEFT_PARTS[part]}"] = np.ascontiguousarray(x.T)
    write_tensors(path / PEFT_WEIGHTS, renamed, "F32", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.scale * settings.rank,
        "lora_dropout": settings.dropout,
        "use_dora": settings.kind == "dora",
        "target_modules": sorted({name.rpartition(".")[0] for name in tensors}),
        "bias": "none",
        "inference_mode": True,
    }
    write_file(path / CONFIG, to_json(config))


def write_tensors(path: Path, tensors: Mapping[str, Array], dtype: str, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of float32 arrays, stored as `dtype`."""
    plan = {name: (dtype, x.shape) for name, x in tensors.items()}
    write_weights(path, ((name, dtype, encode(x, dtype)) for name, x in tensors.items()), plan, metadata or {"format": "mlx"})


def content_hash(tensors: Iterable[tuple[str, Array]]) -> str:
    """SHA-256 of tensors in the order of their names, each with its name and shape, as float32 in mlx-lm's orientation."""
    found = hashlib.sha256()
    for name, x in tensors:
        found.update(f"{name} {x.shape}".encode())
        found.update(np.ascontiguousarray(x, np.float32).tobytes())
    return found.hexdigest()
