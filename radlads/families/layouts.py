"""config.json of the published layouts, written for models that they can hold. `published.py` reads them and is the judge: a
layout holds a model if what is written here is read as that very model.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from radlads.errors import RadladsError
from radlads.families.keys import write_common
from radlads.families.published import PUBLISHED, detect
from radlads.quantised import KEYS
from radlads.spec import ModelSpec

GATES = {"none": 0, "full": 1, "lowrank": 2}  # gate_rank_type
NAMES = {
    "rwkv6qwen2": "RWKV6Qwen2",
    "rwkv7qwen2": "RWKV7Qwen2",
    "rwkv7qwen3": "RWKV7Qwen3",
    "rwkv079qwen3": "RWKV079Qwen3",
}  # the classes of the authors' model code


def write_layout(spec: ModelSpec, layout: str, old: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(config, reasons why the layout cannot hold the model). Without reasons `detect` gives `spec` back from the config.

    `old` is the model's config as it was read: where it is of this layout its other keys stay.
    """
    name = NAMES[layout]
    written = {
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_{layout}.{name}Config",
            "AutoModelForCausalLM": f"modeling_{layout}.{name}ForCausalLM",
        },
        "model_type": layout,
        **write_common(spec),
        "rope_scaling": spec.rope_scaling,
        "use_sliding_window": False,
        "attention_bias": spec.qkv_bias,
        **ranks(spec),
        **FLAGS[layout](spec),
    }
    kept = {key: value for key, value in old.items() if old.get("model_type") == layout and key not in KEYS}
    config = {**kept, **written, **{key: kept[key] for key in ("base_model",) if key in kept}}
    return config, misread(spec, config) + unknown(spec, layout)


def ranks(spec: ModelSpec) -> dict[str, Any]:
    """The widths of the low-rank pairs under their published keys."""
    widths = {name: width for name, width in asdict(spec.ranks).items() if width}
    return {f"lora_rank_{name}{'_mix' if name.endswith('residual') else ''}": width for name, width in widths.items()}


def flags_of_rad(spec: ModelSpec) -> dict[str, Any]:
    """What the RAD layouts say of their mixer."""
    balanced = spec.mixer.variant == "C" if spec.recurrent == "rwkv7" else spec.mixer.balance
    return {
        "attention_output_bias": spec.output_bias,
        "balance_state": balanced,
        "groupnorm_att": spec.mixer.groupnorm,
        "use_tokenshift": spec.mixer.token_shift,
        "use_rope": spec.mixer.rope,
        "gate_rank_type": GATES[spec.mixer.gate],
        **({} if spec.recurrent == "rwkv6" else {"num_attention_layers": len(spec.kept_layers)}),
    }


def flags_of_hxa(spec: ModelSpec) -> dict[str, Any]:
    """What the hxa layout says of its layers."""
    return {
        "attention_out_bias": spec.output_bias,
        "mlp_bias": spec.mlp_bias,
        "transformer_layers": list(spec.kept_layers),
        "rwkv_layers": [layer for layer in range(spec.L) if layer not in spec.kept_layers],
        "rwkv_architecture": spec.recurrent,
        "enable_qk_norm": spec.qk_norm,
        "nope_in_transformer": not spec.mixer.kept_rope,
        "nope_in_rwkv": not spec.mixer.rope,
        "use_rope": True,
        **({"base_model": "Seed-OSS"} if spec.family == "seed_oss" else {}),
    }


FLAGS: dict[str, Callable[[ModelSpec], dict[str, Any]]] = {
    **dict.fromkeys(PUBLISHED, flags_of_rad),
    "rwkv079qwen3": flags_of_hxa,
}


def misread(spec: ModelSpec, config: dict[str, Any]) -> list[str]:
    """The fields in which the model that the config and the tensors describe differs from `spec`."""
    try:
        found = detect({name: row.shape for name, row in spec.tensors().items()}, config).spec
    except RadladsError as error:
        return [error.why]
    here, there = (flat(asdict(each)) for each in (spec, found))
    return [f"{name} {value} would be read as {there[name]}" for name, value in here.items() if value != there[name]]


def flat(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a spec with those of its tables beside them, as "mixer.rope"."""
    inner = {f"{name}.{key}": value for name in ("mixer", "ranks") for key, value in fields[name].items()}
    return {**{name: value for name, value in fields.items() if name not in ("mixer", "ranks")}, **inner}


def unknown(spec: ModelSpec, layout: str) -> list[str]:
    """What this reader would take and the authors' model code has no place for."""
    hxa, qwen2 = layout == "rwkv079qwen3", layout.endswith("qwen2")
    faults = {
        "it is for hxa layers": hxa and not str(spec.recurrent).startswith("hxa"),
        "it keeps no softmax layers": layout == "rwkv6qwen2" and bool(spec.kept_layers),
        "its heads together are as wide as the model": qwen2 and spec.C != spec.D,
        "it has no norms of q and k": qwen2 and spec.qk_norm,
        "it has norms of q and k": layout == "rwkv7qwen3" and not spec.qk_norm,
        "one flag is for the biases of all four projections": layout == "rwkv7qwen3" and spec.qkv_bias != spec.output_bias,
        "it has no biases in the feed-forward layers": not hxa and spec.mlp_bias,
    }
    return [reason for reason, true in faults.items() if true]
