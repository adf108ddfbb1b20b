"""Llama 2 and 3.x: optional biases on all four projections and on the feed-forward."""

from typing import Any

from radlads.families.keys import build_spec, flag, read_common, write_common
from radlads.spec import ModelSpec

FAMILY = "llama"
ARCHITECTURE = "LlamaForCausalLM"


def read(config: dict[str, Any]) -> ModelSpec:
    """ModelSpec of a Llama config."""
    bias = flag(config, "attention_bias", False)
    extra = {"qkv_bias": bias, "output_bias": bias, "mlp_bias": flag(config, "mlp_bias", False)}
    return build_spec({**read_common(config, FAMILY), **extra})


def write(spec: ModelSpec) -> dict[str, Any]:
    """Llama config of a teacher."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": FAMILY,
        **write_common(spec),
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
    }
