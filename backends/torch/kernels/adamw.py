"""AdamW of all tensors at once: one launch for the norm of the gradients, one for masters, moments and weights.

The kernels find the tensors through a table of addresses, of which each program takes a chunk of one. Nothing waits for the
host: an update whose gradient norm is not finite is left out where it would be made.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radlads.backends.torch.kernels.lang import HAS_TRITON, tl, triton
from radlads.backends.torch.moments import PACK, Packed

# Values that a program updates, and those it works on at once.
CHUNK, BLOCK = 16384, 2048
# Rows of the table. GROUP is which of two learning rates holds; the last two are the scales of eight-bit moments.
GRAD, WEIGHT, MASTER, FIRST, SECOND, COUNT, GROUP, FIRST_SCALES, SECOND_SCALES = range(9)


@triton.jit
def adamw_chunk(table, places, program, tensors, EVEN: tl.constexpr, CHUNK: tl.constexpr):
    """What a program works on: the number of a tensor, the place in it where the chunk begins, and how many values it has."""
    tensor = tl.load(places + 2 * program)
    first = tl.load(places + 2 * program + 1).to(tl.int64) * CHUNK
    count = tl.load(table + 5 * tensors + tensor)
    if EVEN:
        count = tl.multiple_of(count, 16)
    return tensor, first, count


@triton.jit
def adamw_values(table, row: tl.constexpr, tensor, tensors, offsets, TYPE: tl.constexpr, EVEN: tl.constexpr):
    """Addresses of some values of the tensor in a row of the table; EVEN tensors can be read 16 bytes at a time."""
    values = tl.load(table + row * tensors + tensor).to(tl.pointer_type(TYPE)) + offsets
    if EVEN:
        values = tl.max_contiguous(tl.multiple_of(values, 16), 16)
    return values


@triton.jit
def adamw_load_moment(table, row: tl.constexpr, tensor, tensors, first, count, TYPE: tl.constexpr, EVEN: tl.constexpr,
                      PACK: tl.constexpr, BLOCK: tl.constexpr):
    """Some values of a moment, float32, zero from `count` on; int8 are codes of the first moment, uint8 of the second."""
    offsets = first + tl.arange(0, BLOCK)
    inside = offsets < count
    values = tl.load(adamw_values(table, row, tensor, tensors, offsets, TYPE, EVEN), mask=inside, other=0).to(tl.float32)
    if TYPE == tl.int8 or TYPE == tl.uint8:
        if TYPE == tl.int8:
            values = values * tl.abs(values) / 16129.0
        else:
            values = values / 255.0
            values = values * values * values * values
        scales = adamw_values(table, row + 4, tensor, tensors, offsets // PACK, tl.float32, False)
        values *= tl.load(scales, mask=inside, other=0.0)
    return values


@triton.jit
def adamw_store_moment(table, row: tl.constexpr, tensor, tensors, first, count, values, TYPE: tl.constexpr, EVEN: tl.constexpr,
                       PACK: tl.constexpr, BLOCK: tl.constexpr):
    """Keep some values of a moment, zero from `count` on, rounded to the nearest of what its type can hold."""
    offsets = first + tl.arange(0, BLOCK)
    at = adamw_values(table, row, tensor, tensors, offsets, TYPE, EVEN)
    if TYPE == tl.int8 or TYPE == tl.uint8:
        packs = tl.reshape(values, (BLOCK // PACK, PACK))
        # When the largest of a pack is known, all of it has been read with the old scale.
        scales = tl.max(tl.abs(packs), 1)
        shares = tl.reshape(tl.abs(packs) / tl.maximum(scales, 1.1754944e-38)[:, None], (BLOCK,))
        if TYPE == tl.int8:
            codes = tl.floor(tl.sqrt_rn(shares) * 127.0 + 0.5)
            codes = tl.where(values < 0.0, -codes, codes)
        else:
            codes = tl.floor(tl.sqrt_rn(tl.sqrt_rn(shares)) * 255.0 + 0.5)
            codes = tl.where(values > 0.0, tl.maximum(codes, 1.0), 0.0)
        numbers = first // PACK + tl.arange(0, BLOCK // PACK)
        at_scales = adamw_values(table, row + 4, tensor, tensors, numbers, tl.float32, False)
        tl.store(at_scales, scales, mask=numbers * PACK < count)
        values = codes.to(tl.int32)
    tl.store(at, values.to(TYPE), mask=offsets < count)


@triton.jit
def square_kernel(table, places, squares, tensors, TYPE: tl.constexpr, EVEN: tl.constexpr, CHUNK: tl.constexpr,
                  BLOCK: tl.constexpr):
    """Sum of the squares of a chunk's gradients."""
    program = tl.program_id(0)
    tensor, first, count = adamw_chunk(table, places, program, tensors, EVEN, CHUNK)
    total = tl.zeros((BLOCK,), tl.float32)
    if tl.load(table + tensor) != 0:
        for start in range(0, CHUNK, BLOCK):
            offsets = first + start + tl.arange(0, BLOCK)
            grad = tl.load(adamw_values(table, 0, tensor, tensors, offsets, TYPE, EVEN), mask=offsets < count, other=0.0)
            total += grad.to(tl.float32) * grad.to(tl.float32)
    tl.store(squares + program, tl.sum(total, 0))


