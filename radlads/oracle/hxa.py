"""Equations H.1-H.11 in float64, one token at a time."""

from typing import Any

import numpy as np

from radlads.oracle.parts import Array, Weights, heads, linear, project, repeat_heads, sigmoid
from radlads.oracle.rwkv7 import wkv7_oracle
from radlads.spec import ModelSpec


def hxa_oracle(weights: Weights, spec: ModelSpec, x: Array, state: dict[str, Any], carry: dict[str, Array], start: int) -> Array:
    """x (T, D) to (T, D) for any of the four; `carry` holds the first recurrent layer's k and v (T, Hkv, N) of hxa079."""
    kind, rope = spec.recurrent, spec.mixer.rope
    r = project(weights, spec, "receptance", x, rope=rope, start=start)  # H.1
    k = project(weights, spec, "key", x, rope=rope, start=start)
    v = heads(linear(weights, "value", x), spec)
    d = weights["w0"][0] + np.tanh(x @ weights["w1"]) @ weights["w2"]
    L = heads(-0.5 - np.logaddexp(0, -d), spec)  # H.2
    w = np.exp(-np.exp(L))
    a = heads(sigmoid(weights["a0"][0] + x @ weights["a1"] @ weights["a2"]), spec)  # H.3
    if kind == "hxa079" and "v_first" in carry:  # H.4
        v = v + (carry["v_first"] - v) * heads(sigmoid(weights["v0"][0] + x @ weights["v1"] @ weights["v2"]), spec)
        k = k + (carry["k_first"] - k) * heads(sigmoid(weights["k0"][0] + x @ weights["k1"] @ weights["k2"]), spec)
    elif kind == "hxa079":
        carry.update(v_first=v, k_first=k)
    k, v = repeat_heads(k, spec), repeat_heads(v, spec)  # H.5
    if kind in ("hxa07b", "hxa07c"):
        v = v + 0.2 * heads(x @ weights["v1"] @ weights["v2"], spec)
    kappa = k / np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), 1e-12)  # H.6
    k = k * (1 - (w if kind == "hxa07c" else L) + a)  # H.7
    zero = np.zeros((spec.H, spec.N, spec.N))
    p, state["wkv"] = wkv7_oracle(r, np.log(w), k, v, -kappa, kappa * a, state.get("wkv", zero), spec.N**-0.5)  # H.8, H.9
    if kind == "hxa079":  # H.10
        p = p + (r * k * weights["r_k"]).sum(-1, keepdims=True) * v
    return linear(weights, "output", p.reshape(len(x), -1) * (sigmoid(x @ weights["g1"]) @ weights["g2"]))  # H.11
