"""Softmax attention, equations S.1-S.5 of docs/mixers.md."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from radlads.backends.mlx.layers import Projections
from radlads.spec import ModelSpec


class SoftmaxMixer(Projections):
    """The teacher's attention; its cache is mlx_lm's KVCache."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__(spec)

    def __call__(self, x: mx.array, mask: Any, cache: Any, carry: Any) -> tuple[mx.array, Any]:
        """x (B, T, D) to the output (B, T, D); mask as mlx_lm's create_attention_mask gives it; `carry` passes by."""
        q, k, v = (y.swapaxes(1, 2) for y in self.project(x, x, x))  # (B, heads, T, N)
        if self.spec.mixer.kept_rope:
            first = 0 if cache is None else cache.offset
            q, k = self.rotate(q, first), self.rotate(k, first)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        p = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.spec.N**-0.5, mask=mask)
        return self.output_of(p.swapaxes(1, 2).flatten(2)), carry

    def make_cache(self) -> KVCache:
        """An empty cache for this layer."""
        return KVCache()
