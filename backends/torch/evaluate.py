"""Measuring a model on held-out tokens, beside its teacher."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Compared:
    """What a model made of every label of some samples, each (n, T) float32 on the CPU and 0 where a label does not count.

    `loss` in nats; beside a teacher `kl` is KL(teacher || model) in nats, and `agrees` is 1 where the same token is likeliest.
    """

    counted: Tensor
    loss: Tensor
    kl: Tensor | None = None
    agrees: Tensor | None = None


@torch.no_grad()
def compare(model: Model, samples: Tensor, teacher: Model | None = None) -> Compared:
    """`model` on samples (n, T + 1), beside its teacher where there is one."""
    device = next(model.parameters()).device
    found: list[tuple[Tensor, ...]] = []
    for rows in samples.split(ROWS):
        tokens, labels, *_ = unpack(rows.to(device))
        counted = labels != IGNORED
        log_p = model(tokens)[0].float().log_softmax(-1)
        loss = F.nll_loss(log_p.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        part = [counted, loss * counted]
        if teacher is not None:
            target = teacher(tokens)[0].float().log_softmax(-1)
            part.append((target.exp() * (target - log_p)).sum(-1) * counted)
            part.append((target.argmax(-1) == log_p.argmax(-1)) & counted)
        found.append(tuple(values.float().cpu() for values in part))
    return Compared(*map(torch.cat, zip(*found, strict=True)))


def evaluate(model: Model, samples: Tensor, teacher: Model | None = None) -> dict[str, object]:
    """Loss and, with a teacher, KL(teacher || model), next-token agreement and both by position on samples (n, T + 1).

    Keys: tokens, loss (nats per token), ppl, kl, agreement (0..1), kl_by_position and agreement_by_position (means over
    each stretch of `kl_stretch` tokens of the context).
    """
    found = compare(model, samples, teacher)
    count = max(1, int(found.counted.sum()))
    loss = float(found.loss.sum(dtype=torch.float64)) / count
    result: dict[str, object] = {"tokens": count, "loss": loss, "ppl": math.exp(min(loss, 80))}
    if found.kl is not None and found.agrees is not None:
        for name, values in (("kl", found.kl), ("agreement", found.agrees)):
            result[name] = float(values.sum(dtype=torch.float64)) / count
            result[f"{name}_by_position"] = by_position(values, found.counted)
        result["kl_stretch"] = -(-found.counted.shape[1] // POSITIONS)
    return result


def by_position(values: Tensor, counted: Tensor) -> list[float]:
    """Means of values (n, T) over the labels that count, in POSITIONS equal stretches of the context at most."""
    stretch = -(-values.shape[1] // POSITIONS)
    sums, counts = (table.sum(0, dtype=torch.float64).split(stretch) for table in (values, counted))
    return [float(part.sum() / number.sum().clamp(min=1)) for part, number in zip(sums, counts, strict=True)]


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
