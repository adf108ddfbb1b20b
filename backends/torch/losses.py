"""Losses over a large vocabulary, from hidden states: the logits of all tokens never exist at once.

Tokens go through in groups. Of a group the student's logits are made, then the teacher's, a part at a time; the student's are
overwritten with their gradient, from which the gradients of hidden states and head follow. So everything is done when the
loss is known, and the backward pass only scales.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from radlads.backends.torch.kernels.kl import COLUMNS, RowLoss, TopK, differentiate, row_losses, scale_
from radlads.backends.torch.vocabulary import GatherTokens, gathered, is_split, rows_here

# Label of a token that does not count, as in torch.nn.functional.cross_entropy.
IGNORED = -100
# Bytes of logits that exist at once on a GPU, and on a CPU, where they should stay in its cache.
LOGITS_BYTES = {"cuda": 760 * 2**20, "cpu": 10 * 2**20}
# The student's logits of this many parts of a group exist at once, the teacher's of one: fewer, longer products for the head.
PARTS = 3
# A GPU makes the logits of a bfloat16 teacher in float32, in twice their memory: their rounding is half of what rounding does to
# a gradient, and more than makes up for the head's, which is rounded once for each group.
WIDE_TEACHER = True
# Values of the gradient of hidden states in one product: few of them do not fill a GPU, and at a width of 3,584 twice as many
# leave more of it idle at the end.
VALUES_OF_PRODUCT = 1024 * 3584


# Process groups by name: an operation of torch.library takes no other form of them.
GROUPS: dict[str, dist.ProcessGroup] = {}


@dataclass(frozen=True)
class TeacherHead:
    """A teacher's distribution by its hidden states (..., D') and its head (V, D')."""

    hidden: Tensor
    head: Tensor


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    teacher: TeacherHead | TopK | None,
    labels: Tensor,
    *,
    divergence: str = "kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    divisor: Tensor | int | None = None,
    float32_head_grad: bool = False,
) -> Tensor:
    """kl_weight * divergence(teacher, student) + ce_weight * cross-entropy, summed over the tokens that count, over `divisor`.

    hidden (..., D) and head (V, D) of the student, labels (...) of the next tokens; a token whose label is IGNORED does not
    count, and `divisor` is the number of those that do unless it is given (for a mean over several calls). `divergence` is
    kl, reverse_kl or jsd (with `beta`), at `temperature`; the equations stand in RowLoss. TopK is at that temperature
    already. A head that is a DTensor is split by vocabulary: the loss is that of the tokens of all its processes, the same in
    each, and the gradient of hidden is that of the mean over processes, as FSDP takes it. The teacher's head is whole or split.
    The head's gradient has its dtype and is summed in it over groups of tokens, in float32 with `float32_head_grad`.
    Differentiable in hidden and head, once. Raises ValueError for options or shapes that do not fit.
    """
    group = None
    if is_split(head):
        group = head.device_mesh.get_group()  # type: ignore[attr-defined]
        hidden, head, teacher, labels = of_all_processes(hidden, head, teacher, labels, group)
    rows, flat, labels = labels.numel(), hidden.flatten(0, -2), labels.reshape(-1)
    if divergence not in ("kl", "reverse_kl", "jsd") or (divergence == "jsd" and not 0 < beta < 1):
        raise ValueError(f"divergence must be kl, reverse_kl, or jsd with beta between 0 and 1; got {divergence}, beta {beta}")
    if len(flat) != rows or head.shape[1] != flat.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)}, head {tuple(head.shape)} and {rows} labels do not fit")
    targets: list[Tensor | None] = [None] * 5
    if kl_weight and isinstance(teacher, TeacherHead):
        targets[:2] = teacher.hidden.flatten(0, -2), teacher.head
        shapes = tuple(teacher.hidden.shape), tuple(teacher.head.shape)
        if teacher.hidden.shape[:-1].numel() != rows or len(teacher.head) != len(head):
            raise ValueError(f"teacher {shapes[0]}, {shapes[1]} does not fit {rows} tokens and {len(head)} rows of the head")
    elif kl_weight and isinstance(teacher, TopK):
        targets[2:] = teacher.ids.flatten(0, -2), teacher.log_p.flatten(0, -2), teacher.log_tail.reshape(-1)
    counted = labels != IGNORED
    total = counted.sum().clamp(min=1) if divisor is None else divisor
    weights = counted.float() / total
    wanted = torch.is_grad_enabled()
    if group is not None:
        GROUPS[group.group_name] = group
    loss, _, _ = linear_divergence(
        flat, head, *targets, labels.where(counted, 0), weights, divergence, beta, temperature, kl_weight, ce_weight,
        "" if group is None else group.group_name,
        wanted and hidden.requires_grad, wanted and head.requires_grad, float32_head_grad,
    )  # fmt: skip
    return loss


def of_all_processes(
    hidden: Tensor, head: Any, teacher: TeacherHead | TopK | None, labels: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, TeacherHead | TopK | None, Tensor]:
    """Tokens, targets and labels of all processes, and this one's rows of the heads; an equal number of tokens in each."""
    if isinstance(teacher, TopK):
        ids, log_p = (gathered(values.flatten(0, -2), group) for values in (teacher.ids, teacher.log_p))
        teacher = TopK(ids, log_p, gathered(teacher.log_tail.flatten(), group))
    elif teacher is not None:
        teacher = TeacherHead(gathered(teacher.hidden.flatten(0, -2), group), rows_here(head, teacher.head))
    tokens: Tensor = GatherTokens.apply(hidden.flatten(0, -2), group)
    return tokens, head.to_local().to(hidden.dtype), teacher, gathered(labels.flatten(), group)


