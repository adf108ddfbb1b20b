"""First values of new tensors, seeded by the tensor's name, so that they depend on no order and no process.

The published trainer casts a module to bf16 before it fills it, so every value here is rounded to bf16 once.
"""

import hashlib
import re

import numpy as np
import numpy.typing as npt

from radlads.mixers.table import Row
from radlads.spec import ModelSpec

Array = npt.NDArray[np.float32]


def first_values(name: str, row: Row, spec: ModelSpec, seed: int) -> Array:
    """First values of the tensor `name` (float32 holding bf16 numbers), shape `row.shape`; protocol section 1.2."""
    rule, _, argument = row.init.partition(":")
    if rule == "zeros":
        return np.zeros(row.shape, np.float32)
    if rule == "const":
        return to_bf16(np.full(row.shape, float(argument)))
    if rule == "decay6":
        return to_bf16(decay6(layer_of(name), spec).reshape(row.shape))
    if rule == "decay7":
        # The published code rounds before and after it adds 0.5.
        return to_bf16(to_bf16(decay7(layer_of(name), spec)) + np.float32(0.5)).reshape(row.shape)
    if rule == "hxa_decay":
        return to_bf16(hxa_decay(layer_of(name), spec).reshape(row.shape))
    if rule == "hxa_iclr":
        return to_bf16(hxa_iclr(spec).reshape(row.shape))
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest(), np.uint32))
    if rule == "uniform":
        bound = float(argument)
        return to_bf16(rng.uniform(-bound, bound, row.shape).astype(np.float32))
    if rule == "orthogonal":
        return to_bf16(orthogonal(rng, row.shape, float(argument)))
    if rule == "normal":
        return (rng.standard_normal(row.shape) * float(argument)).astype(np.float32)
    raise ValueError(f"tensor {name} has no rule to fill it: {row.init!r}")


def layer_of(name: str) -> int:
    """Layer index in a full tensor name."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    if match is None:
        raise ValueError(f"no layer in tensor name {name!r}")
    return int(match[1])


def depth(layer: int, spec: ModelSpec) -> float:
    """rho = layer / (L - 1)."""
    return layer / max(1, spec.L - 1)


def decay6(layer: int, spec: ModelSpec) -> npt.NDArray[np.float64]:
    """RAD-RWKV6 `time_decay`: -6 + 5 (n/(C-1))^(0.7 + 1.3 rho)."""
    return -6 + 5 * (np.arange(spec.C) / (spec.C - 1)) ** (0.7 + 1.3 * depth(layer, spec))


def decay7(layer: int, spec: ModelSpec) -> npt.NDArray[np.float64]:
    """RAD-RWKV7 `w0` before the final +0.5: -7 + 5 (n/(C-1))^(0.85 + rho^0.5)."""
    return -7 + 5 * (np.arange(spec.C) / (spec.C - 1)) ** (0.85 + depth(layer, spec) ** 0.5)


def hxa_decay(layer: int, spec: ModelSpec) -> npt.NDArray[np.float64]:
    """hxa `w0`: -6 + 6 (n/(C-1))^(1 + rho^0.3) + 0.5 + 2.5 z."""
    ramp = (np.arange(spec.C) / (spec.C - 1)) ** (1 + depth(layer, spec) ** 0.3)
    return -6 + 6 * ramp + 0.5 + 2.5 * in_head(spec)


def hxa_iclr(spec: ModelSpec) -> npt.NDArray[np.float64]:
    """hxa `a0`: -0.19 + 0.3 z + 0.4 (n/(C-1) - 0.5)."""
    return -0.19 + 0.3 * in_head(spec) + 0.4 * (np.arange(spec.C) / (spec.C - 1) - 0.5)


def in_head(spec: ModelSpec) -> npt.NDArray[np.float64]:
    """z of the channels, sign(y) y^2 for y from -1 to 1 across each head."""
    y = (np.arange(spec.C) % spec.N - (spec.N - 1) / 2) / ((spec.N - 1) / 2)
    return y * np.abs(y)


def orthogonal(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Array:
    """Orthogonal (rows, cols) matrix times scale * sqrt(rows/cols) if rows > cols, else times scale."""
    rows, cols = shape
    gain = scale * (rows / cols) ** 0.5 if rows > cols else scale
    q, r = np.linalg.qr(rng.standard_normal((max(shape), min(shape))))
    q = q * np.sign(np.diag(r))
    return (gain * (q if rows >= cols else q.T)).astype(np.float32)


def to_bf16(values: npt.NDArray[np.floating]) -> Array:
    """Round to the nearest bfloat16, ties to even, kept as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)
