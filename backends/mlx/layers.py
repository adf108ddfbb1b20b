"""What every mixer and layer shares: projections, rotary positions, feed-forward, gate, head norm, and the position kept
in a recurrent layer's cache.
"""

import math
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

from radlads.backends.mlx.kernels.gpu import has_kernels
from radlads.mixers.table import TEACHER_NAMES, ProjectionNames
from radlads.positions import inverse_frequencies, rope_amplitude, rope_depends_on_length, rope_length
from radlads.spec import ModelSpec

# Slots of the cache (mlx_lm's ArraysCache) of a recurrent layer.
WKV, SEEN, SHIFT = 0, 1, 2
# 7.2, H.2: no decay is stronger than exp(-exp(-1/2)) per token.
RWKV7_MIN_LOG_W = -math.exp(-0.5)


class FeedForward(nn.Module):
    """SwiGLU: W_down(SiLU(W_gate x) * W_up x)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.D, spec.F, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.D, spec.F, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.F, spec.D, bias=spec.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, D) to (B, T, D)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Projections(nn.Module):
    """q, k, v, o with the teacher's biases and per-head norms (S.1-S.3), under the teacher's names or others."""

    def __init__(self, spec: ModelSpec, names: ProjectionNames = TEACHER_NAMES) -> None:
        super().__init__()
        self.spec = spec
        self.names = names
        for name, width in ((names.q, spec.C), (names.k, spec.Ckv), (names.v, spec.Ckv)):
            setattr(self, name, nn.Linear(spec.D, width, bias=spec.qkv_bias))
        setattr(self, names.o, nn.Linear(spec.C, spec.D, bias=spec.output_bias))
        if spec.qk_norm:
            setattr(self, names.q_norm, nn.RMSNorm(spec.N, spec.rms_norm_eps))
            setattr(self, names.k_norm, nn.RMSNorm(spec.N, spec.rms_norm_eps))
        # The underscore keeps it out of the module's parameters.
        self._periods = (0, rope_periods(spec, 0))
        self._amplitude = rope_amplitude(spec)

    def project(self, x_q: mx.array, x_k: mx.array, x_v: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Inputs (B, T, D) to q (B, T, H, N) and k, v (B, T, Hkv, N), q and k normed where the teacher does."""
        names = self.names
        inputs = ((names.q, x_q), (names.k, x_k), (names.v, x_v))
        q, k, v = (getattr(self, name)(x).reshape(*x.shape[:2], -1, self.spec.N) for name, x in inputs)
        if self.spec.qk_norm:
            q, k = getattr(self, names.q_norm)(q), getattr(self, names.k_norm)(k)
        return q, k, v

    def output_of(self, p: mx.array) -> mx.array:
        """p (B, T, C) through the output projection (B, T, D)."""
        out: mx.array = getattr(self, self.names.o)(p)
        return out

    def rotate(self, x: mx.array, first: int | mx.array) -> mx.array:
        """S.3 on x (B, heads, T, N); `first` is the position of the first column, one number or one per row (B,)."""
        if rope_depends_on_length(self.spec):
            last = cast(int, first.max().item()) if isinstance(first, mx.array) else first
            length = rope_length(self.spec, last + x.shape[2])
            if length != self._periods[0]:
                self._periods = (length, rope_periods(self.spec, length))
        if self._amplitude != 1.0:
            x = x * self._amplitude
        return mx.fast.rope(x, self.spec.N, traditional=False, base=None, scale=1.0, offset=first, freqs=self._periods[1])


def rope_periods(spec: ModelSpec, length: int) -> mx.array:
    """What mx.fast.rope calls freqs: the inverse of each pair's frequency, (N / 2,) float32."""
    return mx.array([1 / frequency for frequency in inverse_frequencies(spec, length)], mx.float32)


