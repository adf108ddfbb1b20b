"""What each training stage minimises: the paper's steps 1 (align), 2 (distill) and 3 (lm)."""

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from radlads.backends.torch.compiled import layers_compiled
from radlads.backends.torch.kernels.kl import TopK
from radlads.backends.torch.losses import IGNORED, TeacherHead, distillation_loss, language_model_loss
from radlads.backends.torch.model import Model
from radlads.backends.torch.state import MixContext, empty_state
from radlads.data.samples import FIRST, PAD, SILENT, TOKEN
from radlads.mixers import MIXERS
from radlads.recipe import Stage


@dataclass(frozen=True)
class Objective:
    """The loss to differentiate and, for step 1, the alignment error of each converted layer (L',)."""

    loss: Tensor
    layer_error: Tensor | None = None


class Sample(NamedTuple):
    """What `data.samples` packs into one array: tokens and labels (B, T), labels IGNORED where they do not count.

    `real` (B, T) is False for padding, None without any. With `cu_seqlens` (n + 1) the rows are one (B = 1), and the state
    begins anew at each of its places.
    """

    tokens: Tensor
    labels: Tensor
    real: Tensor | None
    cu_seqlens: Tensor | None


def unpack(sample: Tensor, packing: str = "stream") -> Sample:
    """The parts of samples (B, T + 1), made with this packing."""
    inputs, targets = sample[:, :-1], sample[:, 1:]
    tokens = inputs & TOKEN
    labels = (targets & TOKEN).masked_fill((targets & SILENT) != 0, IGNORED)
    if packing == "document":
        return Sample(tokens, labels, (inputs & PAD) == 0, None)
    if packing == "reset":
        begins = (inputs & FIRST) != 0
        begins[:, 0] = True
        places = torch.nonzero(begins.flatten()).flatten()
        cu_seqlens = torch.cat([places, places.new_tensor([tokens.numel()])]).int()
        return Sample(tokens.reshape(1, -1), labels.reshape(1, -1), None, cu_seqlens)
    return Sample(tokens, labels, None, None)


def weight(stage: Stage, sample: Tensor) -> int:
    """How much samples (B, T + 1) weigh in the mean of a step: the tokens over which their own loss is a mean."""
    if stage.kind == "align":
        return sample[:, :-1].numel() if stage.packing != "document" else int(((sample[:, :-1] & PAD) == 0).sum())
    return int(((sample[:, 1:] & SILENT) == 0).sum())


def objective(
    stage: Stage, student: Model, teacher: Model | None, sample: Tensor, targets: TopK | None = None
) -> Objective:
    """Loss of `stage` on samples (B, T + 1), a mean over the tokens that count.

    Step 1 needs the teacher, step 2 the teacher or what it predicts: `targets` of the same tokens, (B, T, K).
    """
    tokens, labels, real, cu_seqlens = unpack(sample, stage.packing)
    if stage.kind == "align":
        assert teacher is not None
        errors = alignment_errors(student, teacher, tokens, loss=stage.loss, real=real, cu_seqlens=cu_seqlens)
        return Objective(errors.mean(), errors.detach())
    hidden, _ = student.model(tokens, cu_seqlens=cu_seqlens)
    if stage.kind == "lm":
        return Objective(language_model_loss(hidden, student.head, labels))
    wanted: TeacherHead | TopK | None = targets
    if wanted is None:
        assert teacher is not None
        with torch.no_grad():
            teacher_hidden, _ = teacher.model(tokens, cu_seqlens=cu_seqlens)
        wanted = TeacherHead(teacher_hidden, teacher.head)
    loss = distillation_loss(
        hidden,
        student.head,
        wanted,
        labels,
        divergence=stage.divergence,
        beta=stage.jsd_beta,
        temperature=stage.temperature,
        kl_weight=stage.kl_weight,
        ce_weight=stage.ce_weight,
    )
    return Objective(loss)


def alignment_errors(
    student: Model,
    teacher: Model,
    tokens: Tensor,
    *,
    loss: str = "norm",
    real: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Step 1: per converted layer the mean over tokens of ||teacher mixer - student mixer||_2 / sqrt(D), float32 (L',).

    With `loss` "mse" the mean of the squares, ||teacher mixer - student mixer||_2^2 / D (protocol section 3.5).
    The residual stream is the teacher's throughout, so every student mixer sees exact teacher inputs. Only `v_first` of
    RAD-RWKV7 passes from student layer to student layer, and gradients pass with it (protocol section 1.3). Tokens that
    are not `real` (B, T) do not count.
    """
    spec = student.spec
    errors = []
    students: Any = student.model.layers
    with torch.no_grad():
        x = teacher.model.embed_tokens(tokens)
        state = empty_state(spec, len(tokens), tokens.device)
        teacher_context, _ = teacher.model.context(tokens, state, None, cu_seqlens, x.dtype)
    context, _ = student.model.context(tokens, state, None, cu_seqlens, x.dtype)
    step = compiled_aligned() if layers_compiled(student) else aligned
    for index, layer in enumerate(teacher.model.layers):
        mixer = students[index].self_attn if MIXERS[spec.mixers[index]].recurrent else None
        x, distance = step(layer, mixer, x, teacher_context, context)
        if distance is not None:
            distance = distance if loss == "norm" else distance.square()
            errors.append(distance.mean() if real is None else distance.masked_fill(~real, 0).sum() / real.sum().clamp(min=1))
    return torch.stack(errors)


def aligned(
    layer: Any, mixer: Any, x: Tensor, teacher_context: MixContext, context: MixContext
) -> tuple[Tensor, Tensor | None]:
    """One teacher layer: its output (B, T, D), and how far `mixer` of the same input is from its attention (B, T) float32."""
    with torch.no_grad():
        normed = layer.input_layernorm(x)
        wanted, _ = layer.self_attn(normed, teacher_context, {})
        onward = x + wanted
        onward = onward + layer.mlp(layer.post_attention_layernorm(onward))
    if mixer is None:
        return onward, None
    mixed, _ = mixer(normed, context, {})
    return onward, torch.linalg.vector_norm(wanted - mixed, dim=-1).float() * x.shape[-1] ** -0.5


@cache
def compiled_aligned() -> Any:
    """`aligned` as one graph, made when it is first asked for: torch.compile alone takes a second to import."""
    return torch.compile(aligned, fullgraph=True, dynamic=False)
