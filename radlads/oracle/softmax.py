"""Equations S.1-S.5 in float64."""

from typing import Any

import numpy as np

from radlads.oracle.parts import Array, Weights, heads, linear, project, repeat_heads
from radlads.spec import ModelSpec


def softmax_oracle(
    weights: Weights, spec: ModelSpec, x: Array, state: dict[str, Any], carry: dict[str, Array], start: int
) -> Array:
    """x (T, D) to (T, D); keys and values of earlier calls are kept in `state`."""
    q = project(weights, spec, "q_proj", x, rope=spec.mixer.kept_rope, start=start)
    k = project(weights, spec, "k_proj", x, rope=spec.mixer.kept_rope, start=start)
    v = heads(linear(weights, "v_proj", x), spec)
    if "k" in state:
        k, v = np.concatenate([state["k"], k]), np.concatenate([state["v"], v])
    state.update(k=k, v=v)
    k, v = repeat_heads(k, spec), repeat_heads(v, spec)
    scores = np.einsum("thn,shn->hts", q, k) * spec.N**-0.5
    visible = np.arange(len(k))[None, :] <= start + np.arange(len(x))[:, None]
    scores = np.where(visible, scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    p = np.einsum("hts,shn->thn", scores / scores.sum(-1, keepdims=True), v)
    return linear(weights, "o_proj", p.reshape(len(x), -1))
