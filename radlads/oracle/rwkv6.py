"""Equations 6.1-6.8 in float64, one token at a time."""

from typing import Any

import numpy as np

from radlads.oracle.parts import Array, Weights, gate, group_norm, heads, linear, project, repeat_heads
from radlads.spec import ModelSpec


def wkv6_oracle(q: Array, k: Array, v: Array, log_w: Array, state: Array, scale: float) -> tuple[Array, Array]:
    """6.6-6.7: q, k, v, log_w (T, H, N), state (H, N value, N key); returns p (T, H, N) and the last state."""
    out = np.empty_like(v)
    for t in range(len(q)):
        state = state * np.exp(log_w[t])[:, None, :] + v[t][:, :, None] * k[t][:, None, :]
        out[t] = scale * np.einsum("hvk,hk->hv", state, q[t])
    return out, state


def rwkv6_oracle(
    weights: Weights, spec: ModelSpec, x: Array, state: dict[str, Any], carry: dict[str, Array], start: int
) -> Array:
    """x (T, D) to (T, D); `state` holds `wkv` (H, N, N) and `shift` (1, D)."""
    mixed = dict.fromkeys("rkvwg", x)
    if spec.mixer.token_shift:
        previous = np.concatenate([state.get("shift", np.zeros((1, spec.D))), x])[: len(x)]
        delta = previous - x
        u = x + delta * weights["time_maa_x"][0]  # 6.1
        slots = np.tanh(u @ weights["time_maa_w1"]).reshape(len(x), 5, -1)
        for i, slot in enumerate("rkvwg"):
            mixed[slot] = x + delta * (weights[f"time_maa_{slot}"][0] + slots[:, i] @ weights["time_maa_w2"][i])  # 6.2
        state["shift"] = x[-1:]
    q = project(weights, spec, "q_proj", mixed["r"], rope=spec.mixer.rope, start=start)  # 6.3
    k = repeat_heads(project(weights, spec, "k_proj", mixed["k"], rope=spec.mixer.rope, start=start), spec)
    v = repeat_heads(heads(linear(weights, "v_proj", mixed["v"]), spec), spec)
    d = weights["time_decay"][0] + np.tanh(mixed["w"] @ weights["time_decay_w1"]) @ weights["time_decay_w2"]
    log_w = heads(-np.exp(d), spec)  # 6.4
    if spec.mixer.clamp is not None:
        log_w = np.maximum(log_w, spec.mixer.clamp)
    if spec.mixer.balance:
        k = k * (1 - np.exp(log_w))  # 6.5
    zero = np.zeros((spec.H, spec.N, spec.N))
    p, state["wkv"] = wkv6_oracle(q, k, v, log_w, state.get("wkv", zero), spec.N**-0.5)  # 6.6, 6.7
    flat = p.reshape(len(x), -1)
    if spec.mixer.groupnorm:
        flat = group_norm(p, weights["ln_x.weight"], weights["ln_x.bias"], spec.N * 1e-5)
    return linear(weights, "o_proj", flat * gate(weights, spec, mixed["g"]))  # 6.8
