"""AdamW of one tensor in one pass: gradient in, float32 master and moments updated, the rounded weight out."""

import torch
from torch import Tensor

from radlads.backends.torch.kernels.lang import HAS_TRITON, tl, triton

ADAMW_BLOCK = 2048


@triton.jit
def adamw_kernel(weight, grad, master, exp_avg, exp_avg_sq, factor, count, lr, beta1, beta2, eps, weight_decay,
                 first_correction, second_correction, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(grad + at, mask=inside).to(tl.float32) * tl.load(factor)
    m = tl.load(exp_avg + at, mask=inside)
    v = tl.load(exp_avg_sq + at, mask=inside)
    x = tl.load(master + at, mask=inside)
    m += (1.0 - beta1) * (g - m)
    v = beta2 * v + (1.0 - beta2) * g * g
    x = x * (1.0 - lr * weight_decay) - lr / first_correction * m / (tl.sqrt_rn(v / second_correction) + eps)
    tl.store(exp_avg + at, m, mask=inside)
    tl.store(exp_avg_sq + at, v, mask=inside)
    tl.store(master + at, x, mask=inside)
    tl.store(weight + at, x.to(weight.dtype.element_ty), mask=inside)


def adamw_has_kernel(weight: Tensor) -> bool:
    """Whether adamw_ can update `weight`: a bfloat16 one on a GPU."""
    return HAS_TRITON and weight.is_cuda and weight.dtype == torch.bfloat16 and weight.is_contiguous()


def adamw_(weight: Tensor, grad: Tensor, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, factor: Tensor, number: int,
           lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Update `number` (from 1) of torch.optim.AdamW with the gradient times `factor`, a float32 scalar on the device.

    weight and grad are of any floating dtype, master and moments float32; all of one shape and contiguous.
    """
    count = weight.numel()
    adamw_kernel[(triton.cdiv(count, ADAMW_BLOCK),)](
        weight, grad.contiguous(), master, exp_avg, exp_avg_sq, factor, count, lr, *betas, eps, weight_decay,
        1 - betas[0] ** number, 1 - betas[1] ** number, BLOCK=ADAMW_BLOCK, num_warps=8)
