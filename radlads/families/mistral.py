"""Mistral: no biases; attention over the whole context only, so no sliding window that could be felt."""

from typing import Any

from radlads.families.keys import build_spec, read_common, unsupported, write_common
from radlads.spec import ModelSpec

FAMILY = "mistral"
ARCHITECTURE = "MistralForCausalLM"
DEFAULT_WINDOW = 4096  # what transformers takes where the key is absent; null means none


def read(config: dict[str, Any]) -> ModelSpec:
    """ModelSpec of a Mistral config; R205 for a sliding window that is shorter than the context."""
    spec = build_spec(read_common(config, FAMILY, kv_heads=8))
    window = config.get("sliding_window", DEFAULT_WINDOW)
    if window is not None and not (isinstance(window, int) and window >= spec.max_positions):
        raise unsupported("sliding_window", f"a window of {window} tokens is not supported, only null or the whole context is")
    return spec


def write(spec: ModelSpec) -> dict[str, Any]:
    """Mistral config of a teacher."""
    return {"architectures": [ARCHITECTURE], "model_type": FAMILY, **write_common(spec), "sliding_window": None}
