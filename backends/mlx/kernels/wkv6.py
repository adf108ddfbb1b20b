"""The recurrence of RAD-RWKV6 (docs/mixers.md 6.6, 6.7): S_t = S_{t-1} diag(w_t) + v_t k_t^T, p_t = scale S_t q_t.

Layout (B, T, H, N); the decay comes as its logarithm; the state is float32 (B, H, N value, N key).
"""

import mlx.core as mx

from radlads.backends.mlx.kernels import (
    chunk_size,
    decayed_products,
    each_chunk,
    floored,
    from_middle,
    from_start,
    join_chunks,
    split_chunks,
    to_end,
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
    return wkv6_chunked(q, k, v, floored(log_w, min_log_w), state, scale=scale, size=chunk_size(q.shape[1], min_log_w))


def wkv6_step(
    q: mx.array, k: mx.array, v: mx.array, log_w: mx.array, state: mx.array, *, scale: float
) -> tuple[mx.array, mx.array]:
    """One token: inputs (B, 1, H, N)."""
    qf, kf, vf, lw = (x[:, 0].astype(mx.float32) for x in (q, k, v, log_w))  # (B, H, N)
    state = state * mx.exp(lw)[:, :, None] + vf[..., None] * kf[:, :, None]
    p = scale * (state @ qf[..., None])[..., 0]
    return p[:, None].astype(q.dtype), state


def wkv6_chunked(
    q: mx.array, k: mx.array, v: mx.array, log_w: mx.array, state: mx.array, *, scale: float, size: int
) -> tuple[mx.array, mx.array]:
    """All chunks of `size` tokens at once; only the state goes from chunk to chunk."""
    length, dtype = q.shape[1], q.dtype
    q, k, v, log_w = (split_chunks(x, size) for x in (q, k, v, log_w))
    q = scale * q
    middle = from_middle(log_w)[..., 1:, :]
    inside = decayed_products(q, k, q * mx.exp(middle), k * mx.exp(-middle), lag=0) @ v
    added = v.swapaxes(-1, -2) @ (k * mx.exp(to_end(log_w)))  # (B, H, chunks, N value, N key)
    decay = mx.exp(from_start(log_w))
    kept = decay[..., -1:, :]  # (B, H, chunks, 1, N key)
    starts = []
    for keep, add in zip(each_chunk(kept), each_chunk(added), strict=True):
        starts.append(state)
        state = state * keep + add
    before = (q * decay[..., 1:, :]) @ mx.stack(starts, axis=2).swapaxes(-1, -2)
    return join_chunks(inside + before, length, dtype), state
