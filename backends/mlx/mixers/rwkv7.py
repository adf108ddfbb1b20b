"""RAD-RWKV7, equations 7.1-7.9 of docs/mixers.md."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from radlads.backends.mlx.kernels.wkv7 import wkv7
from radlads.backends.mlx.layers import (
    RWKV7_MIN_LOG_W,
    WKV,
    HeadNorm,
    RecurrentProjections,
    advance_cache,
    declare,
    declare_gate,
    gated,
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
        opts = self.spec.mixer
        r, k, v = self.project_heads(x, x, x, cache)  # 7.1
        w0 = 2 * self.w0 if opts.variant == "A" else self.w0
        d = w0 + mx.tanh(x @ self.w1) @ self.w2
        log_w = RWKV7_MIN_LOG_W * mx.sigmoid(self.heads(d).astype(mx.float32))  # 7.2
        a = self.heads(mx.sigmoid((self.a0 + x @ self.a1 @ self.a2).astype(mx.float32)))  # 7.3
        if opts.variant == "C":  # 7.4
            kappa = unit_keys(k)
            beta = kappa * a
            k = k * (a - mx.expm1(log_w))  # 1 - w + a
        else:
            kappa = unit_keys(k * self.heads(self.k_k))
            key_scale = 1 + (a - 1) * self.heads(self.k_a)
            beta = kappa * (key_scale if opts.variant == "A" else a)
            k = k * key_scale
        if carry is None:  # 7.5
            carry = v
        else:
            v = v + (carry - v) * self.heads(mx.sigmoid(self.v0 + x @ self.v1 @ self.v2))
        k, v, kappa, log_w = real_only(mask, k, v, kappa, log_w)
        state = None if cache is None else cache[WKV]
        scale = 1.0 if opts.groupnorm else self.spec.N**-0.5  # 7.8
        p, state = wkv7(r, log_w, k, v, -kappa, beta, state, scale=scale, min_log_w=RWKV7_MIN_LOG_W)  # 7.6, 7.7
        p = self.ln_x(p) if opts.groupnorm else p.flatten(2)
        out = self.output_of(gated(self, self.spec, p, x))  # 7.9
        if cache is not None:
            cache[WKV] = state
            out = advance_cache(cache, mask, out)
        return out, carry

    def make_cache(self) -> ArraysCache:
        """An empty cache for this layer."""
        return ArraysCache(2)
