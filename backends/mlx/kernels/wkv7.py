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
    decays,
    each_chunk,
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

    With u_t = S_{t-1} a_t, a chunk solves (I - M_ab) u = A S_0^T + M_ak v, M strictly lower. The solution is linear in the
    chunk's first state, and so is p = R S_0^T + M_rk v + M_rb u: u and p, one above the other, are brought to the form
    X S_0^T + Y for all chunks together, which leaves one product per chunk to the state.
    """
    length, dtype = r.shape[1], r.dtype
    r, log_w, k, v, a, b = (split_chunks(x, size) for x in (r, log_w, k, v, a, b))
    r = scale * r
    forth, back, from_start, to_end = decays(log_w)
    columns = flipped(mx.concatenate([k * back[..., 1:, :], b * back[..., 1:, :]], axis=-2))
    of_r = pair_products(r * forth[..., 1:, :], columns, [plain_products(r, x) for x in (k, b)], 0)
    of_a = pair_products(a * forth[..., :-1, :], columns, [plain_products(a, earlier(x)) for x in (k, b)], 1)
    m_rk, m_rb, m_ak, m_ab = (mx.contiguous(x) for pair in (of_r, of_a) for x in mx.split(pair, 2, axis=-1))

    solve = unit_lower_inverse(m_ab)
    both = mx.concatenate([solve, product(m_rb, solve)], axis=-2)  # what u and p are of a right side of the system
    of_state = plus_product(below_zeros(r * from_start[..., 1:, :]), both, a * from_start[..., :-1, :])
    own = product(plus_product(below_zeros(m_rk), both, m_ak), v)
    last_keys = mx.concatenate([k * to_end, b * to_end], axis=-2)
    kept = flipped(from_start[..., -1:, :])  # (chunks, B, H, N key, 1)
    state, out = flipped(state)[None], []
    for x, y, keep, keys, values in zip(*map(each_chunk, (of_state, own, kept, last_keys, v)), strict=True):
        u_and_p = plus_product(y, x, state)
        out.append(u_and_p)
        state = plus_product(keep * state, keys.swapaxes(-1, -2), mx.concatenate([values, u_and_p[..., :size, :]], axis=-2))
    p = mx.concatenate(out)[..., size:, :]
    return join_chunks(p, length, dtype), flipped(state[0])


def pair_products(rows: mx.array, columns: mx.array, edges: list[mx.array], lag: int) -> mx.array:
    """Rows (..., size, N) times columns (..., N, 2 size), for s < t - lag; `edges` (..., size, 1) at s = t - lag."""
    inside, edge = pair_masks(rows.shape[-2], lag)
    plain = mx.concatenate([x * edge for x in edges], axis=-1)
    return mx.where(mx.concatenate([inside, inside], axis=-1), product(rows, columns), plain)


def below_zeros(x: mx.array) -> mx.array:
    """x (..., n, m) as the lower half of (..., 2 n, m)."""
    return mx.pad(x, [*[(0, 0)] * (x.ndim - 2), (x.shape[-2], 0), (0, 0)])


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
