"""The RWKV-7 recurrence in plain PyTorch: chunk-parallel, differentiable, exact for any decay; the CPU path.

Inside a chunk the removals depend on one another through a unit lower triangular system, which is solved exactly.
"""

from typing import Any

import torch
from torch import Tensor

from radlads.backends.torch.kernels.wkv6_plain import (
    PLAIN_MIN_LOG_W,
    plain_chunk,
    plain_chunks,
    plain_compute,
    plain_decays,
    plain_packed,
    plain_unchunk,
    repeat_heads,
)


class UnitLowerInverse(torch.autograd.Function):
    """X = (I - A)^-1 for A strictly lower triangular (..., C, C); grad A = X^T grad X X^T below the diagonal."""

    @staticmethod
    def forward(ctx: Any, A: Tensor) -> Tensor:
        """Forward substitution; a power series in A would cancel where keys repeat."""
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        X = torch.linalg.solve_triangular(eye - A, eye.expand_as(A), upper=False, unitriangular=True)
        ctx.save_for_backward(X)
        return X

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Gradient of the inverse; entries of A on and above the diagonal have none."""
        (X,) = ctx.saved_tensors
        Xt = X.transpose(-1, -2)
        return (Xt @ grad @ Xt).tril(-1)


def wkv7_plain(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    scale: float = 1.0,
    min_log_w: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} (diag(exp(log_w_t)) + a_t b_t^T) + v_t k_t^T ;  out_t = scale * S_t r_t  (docs/mixers.md 7.6-7.7).

    r, log_w, k, a, b (B, T, H, N); v (B, T, Hv, N); state (B, H, N value, N key) float32; cu_seqlens (n+1) packs n
    sequences into B = 1, the state then has n rows. Returns out (B, T, H, N) in v's dtype and the last state.
    """
    if cu_seqlens is not None:
        return plain_packed(wkv7_plain, (r, log_w, k, v, a, b), state, cu_seqlens, scale=scale, min_log_w=min_log_w)
    B, T, H, N = r.shape
    dtype = v.dtype
    log_w = plain_compute(log_w).clamp(min=PLAIN_MIN_LOG_W)
    r, k, a, b = (plain_compute(x) for x in (r, k, a, b))
    v = plain_compute(repeat_heads(v, H))
    if scale != 1.0:
        r = r * scale
    state = r.new_zeros(B, H, N, N) if state is None else state.to(r.dtype)
    if T == 1:
        r1, w1, k1, v1, a1, b1 = (x[:, 0] for x in (r, log_w, k, v, a, b))
        removed = state @ a1[..., None]
        state = state * w1.exp()[:, :, None, :] + removed * b1[:, :, None, :] + v1[..., None] * k1[:, :, None, :]
        return (state @ r1[..., None])[..., 0][:, None].to(dtype), state

    size = plain_chunk(min_log_w, T)
    r, log_w, k, v, a, b = (plain_chunks(x, size) for x in (r, log_w, k, v, a, b))
    from_middle, from_start, to_end = plain_decays(log_w)
    away, back = from_middle.exp(), (-from_middle[..., 1:, :]).exp()
    # Rows: what each token removes, then what it reads; columns: what b writes, then what k writes.
    targets = torch.cat([a * away[..., :-1, :], r * away[..., 1:, :]], -2)
    sources = torch.cat([b * back, k * back], -2)
    pairs = targets @ sources.transpose(-1, -2)
    undecayed = torch.cat([a, r], -2) @ torch.cat([b, k], -2).transpose(-1, -2)
    # Above the diagonal the product may be infinite: it is selected away, never multiplied. Between neighbours stands no
    # decay, and its factors would leave their rounding errors in the decay's gradient.
    ones = torch.ones(size, size, dtype=torch.bool, device=r.device)
    visible = torch.cat([ones.tril(-1), ones.tril()]).repeat(1, 2)
    separated = torch.cat([ones.tril(-2), ones.tril(-1)]).repeat(1, 2)
    pairs = torch.where(separated, pairs, torch.where(visible, undecayed, 0.0))
    (a_ab, a_ak), (a_rb, a_rk) = (half.chunk(2, -1) for half in pairs.chunk(2, -2))
    decay, fade = from_start.exp(), to_end.exp()
    # removed = (I - A_ab)^-1 (A_ak V + a exp(before) S^T): one part from the chunk itself, one from the state before it.
    own, from_state = (UnitLowerInverse.apply(a_ab) @ torch.cat([a_ak @ v, a * decay[..., :-1, :]], -1)).chunk(2, -1)
    b_last, written = b * fade, v.transpose(-1, -2) @ (k * fade)
    states, removals = [], []
    # unbind, not indexing: its backward stacks, where indexing would fill a zero tensor for every chunk.
    per_chunk = (x.unbind(2) for x in (own, from_state, decay[..., size:, :], b_last, written))
    for own_, from_state_, decay_, b_, written_ in zip(*per_chunk, strict=True):
        states.append(state)
        removed = own_ + from_state_ @ state.transpose(-1, -2)
        removals.append(removed)
        state = state * decay_ + removed.transpose(-1, -2) @ b_ + written_
    out = (r * decay[..., 1:, :]) @ torch.stack(states, 2).transpose(-1, -2) + a_rb @ torch.stack(removals, 2) + a_rk @ v
    return plain_unchunk(out, T).to(dtype), state
