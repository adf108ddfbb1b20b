"""Seed-OSS: biases on q, k and v; heads that together are wider than the model."""

from typing import Any

from radlads.families.keys import build_spec, flag, read_common, write_common
from radlads.spec import ModelSpec

FAMILY = "seed_oss"
ARCHITECTURE = "SeedOssForCausalLM"


def read(config: dict[str, Any]) -> ModelSpec:
    """ModelSpec of a Seed-OSS config."""
    biases = {
        "qkv_bias": flag(config, "attention_bias", True),
        "output_bias": flag(config, "attention_out_bias", False),
        "mlp_bias": flag(config, "mlp_bias", False),
    }
    return build_spec({**read_common(config, FAMILY, head_dim=128, kv_heads=8), **biases})


def write(spec: ModelSpec) -> dict[str, Any]:
    """Seed-OSS config of a teacher. Dropout is written out: the library's default is not zero."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": FAMILY,
        **write_common(spec),
        "attention_bias": spec.qkv_bias,
        "attention_out_bias": spec.output_bias,
        "mlp_bias": spec.mlp_bias,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    }
