"""The RWKV-6 recurrence in plain PyTorch: chunk-parallel, differentiable, exact for any decay; the CPU path.

Within a chunk the decay between two tokens is split at the middle of the chunk, so no factor leaves float32's range.
"""

from itertools import pairwise

import torch
from torch import Tensor

# exp(-20) is below half a unit in the last place of float32 and bfloat16: smaller decays change nothing.
PLAIN_MIN_LOG_W = -20.0
# Largest exponent a factor may reach: exp(80) and exp(-80) are both normal float32 numbers.
PLAIN_MAX_EXPONENT = 80.0
PLAIN_MAX_CHUNK = 32


def plain_chunk(min_log_w: float | None, tokens: int) -> int:
    """Tokens per chunk: a power of two so that half a chunk at the decay's bound stays within the exponent range."""
    bound = max(-PLAIN_MIN_LOG_W if min_log_w is None else min(-min_log_w, -PLAIN_MIN_LOG_W), 1e-6)
    size = PLAIN_MAX_CHUNK
    while size > 2 and size / 2 * bound > PLAIN_MAX_EXPONENT:
        size //= 2
    while size > 2 and size // 2 >= tokens:
        size //= 2
    return size


def plain_chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, N) to (B, H, chunks, size, N), zeros after the end. A zero token (no decay, no key) changes no state."""
    B, T, H, N = x.shape
    missing = -T % size
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
    return x.reshape(B, -1, size, H, N).permute(0, 3, 1, 2, 4)


def plain_unchunk(x: Tensor, tokens: int) -> Tensor:
    """(B, H, chunks, size, N) back to (B, tokens, H, N)."""
    B, H, chunks, size, N = x.shape
    return x.permute(0, 2, 3, 1, 4).reshape(B, chunks * size, H, N)[:, :tokens]


def plain_compute(x: Tensor) -> Tensor:
    """Arithmetic is in float32, or in float64 where the caller hands that in."""
    return x if x.dtype == torch.float64 else x.float()


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """S.4: (B, T, Hkv, N) to (B, T, heads, N): key/value head j serves heads j*g ... j*g+g-1."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def wkv6_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    state: Tensor | None = None,
    *,
    scale: float,
    min_log_w: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} diag(exp(log_w_t)) + v_t k_t^T ;  out_t = scale * S_t q_t  (docs/mixers.md 6.6-6.7).

    q, log_w (B, T, H, N); k, v (B, T, Hkv, N); state (B, H, N value, N key) float32; cu_seqlens (n+1) packs n sequences
    into B = 1, the state then has n rows. Returns out (B, T, H, N) in v's dtype and the last state.
    """
    if cu_seqlens is not None:
        return plain_packed(wkv6_plain, (q, k, v, log_w), state, cu_seqlens, scale=scale, min_log_w=min_log_w)
    B, T, H, N = q.shape
    dtype = v.dtype
    q, log_w = plain_compute(q) * scale, plain_compute(log_w).clamp(min=PLAIN_MIN_LOG_W)
    k, v = plain_compute(repeat_heads(k, H)), plain_compute(repeat_heads(v, H))
    state = q.new_zeros(B, H, N, N) if state is None else state.to(q.dtype)
    if T == 1:
        q1, k1, v1, w1 = (x[:, 0] for x in (q, k, v, log_w))
        state = state * w1.exp()[:, :, None, :] + v1[..., None] * k1[:, :, None, :]
        return (state @ q1[..., None])[..., 0][:, None].to(dtype), state

    size = plain_chunk(min_log_w, T)
    q, k, v, log_w = (plain_chunks(x, size) for x in (q, k, v, log_w))
    from_middle, from_start, to_end = plain_decays(log_w)
    middle = from_middle[..., 1:, :]
    scores = (q * middle.exp()) @ (k * (-middle).exp()).transpose(-1, -2)
    # Above the diagonal the product may be infinite: it is selected away, never multiplied.
    visible = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)
    out = torch.where(visible, scores, 0.0) @ v + (q * k).sum(-1, keepdim=True) * v
    written = v.transpose(-1, -2) @ (k * to_end.exp())
    decay = from_start.exp()
    states = []
    # unbind, not indexing: its backward stacks, where indexing would fill a zero tensor for every chunk.
    for decay_, written_ in zip(decay[..., size:, :].unbind(2), written.unbind(2), strict=True):
        states.append(state)
        state = state * decay_ + written_
    out = out + (q * decay[..., 1:, :]) @ torch.stack(states, 2).transpose(-1, -2)
    return plain_unchunk(out, T).to(dtype), state


def plain_decays(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of log-decays in chunks (..., C, N): from the middle (C+1 rows), from the start (C+1), to the end (C).

    Row j of the first two stands at the boundary after j tokens, row t of the last one after token t. Every sum is taken over
    just the tokens it spans: a difference of longer sums would leave rounding errors in the gradient of a strong decay.
    """
    size = log_w.shape[-2]
    boundary = torch.arange(size + 1, device=log_w.device)[:, None]
    token = torch.arange(size, device=log_w.device)[None, :]
    middle = size // 2
    from_start = token < boundary
    from_middle = (from_start & (token >= middle)).to(log_w.dtype) - (~from_start & (token < middle)).to(log_w.dtype)
    to_end = ~from_start[1:]
    spans = torch.cat([from_middle, from_start.to(log_w.dtype), to_end.to(log_w.dtype)])
    return (spans @ log_w).split([size + 1, size + 1, size], -2)


def plain_packed(
    op: object, inputs: tuple[Tensor, ...], state: Tensor | None, cu_seqlens: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    """Run `op` on each of the sequences packed along T and join the outputs and the states."""
    bounds = cu_seqlens.tolist()
    outs, states = [], []
    for row, (start, stop) in enumerate(pairwise(bounds)):
        first = None if state is None else state[row : row + 1]
        out, last = op(*(x[:, start:stop] for x in inputs), first, **options)  # type: ignore[operator]
        outs.append(out)
        states.append(last)
    return torch.cat(outs, 1), torch.cat(states, 0)
