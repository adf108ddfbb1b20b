"""Qwen3: RMSNorm on each head of q and k, no biases unless `attention_bias` says so (then on all four)."""

from typing import Any

from radlads.families.keys import build_spec, flag, read_common, write_common
from radlads.spec import ModelSpec

FAMILY = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"


def read(config: dict[str, Any]) -> ModelSpec:
    """ModelSpec of a Qwen3 config."""
    bias = flag(config, "attention_bias", False)
    common = read_common(config, FAMILY, head_dim=128)
    return build_spec({**common, "qkv_bias": bias, "output_bias": bias, "qk_norm": True})


def write(spec: ModelSpec) -> dict[str, Any]:
    """Qwen3 config of a teacher."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": FAMILY,
        **write_common(spec),
        "attention_bias": spec.qkv_bias,
        "use_sliding_window": False,
    }