class RecurrentProjections(Projections):
    """Projections of a recurrent mixer, whose cache also counts the tokens seen: rotary positions need them."""

    def project_rotated(self, x_q: mx.array, x_k: mx.array, x_v: mx.array, cache: Any) -> tuple[mx.array, mx.array, mx.array]:
        """Inputs (B, T, D) to q (B, T, H, N) and k, v (B, T, Hkv, N): S.1-S.3, S.3 only with the `rope` flag."""
        q, k, v = self.project(x_q, x_k, x_v)
        if self.spec.mixer.rope:
            first = tokens_seen(cache, len(x_q)) if cache is not None else 0
            if cache is not None and cache.left_padding is not None:
                first = first - mx.clip(cache.left_padding, 0, x_q.shape[1])
            q, k = (self.rotate(x.swapaxes(1, 2), first).swapaxes(1, 2) for x in (q, k))
        return q, k, v

    def repeated(self, x: mx.array) -> mx.array:
        """S.4: (B, T, Hkv, N) to (B, T, H, N)."""
        return mx.repeat(x, self.spec.H // self.spec.Hkv, axis=2)

    def heads(self, x: mx.array) -> mx.array:
        """(..., heads*N) to (..., heads, N)."""
        return x.reshape(*x.shape[:-1], -1, self.spec.N)


def unit_keys(k: mx.array) -> mx.array:
    """7.4, H.6: k (..., N) over its norm, at least 1e-12, in float32; the gradient of a zero key is finite."""
    k = k.astype(mx.float32)
    return k * mx.rsqrt(mx.maximum((k * k).sum(axis=-1, keepdims=True), 1e-24))


def tokens_seen(cache: Any, batch: int) -> mx.array:
    """Real tokens of each row so far, int32 (B,)."""
    return mx.zeros((batch,), mx.int32) if cache[SEEN] is None else cache[SEEN]


def advance_cache(cache: Any, mask: mx.array | None, out: mx.array) -> mx.array:
    """Count the real tokens of this call, whose output is `out` (B, T, D), and move the cache on; returns `out`.

    The counters hang on the output: no step of plain generation reads them all, and unread they would grow a graph.
    """
    batch, length = out.shape[:2]
    seen = tokens_seen(cache, batch)
    cache[SEEN] = seen + (length if mask is None else mask.astype(mx.int32).sum(axis=1))
    cache.advance(length)
    return mx.depends(out, [x for x in (cache[SEEN], cache.left_padding, cache.lengths) if x is not None])


def real_only(mask: mx.array | None, *arrays: mx.array) -> tuple[mx.array, ...]:
    """The arrays (B, T, ...) with zeros where mask (B, T) is False; None keeps all."""
    if mask is None:
        return arrays
    return tuple(mx.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, mx.zeros_like(x)) for x in arrays)


def declare(module: nn.Module, **shapes: tuple[int, ...]) -> None:
    """Give `module` a parameter of each name and shape; the values come from a file."""
    for name, shape in shapes.items():
        setattr(module, name, mx.zeros(shape))


def declare_gate(module: nn.Module, spec: ModelSpec) -> None:
    """Parameters of the output gate: `gate.weight` (full) or `g1`, `g2` (lowrank)."""
    if spec.mixer.gate == "full":
        module.gate = nn.Linear(spec.D, spec.C, bias=False)
    elif spec.mixer.gate == "lowrank":
        declare(module, g1=(spec.D, spec.ranks.gate), g2=(spec.ranks.gate, spec.C))


def gate_of(module: nn.Module, spec: ModelSpec, x: mx.array) -> mx.array | None:
    """The output gate of x (B, T, D), (B, T, C): the full one before its sigmoid, None without a gate."""
    gate: mx.array | None = None
    if spec.mixer.gate == "full":
        gate = module.gate(x)
    elif spec.mixer.gate == "lowrank":
        gate = mx.sigmoid(x @ module.g1) @ module.g2
    return gate


def gated(spec: ModelSpec, p: mx.array, gate: mx.array | None) -> mx.array:
    """6.8, 7.9: p (B, T, C) times its gate."""
    if gate is None:
        return p
    return p * (mx.sigmoid(gate) if spec.mixer.gate == "full" else gate)


def is_step(module: nn.Module, x: mx.array, cache: Any) -> bool:
    """Whether x (B, T, D) is one token of generation on a GPU that has our kernels: a whole step is then one kernel."""
    return x.shape[1] == 1 and cache is not None and not module.training and has_kernels(module.spec.N)


class HeadNorm(nn.Module):
    """GroupNorm over each head of N channels, eps N * 1e-5, with weight and bias over C."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.weight = mx.ones((spec.C,))
        self.bias = mx.zeros((spec.C,))

    def __call__(self, p: mx.array) -> mx.array:
        """(B, T, H, N) to (B, T, C)."""
        return mx.fast.layer_norm(p, None, None, self.spec.N * 1e-5).flatten(2) * self.weight + self.bias