def language_model_loss(hidden: Tensor, head: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """Mean cross-entropy of labels (..., T) under the logits of hidden (..., T, D); options as in distillation_loss."""
    return distillation_loss(hidden, head, None, labels, kl_weight=0.0, ce_weight=1.0, **options)


def teacher_dtype(hidden: Tensor) -> torch.dtype:
    """What a teacher's logits are kept in beside a student's hidden states."""
    return torch.promote_types(hidden.dtype, torch.float32) if WIDE_TEACHER and hidden.is_cuda else hidden.dtype


def tokens_at_once(vocab: int, itemsize: int, teacher_itemsize: int, device: str) -> tuple[int, int]:
    """Tokens whose student logits, and whose teacher logits, exist at once; a teacher's size of 0 is of none to be made."""
    part = LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"]) // (vocab * (PARTS * itemsize + teacher_itemsize))
    part = max(part // 128 * 128, min(part, 128), 1)
    return PARTS * part, part


@torch.library.custom_op("radlads::linear_divergence", mutates_args=())
def linear_divergence(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    top_ids: Tensor | None,
    top_log_p: Tensor | None,
    top_log_tail: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    kl_weight: float,
    ce_weight: float,
    group: str,
    need_hidden: bool,
    need_head: bool,
    float32_head_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient of hidden, gradient of head); gradients that are not needed are empty. Arguments are flat."""
    (n, V), wide = (len(hidden), len(head)), torch.promote_types(hidden.dtype, torch.float32)
    ranks = GROUPS[group] if group else None
    first_id = 0 if ranks is None else first_of_shard(V, ranks, hidden.device)
    loss = RowLoss(divergence, beta, temperature, kl_weight, ce_weight, first_id, ranks)
    kind = "dense" if teacher_hidden is not None else "none" if top_ids is None else "top_k"
    table = torch.zeros(n, COLUMNS, dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    grad_head = torch.empty_like(head, dtype=wide if float32_head_grad else None) if need_head else head.new_empty(0)
    other = teacher_dtype(hidden)
    many, few = tokens_at_once(V, hidden.element_size(), other.itemsize if kind == "dense" else 0, hidden.device.type)
    # Rows begin at multiples of 128 bytes, with at least one spare column.
    width = (V // 64 + 1) * 64
    student = hidden.new_empty(min(n, many), width)
    teacher = hidden.new_empty(min(n, few) if kind == "dense" else 0, width, dtype=other)
    for start in range(0, n, many):
        group_rows = slice(start, min(start + many, n))
        logits = student[: group_rows.stop - start, :V]
        torch.mm(hidden[group_rows], head.T, out=logits)
        for first in range(start, group_rows.stop, few):
            rows = slice(first, min(first + few, group_rows.stop))
            target: Tensor | TopK | None = None
            if teacher_hidden is not None and teacher_head is not None:
                target = teacher[: rows.stop - first, :V]
                add_product(target, teacher_hidden[rows].to(hidden.dtype), teacher_head.T.to(hidden.dtype), first=True)
            elif top_ids is not None and top_log_p is not None and top_log_tail is not None:
                target = TopK(top_ids[rows], top_log_p[rows], top_log_tail[rows])
            differentiate(logits[first - start : rows.stop - start], target, labels[rows], weights[rows], table[rows], loss)
        if need_hidden:
            grads = grad_hidden[group_rows]
            pieces = max(1, round(grads.numel() / VALUES_OF_PRODUCT))
            for part, out in zip(logits.chunk(pieces), grads.chunk(pieces), strict=True):
                torch.mm(part, head, out=out)
        if need_head:
            add_product(grad_head, logits.T, hidden[group_rows], first=start == 0)
    if need_hidden and ranks is not None:
        dist.all_reduce(grad_hidden, group=ranks)
    # A token that does not count is left out, whatever its logits are.
    total = (row_losses(table, loss, kind) * weights).masked_fill(weights == 0, 0).sum()
    return total, grad_hidden, grad_head


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total += left @ right, or = for the first, each product summed in float32."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), beta=0 if first else 1, out=total)


def first_of_shard(rows: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """Token id of the first row of this process's shard of the head."""
    if group.rank() == 0:
        before = torch.tensor(rows, device=device)
    else:
        before = torch.zeros((), dtype=torch.long, device=device)
    dist.all_reduce(before, group=group)
    return int(before) * group.rank()


@linear_divergence.register_fake
def linear_divergence_fake(hidden: Tensor, head: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_head, float32_head_grad = rest[-3:]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(head, dtype=wide if float32_head_grad else None) if need_head else head.new_empty(0),
    )


def keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """What the forward pass made is all that the backward pass needs."""
    ctx.needed = inputs[-3:-1]
    ctx.save_for_backward(*output[1:])
    ctx.set_materialize_grads(False)


def scale_gradients(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    """Gradients of hidden and head, scaled in place."""
    found = [scaled(x, grad) if needed else None for x, needed in zip(ctx.saved_tensors, ctx.needed, strict=True)]
    return (*found, *[None] * 16)


@torch.library.custom_op("radlads::scale_gradient", mutates_args=("x",))
def scale_gradient(x: Tensor, factor: Tensor) -> None:
    """x *= factor in place, without waiting for the factor."""
    scale_(x, factor)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times factor, in x's memory; detached, for to autograd x is a differentiable output of the forward pass."""
    scale_gradient(x, factor)
    return x.detach()


linear_divergence.register_autograd(scale_gradients, setup_context=keep_gradients)
