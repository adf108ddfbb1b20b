"""Equations 7.1-7.9 in float64, one token at a time."""

import math
from typing import Any

import numpy as np

from radlads.oracle.parts import Array, Weights, gate, group_norm, heads, linear, project, repeat_heads, sigmoid
from radlads.spec import ModelSpec


def wkv7_oracle(
    r: Array, log_w: Array, k: Array, v: Array, a: Array, b: Array, state: Array, scale: float = 1.0
) -> tuple[Array, Array]:
    """7.6-7.7 with a = -kappa, b = beta: all (T, H, N), state (H, N value, N key); returns p and the last state."""
    out = np.empty_like(v)
    for t in range(len(r)):
        removed = np.einsum("hvk,hk->hv", state, a[t])
        state = (
            state * np.exp(log_w[t])[:, None, :] + removed[:, :, None] * b[t][:, None, :] + v[t][:, :, None] * k[t][:, None, :]
        )
        out[t] = scale * np.einsum("hvk,hk->hv", state, r[t])
    return out, state


def rwkv7_oracle(
    weights: Weights, spec: ModelSpec, x: Array, state: dict[str, Any], carry: dict[str, Array], start: int
) -> Array:
    """x (T, D) to (T, D); `state` holds `wkv` (H, N, N), `carry` the first recurrent layer's values."""
    opts = spec.mixer
    r = project(weights, spec, "q_proj", x, rope=opts.rope, start=start)  # 7.1
    k = repeat_heads(project(weights, spec, "k_proj", x, rope=opts.rope, start=start), spec)
    v = repeat_heads(heads(linear(weights, "v_proj", x), spec), spec)
    w0 = weights["w0"][0] * (2 if opts.variant == "A" else 1)
    log_w = heads(-math.exp(-0.5) * sigmoid(w0 + np.tanh(x @ weights["w1"]) @ weights["w2"]), spec)  # 7.2
    a = heads(sigmoid(weights["a0"][0] + x @ weights["a1"] @ weights["a2"]), spec)  # 7.3
    key_scale = 1 + (a - 1) * weights["k_a"].reshape(spec.H, spec.N)
    kappa = k if opts.variant == "C" else k * weights["k_k"].reshape(spec.H, spec.N)  # 7.4
    kappa = kappa / np.maximum(np.linalg.norm(kappa, axis=-1, keepdims=True), 1e-12)
    beta = kappa * (key_scale if opts.variant == "A" else a)
    k = k * (1 - np.exp(log_w) + a if opts.variant == "C" else key_scale)
    if "v_first" in carry:  # 7.5
        mix = heads(sigmoid(weights["v0"][0] + x @ weights["v1"] @ weights["v2"]), spec)
        v = v + (carry["v_first"] - v) * mix
    else:
        carry["v_first"] = v
    zero = np.zeros((spec.H, spec.N, spec.N))
    p, state["wkv"] = wkv7_oracle(r, log_w, k, v, -kappa, beta, state.get("wkv", zero))  # 7.6, 7.7
    if opts.groupnorm:  # 7.8
        flat = group_norm(p, weights["ln_x.weight"], weights["ln_x.bias"], spec.N * 1e-5)
    else:
        flat = p.reshape(len(x), -1) * spec.N**-0.5
    return linear(weights, "o_proj", flat * gate(weights, spec, x))  # 7.9
