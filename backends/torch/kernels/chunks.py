"""Chunks of a sequence: tables, tiles and decay factors shared by the Triton kernels of both recurrences.

Every exponent is a sum of log-decays over a range of tokens, taken by a matrix product with a 0/1 matrix (exact in
float32, no scan, no difference of large sums). A chunk is split in halves level by level, so that both factors of a
(query, key) pair in different halves are <= 1; the last level centres its blocks of `diag` tokens on their middle.
"""
import math

import torch
from torch import Tensor

from radlads.backends.torch.kernels.lang import tl, triton

# e^±DECAY_SPAN times an activation stays inside bfloat16 and float32.
DECAY_SPAN = 64.0
# Log-decays below this are clamped to it: what is left of the state by then (e^-16 = 1e-7, e^-8 = 3e-4) is less than a tenth
# of the rounding of the activations.
DECAY_CLAMP = {torch.float32: 16.0, torch.bfloat16: 8.0}


def decay_block(chunk: int, min_log_w: float | None, dtype: torch.dtype) -> tuple[int, float]:
    """Tokens per centred block and the clamp that make every factor finite for log-decays >= min_log_w."""
    floor = DECAY_CLAMP[dtype]
    # A bound survives rounding to bfloat16 only with some slack: the clamp must not change a value within it.
    if min_log_w is not None:
        floor = min(floor, -1.01 * min_log_w)
    if floor * chunk / 2 <= DECAY_SPAN:
        return chunk, floor
    return 1 << int(math.log2(2 * DECAY_SPAN / floor)), floor


def decay_levels(chunk: int, diag: int) -> int:
    return int(math.log2(chunk // diag)) + 1


def chunk_tables(cu_seqlens: Tensor, chunk: int, tokens: int) -> tuple[Tensor, Tensor]:
    """For packed sequences: the sequence of each chunk (-1: none) and the first chunk of each sequence, without a sync."""
    count = (cu_seqlens.diff() + (chunk - 1)) // chunk
    end = count.cumsum(0)
    chunks = torch.arange(tokens // chunk + count.numel(), device=cu_seqlens.device)
    owner = torch.searchsorted(end, chunks, right=True)
    return torch.where(owner < count.numel(), owner, -1).to(torch.int32), (end - count).to(torch.int32)


def chunk_precision(dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    """Matrix operand types: bfloat16 for bfloat16 activations, else float32 by three tf32 products where the card has them."""
    exact = "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"
    fast = dtype == torch.bfloat16 and device.type == "cuda"
    return {"DOT": tl.bfloat16 if fast else tl.float32, "PREC": "tf32" if fast else exact, "GATE_PREC": exact}


@triton.jit
def decay_sum(selected, x, PREC: tl.constexpr):
    """Sums rows of the log-decays x (C, K) over the tokens selected (C, C)."""
    return tl.dot(selected.to(x.dtype), x, input_precision=PREC)


@triton.jit
def split_dot(x, y, acc, DOT: tl.constexpr, PREC: tl.constexpr, EXACT: tl.constexpr):
    """acc + x y of float32 operands (x exact in bfloat16 where EXACT), by bfloat16 products of their high and low parts.

    Sixteen bits of each operand, against eleven of a tf32 product, which also has to turn y around in shared memory.
    """
    if DOT == tl.bfloat16:
        high = x.to(DOT)
        y_high = y.to(DOT)
        y_low = (y - y_high.to(tl.float32)).to(DOT)
        acc = tl.dot(high, y_low, acc)
        if not EXACT:
            acc = tl.dot((x - high.to(tl.float32)).to(DOT), y_high, acc)
        acc = tl.dot(high, y_high, acc)
    else:
        acc = tl.dot(x.to(tl.float32), y, acc, input_precision=PREC)
    return acc


@triton.jit
def decay_exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def decay_query_state(x, C: tl.constexpr, PREC: tl.constexpr):
    """exp of the decay from the chunk's start up to and including each token."""
    row = tl.arange(0, C)
    return decay_exp(decay_sum(row[:, None] >= row[None, :], x, PREC))


@triton.jit
def decay_key_state(x, C: tl.constexpr, PREC: tl.constexpr):
    """exp of the decay after each token, up to the chunk's end."""
    row = tl.arange(0, C)
    return decay_exp(decay_sum(row[:, None] < row[None, :], x, PREC))


@triton.jit
def decay_pair_factors(x, LEVEL: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, PREC: tl.constexpr):
    """(C, K) factors of queries and keys whose product is the decay between the token pairs of this level."""
    row = tl.arange(0, C)
    half: tl.constexpr = C >> (LEVEL + 1)
    late = ((row // half) % 2 == 1)[:, None]
    before = row[None, :] <= row[:, None]
    between = ((row[:, None] // half) == (row[None, :] // half)) & ((late & before) | ((late | before) == 0))
    span = decay_sum(between, x, PREC)
    if 2 * half == DIAG:
        span = tl.where(late, span, -span)
        query = decay_exp(span)
        key = decay_exp(-span)
    else:
        factor = decay_exp(span)
        query = tl.where(late, factor, 0.0)
        key = tl.where(late, 0.0, factor)
    return query, key


@triton.jit
def decay_pair_mask(LEVEL: tl.constexpr, C: tl.constexpr, DIAG: tl.constexpr, STRICT: tl.constexpr):
    """The (query, key) pairs this level is responsible for; STRICT leaves out a token with itself."""
    row = tl.arange(0, C)
    block: tl.constexpr = C >> LEVEL
    mask = (row[:, None] // block) == (row[None, :] // block)
    if block == DIAG:
        if STRICT:
            mask = mask & (row[:, None] > row[None, :])
        else:
            mask = mask & (row[:, None] >= row[None, :])
    else:
        half: tl.constexpr = block // 2
        mask = mask & ((row[:, None] // half) > (row[None, :] // half))
    return mask


@triton.jit
def tile_load(base, row, col, length, stride, N: tl.constexpr):
    """Loads rows of one head, (row, col), zero outside the sequence and beyond the head size."""
    return tl.load(base + row[:, None] * stride + col[None, :],
                   mask=(row[:, None] < length) & (col[None, :] < N), other=0.0)


@triton.jit
def tile_store(base, value, row, col, length, stride, N: tl.constexpr):
    tl.store(base + row[:, None] * stride + col[None, :], value.to(base.dtype.element_ty),
             mask=(row[:, None] < length) & (col[None, :] < N))


@triton.jit
def gate_load(base, row, col, length, stride, N: tl.constexpr, CLAMP: tl.constexpr):
    """Loads log-decays in their own dtype, clamped; tokens outside the sequence do not decay."""
    x = tile_load(base, row, col, length, stride, N)
    return tl.maximum(x.to(tl.float32), -CLAMP).to(base.dtype.element_ty)
