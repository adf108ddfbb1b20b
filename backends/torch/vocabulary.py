"""The loss with heads split by vocabulary: every process holds V / n rows of each head and sees the tokens of all processes.

Hidden states are gathered, each process makes the logits of its rows, and only sums over the vocabulary and the gradients
of hidden states travel (`losses`, which does the rest). A head's gradient is complete where its rows lie.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from radlads.backends.torch.kernels.kl import TopK
from radlads.backends.torch.losses import TeacherHead, distillation_loss


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


def is_split(head: Tensor) -> bool:
    """Whether a head is a DTensor, of which this process has some rows."""
    return hasattr(head, "placements")


def vocabulary_loss(hidden: Tensor, head: Any, teacher: TeacherHead | TopK | None, labels: Tensor, **options: Any) -> Tensor:
    """distillation_loss over the tokens of all processes, the same value in each; `head` (V, D) is split.

    A teacher's whole head is used by the rows that this process has of the student's.
    """
    group = head.device_mesh.get_group()
    local = head.to_local()
    if isinstance(teacher, TopK):
        ids, log_p = (gathered(values.flatten(0, -2), group) for values in (teacher.ids, teacher.log_p))
        teacher = TopK(ids, log_p, gathered(teacher.log_tail.flatten(), group))
    elif teacher is not None:
        stretch = -(-head.shape[0] // head.device_mesh.size())
        first = min(head.shape[0], dist.get_rank(group) * stretch)
        other: Any = teacher.head
        rows = other.to_local() if is_split(other) else other[first : first + len(local)]
        teacher = TeacherHead(gathered(teacher.hidden.flatten(0, -2), group), rows)
    tokens = GatherTokens.apply(hidden.flatten(0, -2), group)
    return distillation_loss(tokens, local.to(hidden.dtype), teacher, gathered(labels.flatten(), group), group=group, **options)
