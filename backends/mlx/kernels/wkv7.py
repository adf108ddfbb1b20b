"""The recurrence of RAD-RWKV7 (docs/mixers.md 7.6, 7.7), with a = -kappa and b = beta:

S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T, p_t = scale S_t r_t.
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
    return wkv7_chunked(r, floored(log_w, min_log_w), k, v, a, b, state, scale=scale, size=chunk_size(r.shape[1], min_log_w))


def wkv7_step(
    r: mx.array, log_w: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, state: mx.array, *, scale: float
) -> tuple[mx.array, mx.array]:
    """One token: inputs (B, 1, H, N)."""
    rf, lw, kf, vf, af, bf = (x[:, 0].astype(mx.float32) for x in (r, log_w, k, v, a, b))  # (B, H, N)
    removed = state @ af[..., None]  # (B, H, N value, 1)
    state = state * mx.exp(lw)[:, :, None] + removed * bf[:, :, None] + vf[..., None] * kf[:, :, None]
    p = scale * (state @ rf[..., None])[..., 0]
    return p[:, None].astype(r.dtype), state


def wkv7_chunked(
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
    """All chunks of `size` tokens at once; only the state goes from chunk to chunk.

    With u_t = S_{t-1} a_t, a chunk solves (I - M_ab) u = A S_0^T + M_ak v, M strictly lower. The solution is linear in
    the chunk's first state, so that the inverse is taken for all chunks together.
    """
    length, dtype = r.shape[1], r.dtype
    r, log_w, k, v, a, b = (split_chunks(x, size) for x in (r, log_w, k, v, a, b))
    r = scale * r
    middle = from_middle(log_w)
    after, back = mx.exp(middle), mx.exp(-middle[..., 1:, :])
    r_mid, a_mid, k_mid, b_mid = r * after[..., 1:, :], a * after[..., :-1, :], k * back, b * back
    m_rk, m_rb = decayed_products(r, k, r_mid, k_mid, lag=0), decayed_products(r, b, r_mid, b_mid, lag=0)
    m_ak, m_ab = decayed_products(a, k, a_mid, k_mid, lag=1), decayed_products(a, b, a_mid, b_mid, lag=1)

    solve = unit_lower_inverse(m_ab)
    decay, last = mx.exp(from_start(log_w)), mx.exp(to_end(log_w))
    u_state, u_own = solve @ (a * decay[..., :-1, :]), solve @ (m_ak @ v)  # u = u_state S_0^T + u_own
    kept, b_last = decay[..., -1:, :], b * last
    add = v.swapaxes(-1, -2) @ (k * last)  # (B, H, chunks, N value, N key)
    starts, solved = [], []
    for per_state, own, keep, of_b, added in zip(*map(each_chunk, (u_state, u_own, kept, b_last, add)), strict=True):
        u = own + per_state @ state.swapaxes(-1, -2)
        starts.append(state)
        solved.append(u)
        state = state * keep + added + u.swapaxes(-1, -2) @ of_b
    before = (r * decay[..., 1:, :]) @ mx.stack(starts, axis=2).swapaxes(-1, -2)
    p = before + m_rb @ mx.stack(solved, axis=2) + m_rk @ v
    return join_chunks(p, length, dtype), state


def unit_lower_inverse(m: mx.array) -> mx.array:
    """(I - m)^-1 for strictly lower m (..., n, n), n a power of two, by halves.

    [[X, 0], [Y m' X, Y]] from the inverses X, Y of the diagonal halves. No power of m is formed: those grow beyond
    float32's resolution where keys repeat, although the inverse stays small.
    """
    half = m.shape[-1] // 2
    if half == 1:
        return m + mx.eye(2)
    upper, lower = unit_lower_inverse(mx.stack([m[..., :half, :half], m[..., half:, half:]]))
    corner = lower @ m[..., half:, :half] @ upper
    return mx.concatenate([mx.concatenate([upper, mx.zeros_like(upper)], -1), mx.concatenate([corner, lower], -1)], -2)
