"""Heads split by vocabulary: every process holds V / n rows of each, and sees the tokens of all processes.

Hidden states are gathered, each process makes the logits of its rows, and only sums over the vocabulary and the gradients
of hidden states travel (`losses`, which does the rest). A head's gradient is complete where its rows lie.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GatherTokens(torch.autograd.Function):
    """Hidden states (n, D) of all processes (size * n, D); equal n in each.

    Backward every process has the whole gradient of the mean over all tokens. It takes its own, times `size`: FSDP then
    divides by it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """x (n, D)."""
        ctx.size, ctx.rank = dist.get_world_size(group), dist.get_rank(group)
        return gathered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of x."""
        return grad.chunk(ctx.size)[ctx.rank] * ctx.size, None


def gathered(x: Tensor, group: Any) -> Tensor:
    """(n, ...) of every process, one after the other (size * n, ...)."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def is_split(head: Any) -> bool:
    """Whether a head is a DTensor, of which this process has some rows."""
    return hasattr(head, "placements")


def rows_here(split: Any, other: Any) -> Tensor:
    """The rows of a head (V, D'), whole or split, that this process has of a split one."""
    if is_split(other):
        return other.to_local()  # type: ignore[no-any-return]
    stretch = -(-split.shape[0] // split.device_mesh.size())
    first = min(split.shape[0], split.device_mesh.get_rank() * stretch)
    return other[first : first + len(split.to_local())]  # type: ignore[no-any-return]
