"""Measuring a model on held-out tokens, beside its teacher."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from radlads.backends.torch.load import load_model
from radlads.backends.torch.losses import IGNORED
from radlads.backends.torch.model import Model
from radlads.backends.torch.objectives import unpack
from radlads.folder import ModelFolder

# Sequences per forward pass while measuring.
ROWS = 16
# Points of the curve of KL by position, at most; each stands for an equal stretch of the context.
POSITIONS = 1024


@torch.no_grad()
def evaluate(model: Model, samples: Tensor, teacher: Model | None = None) -> dict[str, object]:
    """Loss and, with a teacher, KL(teacher || model), next-token agreement and KL by position on samples (n, T + 1).

    Keys: tokens, loss (nats per token), ppl, kl, agreement (0..1), kl_by_position (mean over each stretch of `kl_stretch`
    tokens of the context).
    """
    loss, kl, agree = 0.0, torch.zeros(samples.shape[1] - 1, dtype=torch.float64), 0
    counts = torch.zeros_like(kl)  # labels that count, by position
    device = next(model.parameters()).device
    for rows in samples.split(ROWS):
        tokens, labels, *_ = unpack(rows.to(device))
        counted = labels != IGNORED
        counts += counted.sum(0).cpu()
        log_p = model(tokens)[0].float().log_softmax(-1)
        loss += float(F.nll_loss(log_p.flatten(0, 1), labels.flatten(), reduction="sum"))
        if teacher is not None:
            target = teacher(tokens)[0].float().log_softmax(-1)
            kl += ((target.exp() * (target - log_p)).sum(-1) * counted).sum(0).double().cpu()
            agree += int(((target.argmax(-1) == log_p.argmax(-1)) & counted).sum())
    count = max(1, int(counts.sum()))
    result: dict[str, object] = {"tokens": count, "loss": loss / count, "ppl": math.exp(min(loss / count, 80))}
    if teacher is not None:
        stretch = -(-len(kl) // POSITIONS)
        by_position = [
            float(part.sum() / number.sum().clamp(min=1))
            for part, number in zip(kl.split(stretch), counts.split(stretch), strict=True)
        ]
        result |= {"kl": float(kl.sum()) / count, "agreement": agree / count}
        result |= {"kl_by_position": by_position, "kl_stretch": stretch}
    return result


@torch.no_grad()
def limited_context_loss(model: Model, samples: Tensor, window: int) -> tuple[float, float]:
    """Loss of the same labels of samples (n, T + 1) with the whole context, and with only the last `window` tokens."""
    full = limited = 0.0
    count = 0
    for rows in samples.split(ROWS):
        tokens, every_label, *_ = unpack(rows)
        labels = every_label[:, window - 1 :]
        log_p = model(tokens)[0].float().log_softmax(-1)[:, window - 1 :]
        full += float(F.nll_loss(log_p.flatten(0, 1), labels.flatten(), reduction="sum"))
        windows = tokens.unfold(1, window, 1).flatten(0, 1)
        logits = F.linear(model.model(windows)[0][:, -1], model.head).float()
        limited += float(F.cross_entropy(logits, labels.flatten(), reduction="sum"))
        count += int((labels != IGNORED).sum())
    return full / max(1, count), limited / max(1, count)


def step0_kl(teacher: ModelFolder, student: ModelFolder, token_ids: Sequence[int]) -> dict[str, float]:
    """KL and loss of a student on one text, beside its teacher: kl, agreement, teacher_loss, student_loss, tokens."""
    models = [load_model(folder, dtype="float32") for folder in (teacher, student)]
    sample = torch.tensor([list(token_ids)])
    found = evaluate(models[1], sample, models[0])
    names = {"kl": "kl", "agreement": "agreement", "loss": "student_loss", "tokens": "tokens"}
    return {name: float(found[key]) for key, name in names.items()} | {"teacher_loss": float(evaluate(models[0], sample)["loss"])}  # type: ignore[arg-type]
