"""Softmax attention of one new token per row over a cache of fixed size, for writing many rows side by side.

Each program reads the keys and values of one row and one of their heads once, as far as the cache is filled, for all query
heads that share them.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

from radlads.backends.torch.kernels.lang import HAS_TRITON, tl, triton

# Query heads that share keys and values, at most: the rows of one matrix product.
MAX_SHARED = 16


@torch.library.custom_op("radlads::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, filled: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(N)) v over the first `filled` places of a cache.

    q: (B, H, N); k, v: (B, Hkv, S, N) contiguous, H % Hkv == 0; filled: int64 (1,), 1 to S, read on the device. Returns
    (B, H, N) in q's dtype, computed in float32. No gradients.
    """
    B, H, N = q.shape
    Hkv, S = k.shape[1:3]
    if not attend_has_kernel(q) or H // Hkv > MAX_SHARED:
        return attend_plain(q, k, v, filled)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    attend_kernel[(B, Hkv)](q.contiguous(), k, v, filled, out, S, N**-0.5, Hkv, SHARED=H // Hkv, ROWS=MAX_SHARED, N=N,
                            COLUMNS=triton.next_power_of_2(N), PLACES=64, num_warps=4)
    return out


def attend_has_kernel(q: Tensor) -> bool:
    """Whether the kernel takes tensors like this one."""
    return HAS_TRITON and q.is_cuda


@attend.register_fake
def attend_fake(q: Tensor, k: Tensor, v: Tensor, filled: Tensor) -> Tensor:
    return torch.empty_like(q)


def attend_plain(q: Tensor, k: Tensor, v: Tensor, filled: Tensor) -> Tensor:
    """The same through torch's attention, which reads the whole cache."""
    shared = q.unflatten(1, (k.shape[1], -1))
    visible = torch.arange(k.shape[2], device=q.device) < filled
    return F.scaled_dot_product_attention(shared, k, v, attn_mask=visible[None, None, None]).flatten(1, 2)


@triton.jit
def attend_kernel(q, k, v, filled, out, S, scale, Hkv, SHARED: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
                  COLUMNS: tl.constexpr, PLACES: tl.constexpr):
    item = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLUMNS)
    place = tl.arange(0, PLACES)
    inside = (row[:, None] < SHARED) & (col[None, :] < N)
    mine = ((item * Hkv + head) * SHARED + row[:, None]) * N + col[None, :]
    query = tl.load(q + mine, mask=inside, other=0.0)
    count = tl.load(filled).to(tl.int32)
    cache = (tl.cast(item, tl.int64) * Hkv + head) * S * N + place[:, None] * N + col[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, PLACES):
        there = start + place < count
        known = there[:, None] & (col[None, :] < N)
        key = tl.load(k + cache + start * N, mask=known, other=0.0)
        value = tl.load(v + cache + start * N, mask=known, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        share = tl.exp(score - higher[:, None])
        kept = tl.exp(top - higher)
        total = total * kept + tl.sum(share, 1)
        mixed = mixed * kept[:, None] + tl.dot(share.to(value.dtype), value, input_precision="ieee")
        top = higher
    tl.store(out + mine, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)
