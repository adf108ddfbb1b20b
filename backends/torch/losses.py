"""Losses over a large vocabulary, from hidden states: the logits of all tokens never exist at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens whose logits exist at once; the published trainer takes 512.
TOKENS_AT_ONCE = 2048


class LinearKL(torch.autograd.Function):
    """Mean over tokens of sum_v p_T (log p_T - log p_S), the gradient formed in the forward pass slice by slice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        temperature: float,
        ce: float,
        labels: Tensor,
    ) -> Tensor:
        """hidden (n, D) of the student, labels (n,); the loss is KL + ce * cross-entropy, temperature on both sides of KL."""
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if head.requires_grad else None
        count = len(hidden)
        for rows in torch.arange(count, device="cpu").split(TOKENS_AT_ONCE):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            target = (F.linear(teacher_hidden[part], teacher_head).float() / temperature).log_softmax(-1)
            logits = F.linear(hidden[part], head).float()
            log_p = (logits / temperature).log_softmax(-1)
            p = target.exp()
            total += (p * (target - log_p)).sum()
            grad = log_p.exp_().sub_(p).div_(temperature * count)
            if ce:
                log_q = logits.log_softmax(-1)
                total -= ce * log_q.gather(1, labels[part, None]).sum()
                grad += log_q.exp_().scatter_add_(1, labels[part, None], -torch.ones_like(log_q[:, :1])).mul_(ce / count)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ head
            if grad_head is not None:
                grad_head += grad.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for hidden and head only: the teacher is frozen."""
        grad_hidden, grad_head = ctx.saved_tensors
        scaled = (None if g is None else g * grad.to(g.dtype) for g in (grad_hidden, grad_head))
        return (*scaled, None, None, None, None, None)


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
) -> Tensor:
    """kl_weight * KL(teacher || student) + ce_weight * CE, mean per token; hidden (B, T, D), labels (B, T)."""
    if kl_weight == 0:
        return ce_weight * language_model_loss(hidden, head, labels)
    flat, teacher_flat = hidden.flatten(0, 1), teacher_hidden.flatten(0, 1)
    share = ce_weight / kl_weight
    return kl_weight * LinearKL.apply(flat, head, teacher_flat, teacher_head, temperature, share, labels.flatten())


def language_model_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of labels (B, T) under the logits of hidden (B, T, D)."""
    flat, wanted = hidden.flatten(0, 1), labels.flatten()
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, label in zip(flat.split(TOKENS_AT_ONCE), wanted.split(TOKENS_AT_ONCE), strict=True):
        total = total + F.cross_entropy(F.linear(part, head).float(), label, reduction="sum")
    return total / len(flat)
