"""RAD-RWKV7, equations 7.1-7.9 of docs/mixers.md."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from radlads.backends.mlx.kernels import zero_state
from radlads.backends.mlx.kernels.step import fused_step7
from radlads.backends.mlx.kernels.wkv7 import wkv7
from radlads.backends.mlx.layers import (
    RWKV7_MIN_LOG_W,
    WKV,
    HeadNorm,
    RecurrentProjections,
    advance_cache,
    declare,
    declare_gate,
    gate_of,
    gated,
    is_step,
    real_only,
    unit_keys,
)
from radlads.spec import ModelSpec


class Rwkv7Mixer(RecurrentProjections):
    """Generalised delta rule with value residual; its cache is mlx_lm's ArraysCache of wkv and tokens seen."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__(spec)
        D, C, ranks = spec.D, spec.C, spec.ranks
        declare(self, w0=(1, 1, C), w1=(D, ranks.decay), w2=(ranks.decay, C))
        declare(self, a0=(1, 1, C), a1=(D, ranks.iclr), a2=(ranks.iclr, C))
        declare(self, v0=(1, 1, C), v1=(D, ranks.value_residual), v2=(ranks.value_residual, C))
        declare_gate(self, spec)
        declare(self, k_k=(1, 1, C), k_a=(1, 1, C), r_k=(spec.H, spec.N))
        if spec.mixer.groupnorm:
            self.ln_x = HeadNorm(spec)

    def __call__(self, x: mx.array, mask: mx.array | None, cache: Any, carry: Any) -> tuple[mx.array, Any]:
        """x (B, T, D) to the output (B, T, D) and the first recurrent layer's values (B, T, H, N).

        mask (B, T) is False on padding, None without; `carry` is None in the first recurrent layer.
        """
        r, k, v = self.project_rotated(x, x, x, cache)  # 7.1
        d = (2 * self.w0 if self.spec.mixer.variant == "A" else self.w0) + mx.tanh(x @ self.w1) @ self.w2
        rate = self.a0 + x @ self.a1 @ self.a2
        residual = None if carry is None else (carry, self.v0 + x @ self.v1 @ self.v2)  # 7.5
        gate = gate_of(self, self.spec, x)
        form = self.step if is_step(self, x, cache) else self.sequence
        p, state, carry = form(r, k, v, d, rate, residual, gate, mask, None if cache is None else cache[WKV])
        out = self.output_of(p.astype(x.dtype))
        if cache is not None:
            cache[WKV] = state
            out = advance_cache(cache, mask, out)
        return out, carry

    def sequence(
        self, r: mx.array, k: mx.array, v: mx.array, d: mx.array, rate: mx.array, residual: Any, gate: Any, mask: Any, state: Any
    ) -> tuple[mx.array, mx.array, mx.array]:
        """7.2-7.9 up to the output projection: p (B, T, C), the last state, and the first recurrent layer's values."""
        opts = self.spec.mixer
        k, v = self.repeated(k), self.repeated(v)
        log_w = RWKV7_MIN_LOG_W * mx.sigmoid(self.heads(d).astype(mx.float32))  # 7.2
        a = self.heads(mx.sigmoid(rate.astype(mx.float32)))  # 7.3
        if opts.variant == "C":  # 7.4
            kappa = unit_keys(k)
            beta = kappa * a
            k = k * (a - mx.expm1(log_w))  # 1 - w + a
        else:
            kappa = unit_keys(k * self.heads(self.k_k))
            key_scale = 1 + (a - 1) * self.heads(self.k_a)
            beta = kappa * (key_scale if opts.variant == "A" else a)
            k = k * key_scale
        carry = v if residual is None else residual[0]  # 7.5
        if residual is not None:
            v = v + (carry - v) * self.heads(mx.sigmoid(residual[1]))
        k, v, kappa, log_w = real_only(mask, k, v, kappa, log_w)
        scale = 1.0 if opts.groupnorm else self.spec.N**-0.5  # 7.8
        p, state = wkv7(r, log_w, k, v, -kappa, beta, state, scale=scale, min_log_w=RWKV7_MIN_LOG_W)  # 7.6, 7.7
        p = self.ln_x(p) if opts.groupnorm else p.flatten(2)
        return gated(self.spec, p, gate), state, carry  # 7.9

    def step(
        self, r: mx.array, k: mx.array, v: mx.array, d: mx.array, rate: mx.array, residual: Any, gate: Any, mask: Any, state: Any
    ) -> tuple[mx.array, mx.array, mx.array]:
        """`sequence` for one token on a GPU, as one kernel."""
        norm = (self.ln_x.weight, self.ln_x.bias) if self.spec.mixer.groupnorm else None
        state = zero_state(r) if state is None else state
        keys = (self.k_k, self.k_a)
        p, state = fused_step7(r, k, v, d, rate, keys, residual, gate, norm, mask, state, self.spec.mixer, RWKV7_MIN_LOG_W)
        return p, state, self.repeated(v) if residual is None else residual[0]

    def make_cache(self) -> ArraysCache:
        """An empty cache for this layer."""
        return ArraysCache(2)
