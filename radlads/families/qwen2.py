"""Qwen2 and Qwen2.5 (QwQ too): biases on q, k and v, none on o."""

from typing import Any

from radlads.families.keys import build_spec, read_common, write_common
from radlads.spec import ModelSpec

FAMILY = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"


def read(config: dict[str, Any]) -> ModelSpec:
    """ModelSpec of a Qwen2 config."""
    return build_spec({**read_common(config, FAMILY), "qkv_bias": True})


def write(spec: ModelSpec) -> dict[str, Any]:
    """Qwen2 config of a teacher."""
    return {"architectures": [ARCHITECTURE], "model_type": FAMILY, **write_common(spec), "use_sliding_window": False}
