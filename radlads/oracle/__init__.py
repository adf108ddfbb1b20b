"""The whole model in float64 numpy: slow, plain, and independent of both backends, which are judged by it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from radlads.oracle.hxa import hxa_oracle
from radlads.oracle.parts import Array, Weights, linear, rms_norm, sigmoid
from radlads.oracle.rwkv6 import rwkv6_oracle
from radlads.oracle.rwkv7 import rwkv7_oracle
from radlads.oracle.softmax import softmax_oracle
from radlads.spec import ModelSpec

ORACLES = {
    "softmax": softmax_oracle,
    "rwkv6": rwkv6_oracle,
    "rwkv7": rwkv7_oracle,
    "hxa079": hxa_oracle,
    "hxa07a": hxa_oracle,
    "hxa07b": hxa_oracle,
    "hxa07c": hxa_oracle,
}


class OracleState:
    """What a sequence leaves behind: the position and each layer's arrays."""

    def __init__(self, spec: ModelSpec) -> None:
        self.position = 0
        self.layers: list[dict[str, Any]] = [{} for _ in range(spec.L)]


def oracle_logits(spec: ModelSpec, weights: Weights, tokens: npt.NDArray[np.integer], state: OracleState | None = None) -> Array:
    """Logits (T, V) of one sequence of token ids (T,), continuing from `state`, which is moved on in place."""
    state = state or OracleState(spec)
    x = weights["model.embed_tokens.weight"][tokens]
    carry: dict[str, Array] = {}
    for layer, mixer in enumerate(spec.mixers):
        local = _below(weights, f"model.layers.{layer}.")
        normed = rms_norm(x, local["input_layernorm.weight"], spec.rms_norm_eps)
        x = x + ORACLES[mixer](_below(local, "self_attn."), spec, normed, state.layers[layer], carry, state.position)
        normed = rms_norm(x, local["post_attention_layernorm.weight"], spec.rms_norm_eps)
        gate = linear(local, "mlp.gate_proj", normed)
        x = x + linear(local, "mlp.down_proj", gate * sigmoid(gate) * linear(local, "mlp.up_proj", normed))
    state.position += len(tokens)
    x = rms_norm(x, weights["model.norm.weight"], spec.rms_norm_eps)
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def _below(weights: Weights, prefix: str) -> Weights:
    return {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
