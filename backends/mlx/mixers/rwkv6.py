"""RAD-RWKV6, equations 6.1-6.8 of docs/mixers.md."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from radlads.backends.mlx.kernels import zero_state
from radlads.backends.mlx.kernels.step import fused_step6
from radlads.backends.mlx.kernels.wkv6 import wkv6
from radlads.backends.mlx.layers import (
    SHIFT,
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
)
from radlads.spec import ModelSpec


class Rwkv6Mixer(RecurrentProjections):
    """Token shift, vector decay, output gate; its cache is mlx_lm's ArraysCache of wkv, tokens seen and shift."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__(spec)
        D, C, ranks = spec.D, spec.C, spec.ranks
        if spec.mixer.token_shift:
            declare(self, time_maa_x=(1, 1, D), **{f"time_maa_{slot}": (1, 1, D) for slot in "rkvwg"})
            declare(self, time_maa_w1=(D, 5 * ranks.tokenshift), time_maa_w2=(5, ranks.tokenshift, D))
        declare(self, time_decay=(1, 1, C), time_decay_w1=(D, ranks.decay), time_decay_w2=(ranks.decay, C))
        declare_gate(self, spec)
        if spec.mixer.groupnorm:
            self.ln_x = HeadNorm(spec)

    def __call__(self, x: mx.array, mask: mx.array | None, cache: Any, carry: Any) -> tuple[mx.array, Any]:
        """x (B, T, D) to the output (B, T, D); mask (B, T) is False on padding, None without; `carry` passes by."""
        (x,) = real_only(mask, x)
        x_r = x_k = x_v = x_w = x_g = x
        if self.spec.mixer.token_shift:
            x_r, x_k, x_v, x_w, x_g = self.shifted(x, self.previous(x, cache))
        q, k, v = self.project_rotated(x_r, x_k, x_v, cache)  # 6.3
        d = self.time_decay + mx.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2
        gate = gate_of(self, self.spec, x_g)
        form = self.step if is_step(self, x, cache) else self.sequence
        p, state = form(q, k, v, d, gate, mask, None if cache is None else cache[WKV])
        out = self.output_of(p.astype(x.dtype))
        if cache is not None:
            cache[WKV] = state
            out = advance_cache(cache, mask, out)
        return out, carry

    def sequence(
        self, q: mx.array, k: mx.array, v: mx.array, d: mx.array, gate: Any, mask: Any, state: Any
    ) -> tuple[mx.array, mx.array]:
        """6.4-6.8 up to the output projection: p (B, T, C) and the last state."""
        opts = self.spec.mixer
        k, v = self.repeated(k), self.repeated(v)
        log_w = -mx.exp(self.heads(d).astype(mx.float32))  # 6.4
        if opts.clamp is not None:
            log_w = mx.maximum(log_w, opts.clamp)
        if opts.balance:
            k = k * -mx.expm1(log_w)  # 6.5: 1 - w without cancellation
        k, v, log_w = real_only(mask, k, v, log_w)
        p, state = wkv6(q, k, v, log_w, state, scale=self.spec.N**-0.5, min_log_w=opts.clamp)  # 6.6, 6.7
        p = self.ln_x(p) if opts.groupnorm else p.flatten(2)
        return gated(self.spec, p, gate), state  # 6.8

    def step(
        self, q: mx.array, k: mx.array, v: mx.array, d: mx.array, gate: Any, mask: Any, state: Any
    ) -> tuple[mx.array, mx.array]:
        """`sequence` for one token on a GPU, as one kernel."""
        norm = (self.ln_x.weight, self.ln_x.bias) if self.spec.mixer.groupnorm else None
        state = zero_state(q) if state is None else state
        return fused_step6(q, k, v, d, gate, norm, mask, state, self.spec.mixer)

    def previous(self, x: mx.array, cache: Any) -> mx.array:
        """x (B, T, D) one token earlier, zeros before the first; stores the last real token in the cache."""
        stored = mx.zeros_like(x[:, :1]) if cache is None or cache[SHIFT] is None else cache[SHIFT].astype(x.dtype)
        longer = mx.concatenate([stored, x], axis=1)
        if cache is not None and cache.lengths is None:
            cache[SHIFT] = mx.contiguous(longer[:, -1:])
        elif cache is not None:
            ends = mx.clip(cache.lengths, 0, x.shape[1])
            cache[SHIFT] = mx.take_along_axis(longer, ends[:, None, None], axis=1)
        return longer[:, :-1]

    def shifted(self, x: mx.array, previous: mx.array) -> tuple[mx.array, ...]:
        """6.1, 6.2: five mixes of x and the previous token, both (B, T, D), in the order r, k, v, w, g."""
        delta = previous - x
        slots = mx.tanh((x + delta * self.time_maa_x) @ self.time_maa_w1).reshape(*x.shape[:2], 5, -1)
        mixes = slots.transpose(2, 0, 1, 3) @ self.time_maa_w2[:, None]  # (5, B, T, D)
        bases = (self.time_maa_r, self.time_maa_k, self.time_maa_v, self.time_maa_w, self.time_maa_g)
        return tuple(x + delta * (base + mix) for base, mix in zip(bases, mixes, strict=True))

    def make_cache(self) -> ArraysCache:
        """An empty cache for this layer."""
        return ArraysCache(3 if self.spec.mixer.token_shift else 2)
