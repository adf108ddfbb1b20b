"""The recurrence of RAD-RWKV7 (docs/mixers.md 7.6, 7.7), with a = -kappa and b = beta:

S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T, p_t = scale S_t r_t.
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
    earlier,
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


def wkv7(
    r: mx.array,
    log_w: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    state: mx.array | None = None,
    *,
    scale: float = 1.0,
    min_log_w: float | None = None,
) -> tuple[mx.array, mx.array]:
    """p (B, T, H, N) in r's type and the last state, all inputs (B, T, H, N); None starts from zeros.

    `min_log_w` promises that no log_w is lower, which allows longer chunks; without it log_w below -20 counts as -20.
    """
    state = zero_state(r) if state is None else state.astype(mx.float32)
    if has_kernels(r.shape[-1]):
        p, state = scan(True, scale)(r, log_w, k, v, a, b, state)
        return p, state
    if r.shape[1] == 1:
        return wkv7_step(r, log_w, k, v, a, b, state, scale=scale)
    run = wkv7_chunked(scale, chunk_size(r.shape[1], min_log_w))
    p, state, *_ = run(r, floored(log_w, min_log_w), k, v, a, b, state)
    return p, state


def wkv7_step(
    r: mx.array, log_w: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, state: mx.array, *, scale: float
) -> tuple[mx.array, mx.array]:
    """One token: inputs (B, 1, H, N)."""
    rf, lw, kf, vf, af, bf = (x[:, 0].astype(mx.float32) for x in (r, log_w, k, v, a, b))  # (B, H, N)
    removed = state @ af[..., None]  # (B, H, N value, 1)
    state = state * mx.exp(lw)[:, :, None] + removed * bf[:, :, None] + vf[..., None] * kf[:, :, None]
    p = scale * (state @ rf[..., None])[..., 0]
    return p[:, None].astype(r.dtype), state


@lru_cache
def wkv7_chunked(scale: float, size: int) -> Any:
    """The recurrence as a function of MLX of (r, log_w, k, v, a, b, state) in chunks of `size` tokens."""
    return by_segments(partial(wkv7_segment, scale=scale, size=size), size)


def wkv7_segment(
    r: mx.array,
    log_w: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    state: mx.array,
    *,
    scale: float,
    size: int,
) -> tuple[mx.array, mx.array]:
    """All chunks at once; only the state, here S^T (1, B, H, N key, N value), goes from chunk to chunk.

    With u_t = S_{t-1} a_t, a chunk solves (I - M_ab) u = A S^T + M_ak v, M strictly lower, for its first state S: brought to
    u = X S^T + Y beforehand. Then p = R S^T + M_rk v + M_rb u, again for all chunks together.
    """
    length, dtype = r.shape[1], r.dtype
    r, log_w, k, v, a, b = (split_chunks(x, size) for x in (r, log_w, k, v, a, b))
    r = scale * r
    forth, back, from_start, to_end = decays(log_w)
    rows = mx.concatenate([r * forth[..., 1:, :], a * forth[..., :-1, :]], axis=-2)
    columns = flipped(mx.concatenate([k * back[..., 1:, :], b * back[..., 1:, :]], axis=-2))
    plain = [mx.concatenate([plain_products(r, x), plain_products(a, earlier(x))], axis=-2) for x in (k, b)]
    inside, edge = quadrant_masks(size)
    pairs = mx.where(inside, product(rows, columns), edge * mx.repeat(mx.concatenate(plain, axis=-1), size, axis=-1))
    of_r, of_a = mx.split(pairs, 2, axis=-2)
    m_ak, m_ab = (mx.contiguous(x) for x in mx.split(of_a, 2, axis=-1))

    solve = unit_lower_inverse(m_ab)
    x, y = product(solve, a * from_start[..., :-1, :]), product(product(solve, m_ak), v)
    kept = flipped(from_start[..., -1:, :])  # (chunks, B, H, N key, 1)
    last_keys = mx.concatenate([k * to_end, b * to_end], axis=-2)
    starts, last, v_and_u = chunk_states(kept, last_keys, v, flipped(state)[None], x, y)
    p = plus_product(product(r * from_start[..., 1:, :], starts), of_r, v_and_u)
    return join_chunks(p, length, dtype), flipped(last[0])


@lru_cache
def quadrant_masks(size: int) -> tuple[mx.array, mx.array]:
    """`pair_masks` of [[r k, r b], [a k, a b]] (2 size, 2 size); a_t meets the state before its token: one token less."""
    of_r, of_a = pair_masks(size, 0), pair_masks(size, 1)
    inside, edge = (mx.tile(mx.concatenate([*masks]), (1, 2)) for masks in zip(of_r, of_a, strict=True))
    mx.eval(inside, edge)
    return inside, edge


def unit_lower_inverse(m: mx.array) -> mx.array:
    """(I - m)^-1 for strictly lower m (..., n, n), n a power of two, by halves.

    [[X, 0], [Y m' X, Y]] from the inverses X, Y of the diagonal halves. No power of m is formed: those grow beyond
    float32's resolution where keys repeat, although the inverse stays small.
    """
    half = m.shape[-1] // 2
    if half == 1:
        return m + mx.eye(2)
    upper, lower = unit_lower_inverse(mx.stack([m[..., :half, :half], m[..., half:, half:]]))
    corner = product(product(lower, m[..., half:, :half]), upper)
    return mx.concatenate([mx.concatenate([upper, mx.zeros_like(upper)], -1), mx.concatenate([corner, lower], -1)], -2)
