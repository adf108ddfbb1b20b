"""The recurrence of RAD-RWKV6 (docs/mixers.md 6.6, 6.7): S_t = S_{t-1} diag(w_t) + v_t k_t^T, p_t = scale S_t q_t.

Layout (B, T, H, N); the decay comes as its logarithm; the state is float32 (B, H, N value, N key).
"""

from functools import lru_cache, partial
from typing import Any

import mlx.core as mx

from radlads.backends.mlx.kernels import (
    by_segments,
    chunk_size,
    chunk_states,
    decays,
    flipped,
    floored,
    join_chunks,
    pair_masks,
    plain_products,
    plus_product,
    product,
    split_chunks,
    zero_state,
)
from radlads.backends.mlx.kernels.gpu import has_kernels
from radlads.backends.mlx.kernels.scan import scan


def wkv6(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_w: mx.array,
    state: mx.array | None = None,
    *,
    scale: float,
    min_log_w: float | None = None,
) -> tuple[mx.array, mx.array]:
    """p (B, T, H, N) in q's type and the last state, for q, k, v, log_w (B, T, H, N); None starts from zeros.

    `min_log_w` promises that no log_w is lower, which allows longer chunks; without it log_w below -20 counts as -20.
    """
    state = zero_state(q) if state is None else state.astype(mx.float32)
    if has_kernels(q.shape[-1]):
        p, state = scan(False, scale)(q, log_w, k, v, state)
        return p, state
    if q.shape[1] == 1:
        return wkv6_step(q, k, v, log_w, state, scale=scale)
    p, state, *_ = wkv6_chunked(scale, chunk_size(q.shape[1], min_log_w))(q, k, v, floored(log_w, min_log_w), state)
    return p, state


def wkv6_step(
    q: mx.array, k: mx.array, v: mx.array, log_w: mx.array, state: mx.array, *, scale: float
) -> tuple[mx.array, mx.array]:
    """One token: inputs (B, 1, H, N)."""
    qf, kf, vf, lw = (x[:, 0].astype(mx.float32) for x in (q, k, v, log_w))  # (B, H, N)
    state = state * mx.exp(lw)[:, :, None] + vf[..., None] * kf[:, :, None]
    p = scale * (state @ qf[..., None])[..., 0]
    return p[:, None].astype(q.dtype), state


@lru_cache
def wkv6_chunked(scale: float, size: int) -> Any:
    """The recurrence as a function of MLX of (q, k, v, log_w, state) in chunks of `size` tokens."""
    return by_segments(partial(wkv6_segment, scale=scale, size=size), size)


def wkv6_segment(
    q: mx.array, k: mx.array, v: mx.array, log_w: mx.array, state: mx.array, *, scale: float, size: int
) -> tuple[mx.array, mx.array]:
    """All chunks at once; only the state, here S^T (1, B, H, N key, N value), goes from chunk to chunk."""
    length, dtype = q.shape[1], q.dtype
    q, k, v, log_w = (split_chunks(x, size) for x in (q, k, v, log_w))
    q = scale * q
    forth, back, from_start, to_end = decays(log_w)
    q_mid, k_mid = q * forth[..., 1:, :], k * back[..., 1:, :]
    inside, edge = pair_masks(size, 0)
    pairs = mx.where(inside, product(q_mid, flipped(k_mid)), plain_products(q, k) * edge)
    kept = flipped(from_start[..., -1:, :])  # (chunks, B, H, N key, 1)
    starts, last = chunk_states(kept, k * to_end, v, flipped(state)[None])
    p = plus_product(product(q * from_start[..., 1:, :], starts), pairs, v)
    return join_chunks(p, length, dtype), flipped(last[0])
