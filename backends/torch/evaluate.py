"""Measuring a model on held-out tokens, beside its teacher."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from radlads.backends.torch.decode import LOGITS_AT_ONCE, log_probabilities
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
    models = [model] if teacher is None else [model, teacher]
    found: list[tuple[Tensor, ...]] = []
    for rows in samples.split(ROWS):
        tokens, labels, *_ = unpack(rows.to(device))
        parts = [labels.flatten().split(LOGITS_AT_ONCE)]
        parts += [one.model(tokens)[0].flatten(0, 1).split(LOGITS_AT_ONCE) for one in models]
        judged = [judge(wanted, *map(log_probabilities, models, hidden)) for wanted, *hidden in zip(*parts, strict=True)]
        found.append(tuple(torch.cat(values).view_as(labels).cpu() for values in zip(*judged, strict=True)))
    return Compared(*map(torch.cat, zip(*found, strict=True)))


def judge(labels: Tensor, log_p: Tensor, target: Tensor | None = None) -> tuple[Tensor, ...]:
    """The fields of Compared for labels (n,), each (n,) float32, from log p (n, V) of a model and of its teacher."""
    counted = labels != IGNORED
    loss = F.nll_loss(log_p, labels, reduction="none", ignore_index=IGNORED)
    if target is None:
        return counted.float(), loss
    kl = (target.exp() * (target - log_p)).sum(-1) * counted
    agrees = (target.argmax(-1) == log_p.argmax(-1)) & counted
    return counted.float(), loss, kl, agrees.float()


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
        full += loss_of(model, model.model(tokens)[0][:, window - 1 :].flatten(0, 1), labels.flatten())
        windows = tokens.unfold(1, window, 1).flatten(0, 1)
        limited += loss_of(model, model.model(windows)[0][:, -1], labels.flatten())
        count += int((labels != IGNORED).sum())
    return full / max(1, count), limited / max(1, count)


def loss_of(model: Model, hidden: Tensor, labels: Tensor) -> float:
    """Cross-entropy of labels (n,) after hidden states (n, D), summed over those that count."""
    parts = zip(hidden.split(LOGITS_AT_ONCE), labels.split(LOGITS_AT_ONCE), strict=True)
    return sum(float(judge(wanted, log_probabilities(model, rows))[1].sum()) for rows, wanted in parts)


def step0_kl(teacher: ModelFolder, student: ModelFolder, token_ids: Sequence[int]) -> dict[str, float]:
    """KL and loss of a student on one text, beside its teacher: kl, agreement, teacher_loss, student_loss, tokens."""
    models = [load_model(folder, dtype="float32") for folder in (teacher, student)]
    sample = torch.tensor([list(token_ids)])
    found = evaluate(models[1], sample, models[0])
    names = {"kl": "kl", "agreement": "agreement", "loss": "student_loss", "tokens": "tokens"}
    return {name: float(found[key]) for key, name in names.items()} | {"teacher_loss": float(evaluate(models[0], sample)["loss"])}  # type: ignore[arg-type]