@triton.jit(do_not_specialize=["seed"])
def adamw_kernel(table, places, norm, corrections, lost, tensors, clip, base_lr, mixer_lr, beta1, beta2, eps, weight_decay,
                 seed, GRAD_TYPE: tl.constexpr, WEIGHT_TYPE: tl.constexpr, FIRST_TYPE: tl.constexpr, SECOND_TYPE: tl.constexpr,
                 ROUND: tl.constexpr, EVEN: tl.constexpr, PACK: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """One update of a chunk; with ROUND there is no master, and the weight is rounded up or down by chance."""
    tensor, first, count = adamw_chunk(table, places, tl.program_id(0), tensors, EVEN, CHUNK)
    lr = tl.where(tl.load(table + 6 * tensors + tensor) != 0, mixer_lr, base_lr)
    size = tl.load(norm)
    factor = tl.minimum(clip / (size + 1e-6), 1.0)
    first_correction = tl.load(corrections)
    second_correction = tl.load(corrections + 1)
    unmoved = tl.zeros((BLOCK,), tl.int32)
    # A sum of squares is NaN or infinite where any gradient is.
    if (size < float("inf")) & (tl.load(table + tensor) != 0):
        for start in range(0, CHUNK, BLOCK):
            offsets = first + start + tl.arange(0, BLOCK)
            inside = offsets < count
            at_weight = adamw_values(table, 1, tensor, tensors, offsets, WEIGHT_TYPE, EVEN)
            at_master = at_weight
            if not ROUND:
                at_master = adamw_values(table, 2, tensor, tensors, offsets, tl.float32, EVEN)
            g = tl.load(adamw_values(table, 0, tensor, tensors, offsets, GRAD_TYPE, EVEN), mask=inside, other=0.0)
            g = g.to(tl.float32) * factor
            m = adamw_load_moment(table, 3, tensor, tensors, first + start, count, FIRST_TYPE, EVEN, PACK, BLOCK)
            v = adamw_load_moment(table, 4, tensor, tensors, first + start, count, SECOND_TYPE, EVEN, PACK, BLOCK)
            old = tl.load(at_master, mask=inside, other=0.0).to(tl.float32)
            m += (1.0 - beta1) * (g - m)
            v = beta2 * v + (1.0 - beta2) * g * g
            change = lr / first_correction * m / (tl.sqrt_rn(v / second_correction) + eps)
            new = old * (1.0 - lr * weight_decay) - change
            if ROUND:
                noise = (tl.randint(seed * tensors + tensor, offsets) & 0xFFFF).to(tl.int32)
                bits = new.to(tl.int32, bitcast=True) + noise
                new = (bits & -65536).to(tl.float32, bitcast=True)
            adamw_store_moment(table, 3, tensor, tensors, first + start, count, m, FIRST_TYPE, EVEN, PACK, BLOCK)
            adamw_store_moment(table, 4, tensor, tensors, first + start, count, v, SECOND_TYPE, EVEN, PACK, BLOCK)
            if not ROUND:
                tl.store(at_master, new, mask=inside)
            tl.store(at_weight, new.to(WEIGHT_TYPE), mask=inside)
            unmoved += ((new == old) & (change != 0.0) & inside).to(tl.int32)
        total = tl.sum(unmoved, 0)
        if total > 0:
            tl.atomic_add(lost, total.to(tl.int64))


class Table:
    """Tensors of one dtype as a table of addresses: weights, their masters and moments, and the gradients of the moment."""

    def __init__(self, weights: Sequence[Tensor], masters: Sequence[Tensor], moments: Sequence[Sequence[Tensor | Packed]],
                 groups: Sequence[int]) -> None:
        """`masters` float32 or the weights themselves, `moments` two a weight, kept in the same way for all; all contiguous."""
        self.kept = [weights, masters, moments]
        self.moment_dtypes: list[torch.dtype] = []
        self.dtype, self.device = weights[0].dtype, weights[0].device
        counts = np.array([w.numel() for w in weights], np.int64)
        table = np.zeros((9, len(weights)), np.int64)
        table[WEIGHT] = [w.data_ptr() for w in weights]
        table[MASTER] = [m.data_ptr() for m in masters]
        for row, kept in zip((FIRST, SECOND), zip(*moments, strict=True), strict=True):
            values = [m.codes if isinstance(m, Packed) else m for m in kept]
            table[row] = [tensor.data_ptr() for tensor in values]
            table[row + 4] = [m.scales.data_ptr() if isinstance(m, Packed) else 0 for m in kept]
            self.moment_dtypes.append(values[0].dtype)
        table[COUNT], table[GROUP] = counts, groups
        self.host, self.device_table, self.known = table, torch.empty(0), np.full(len(weights), -1, np.int64)
        chunks = -(-counts // CHUNK)
        tensor = np.repeat(np.arange(len(weights)), chunks)
        within = np.arange(len(tensor)) - np.repeat(np.cumsum(chunks) - chunks, chunks)
        self.places = torch.from_numpy(np.stack([tensor, within], 1).astype(np.int32)).to(self.device)

    @property
    def even(self) -> bool:
        """Whether everything can be read 16 bytes at a time."""
        return not ((self.host[: COUNT + 1] % 16).any())

    def point(self, grads: Sequence[Tensor | None]) -> None:
        """Name the gradients of this update; the table goes to the device only when an address has changed."""
        addresses = np.array([0 if g is None else g.data_ptr() for g in grads], np.int64)
        if not np.array_equal(addresses, self.known):
            self.host[GRAD] = self.known = addresses
            table = torch.from_numpy(self.host.copy())
            table = table.pin_memory() if self.device.type == "cuda" else table
            self.device_table = table.to(self.device, non_blocking=True)

    def square(self, grad_dtype: torch.dtype) -> Tensor:
        """Sum of the squares of all gradients, float64."""
        squares = torch.empty(len(self.places), device=self.device)
        square_kernel[(len(self.places),)](self.device_table, self.places, squares, self.host.shape[1],
                                           TYPE=TYPES[grad_dtype], EVEN=self.even, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8)
        return squares.sum(dtype=torch.float64)

    def update(self, grad_dtype: torch.dtype, norm: Tensor, corrections: Tensor, lost: Tensor, *, clip: float,
               rates: tuple[float, float], betas: tuple[float, float], eps: float, weight_decay: float, seed: int,
               rounded: bool) -> None:
        """AdamW with the gradients scaled to a norm of at most `clip`; the weights left as they were are added to `lost`.

        norm () float32, corrections (2) float32 (1 - beta ** number), lost () int64, all on the device.
        """
        adamw_kernel[(len(self.places),)](
            self.device_table, self.places, norm, corrections, lost, self.host.shape[1], clip, *rates, *betas, eps,
            weight_decay, seed, GRAD_TYPE=TYPES[grad_dtype], WEIGHT_TYPE=TYPES[self.dtype],
            FIRST_TYPE=TYPES[self.moment_dtypes[0]], SECOND_TYPE=TYPES[self.moment_dtypes[1]], ROUND=rounded, EVEN=self.even,
            PACK=PACK, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8)


TYPES: dict[torch.dtype, Any] = {
    torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.int8: tl.int8, torch.uint8: tl.uint8
} if HAS_TRITON else {}  # fmt: skip


def adamw_has_kernel(weight: Tensor) -> bool:
    """Whether `Table` can update `weight`: a contiguous bfloat16 or float32 one on a GPU."""
    return HAS_TRITON and weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous()


def adamw_plain(weight: Tensor, grad: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, factor: Tensor,
                corrections: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
                noise: Tensor | None = None) -> Tensor:
    """adamw_kernel in array operations, with the gradient times `factor`; returns how many weights were left as they were.

    With `noise`, int32 of 0 to 65535 for each value, weight is its own master and is rounded by it.
    """
    g, old = grad.float() * factor, master.float()
    exp_avg.add_((1 - betas[0]) * (g - exp_avg))
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    change = lr / corrections[0] * exp_avg / ((exp_avg_sq / corrections[1]).sqrt() + eps)
    new = old * (1 - lr * weight_decay) - change
    if noise is not None:
        new = ((new.view(torch.int32) + noise) & -65536).view(torch.float32)
    master.copy_(new)
    weight.copy_(new)
    return ((new == old) & (change != 0)).sum()
