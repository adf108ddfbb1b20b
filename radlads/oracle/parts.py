"""The pieces every oracle mixer shares, in float64 numpy, written for reading."""

import numpy as np
import numpy.typing as npt

from radlads.positions import inverse_frequencies, rope_amplitude, rope_length
from radlads.spec import ModelSpec

Array = npt.NDArray[np.float64]
Weights = dict[str, Array]


def linear(weights: Weights, name: str, x: Array) -> Array:
    """W x + b of the projection `name`."""
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * weight


def group_norm(p: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Normalise each head of p (T, H, N); affine over C = H*N. Returns (T, C)."""
    centred = p - p.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed.reshape(len(p), -1) * weight + bias


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def rotate(x: Array, spec: ModelSpec, start: int) -> Array:
    """S.3: rotary positions on x (T, heads, N), the first row at position `start`."""
    frequencies = inverse_frequencies(spec, rope_length(spec, start + len(x)))
    angles = np.outer(np.arange(start, start + len(x)), frequencies)[:, None, :]
    first, second = np.split(x, 2, axis=-1)
    cos, sin = rope_amplitude(spec) * np.cos(angles), rope_amplitude(spec) * np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def heads(x: Array, spec: ModelSpec) -> Array:
    """(T, heads*N) to (T, heads, N)."""
    return x.reshape(len(x), -1, spec.N)


def repeat_heads(x: Array, spec: ModelSpec) -> Array:
    """S.4: (T, Hkv, N) to (T, H, N)."""
    return np.repeat(x, spec.H // spec.Hkv, axis=1)


def project(weights: Weights, spec: ModelSpec, name: str, x: Array, *, rope: bool, start: int) -> Array:
    """S.1-S.3, H.1 for the query or key projection `name`: (T, D) to (T, heads, N)."""
    y = heads(linear(weights, name, x), spec)
    norm = name[0] + "_norm.weight"
    if spec.qk_norm:
        y = rms_norm(y, weights[norm], spec.rms_norm_eps)
    return rotate(y, spec, start) if rope else y


def gate(weights: Weights, spec: ModelSpec, x: Array) -> Array | float:
    """6.3, 7.3: the output gate (T, C)."""
    if spec.mixer.gate == "full":
        return sigmoid(x @ weights["gate.weight"].T)
    if spec.mixer.gate == "lowrank":
        return sigmoid(x @ weights["g1"]) @ weights["g2"]
    return 1.0
