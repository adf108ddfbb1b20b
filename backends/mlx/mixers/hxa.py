"""hxa079, hxa07A, hxa07B and hxa07C, equations H.1-H.11 of docs/mixers.md."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from radlads.backends.mlx.kernels import zero_state
from radlads.backends.mlx.kernels.step import fused_step_hxa
from radlads.backends.mlx.kernels.wkv7 import wkv7
from radlads.backends.mlx.layers import (
    RWKV7_MIN_LOG_W,
    WKV,
    RecurrentProjections,
    advance_cache,
    declare,
    is_step,
    real_only,
    unit_keys,
)
from radlads.mixers.hxa import HXA_FORMS, HXA_NAMES
from radlads.spec import ModelSpec


class HxaMixer(RecurrentProjections):
    """Generalised delta rule with balanced keys; the four kinds differ by their HxaForm. Its cache is as RAD-RWKV7's."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__(spec, HXA_NAMES)
        self.form = HXA_FORMS[spec.mixers[layer]]
        D, C, Ckv, ranks = spec.D, spec.C, spec.Ckv, spec.ranks
        declare(self, w0=(1, 1, C), w1=(D, ranks.decay), w2=(ranks.decay, C))
        declare(self, a0=(1, 1, C), a1=(D, ranks.iclr), a2=(ranks.iclr, C))
        declare(self, g1=(D, ranks.gate), g2=(ranks.gate, C))
        if self.form.residual:
            declare(self, v0=(1, 1, Ckv), v1=(D, ranks.value_residual), v2=(ranks.value_residual, Ckv))
            declare(self, k0=(1, 1, Ckv), k1=(D, ranks.key_residual), k2=(ranks.key_residual, Ckv))
        if self.form.value_pair:
            declare(self, v1=(D, ranks.value_residual), v2=(ranks.value_residual, C))
        if self.form.bonus:
            declare(self, r_k=(spec.H, spec.N))

    def __call__(self, x: mx.array, mask: mx.array | None, cache: Any, carry: Any) -> tuple[mx.array, Any]:
        """x (B, T, D) to the output (B, T, D) and, for hxa079, the first recurrent layer's k and v (B, T, Hkv, N).

        mask (B, T) is False on padding, None without; `carry` is None in the first recurrent layer.
        """
        form = self.form
        r, k, v = self.project_rotated(x, x, x, cache)  # H.1
        d = self.w0 + mx.tanh(x @ self.w1) @ self.w2
        rate = self.a0 + x @ self.a1 @ self.a2
        gate = mx.sigmoid(x @ self.g1) @ self.g2
        if form.residual and carry is None:  # H.4
            carry = (k, v)
        elif form.residual:
            k = k + (carry[0] - k) * self.heads(mx.sigmoid(self.k0 + x @ self.k1 @ self.k2))
            v = v + (carry[1] - v) * self.heads(mx.sigmoid(self.v0 + x @ self.v1 @ self.v2))
        if form.value_pair:  # H.5
            v = self.repeated(v) + 0.2 * self.heads(x @ self.v1 @ self.v2)
        run = self.step if is_step(self, x, cache) else self.sequence
        p, state = run(r, k, v, d, rate, gate, mask, None if cache is None else cache[WKV])
        out = self.output_of(p.astype(x.dtype))  # H.11
        if cache is not None:
            cache[WKV] = state
            out = advance_cache(cache, mask, out)
        return out, carry

    def sequence(
        self, r: mx.array, k: mx.array, v: mx.array, d: mx.array, rate: mx.array, gate: mx.array, mask: Any, state: Any
    ) -> tuple[mx.array, mx.array]:
        """H.2, H.3 and H.5-H.11 up to the output projection: p (B, T, C) and the last state."""
        form = self.form
        d = self.heads(d.astype(mx.float32))
        log_w = RWKV7_MIN_LOG_W * mx.sigmoid(d)  # H.2
        a = self.heads(mx.sigmoid(rate.astype(mx.float32)))  # H.3
        k, v = self.repeated(k), v if form.value_pair else self.repeated(v)  # H.5
        kappa = unit_keys(k)  # H.6
        factor = -mx.expm1(log_w) if form.true_decay else 1.5 + mx.logaddexp(-d, 0.0)  # H.7: 1 - w, or 1 - L
        k = k * (factor + a)
        beta = kappa * a
        bonus = (r * k * self.r_k).sum(axis=-1, keepdims=True) * v if form.bonus else None  # H.10
        k, v, kappa, log_w = real_only(mask, k, v, kappa, log_w)
        p, state = wkv7(r, log_w, k, v, -kappa, beta, state, scale=self.spec.N**-0.5, min_log_w=RWKV7_MIN_LOG_W)  # H.8, H.9
        p = (p if bonus is None else p + bonus).flatten(2)
        return p * gate, state

    def step(
        self, r: mx.array, k: mx.array, v: mx.array, d: mx.array, rate: mx.array, gate: mx.array, mask: Any, state: Any
    ) -> tuple[mx.array, mx.array]:
        """`sequence` for one token on a GPU, as one kernel."""
        state = zero_state(r) if state is None else state
        r_k = self.r_k if self.form.bonus else None
        return fused_step_hxa(r, k, v, d, rate, gate, r_k, mask, state, self.form.true_decay, RWKV7_MIN_LOG_W)

    def make_cache(self) -> ArraysCache:
        """An empty cache for this layer."""
        return ArraysCache(2)
