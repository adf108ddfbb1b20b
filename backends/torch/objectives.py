"""What each training stage minimises: the paper's steps 1 (align), 2 (distill) and 3 (lm)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from radlads.backends.torch.losses import distillation_loss, language_model_loss
from radlads.backends.torch.model import Model
from radlads.backends.torch.state import empty_state
from radlads.mixers import MIXERS
from radlads.recipe import Stage


@dataclass(frozen=True)
class Objective:
    """The loss to differentiate and, for step 1, the alignment error of each converted layer (L',)."""

    loss: Tensor
    layer_error: Tensor | None = None


def objective(stage: Stage, student: Model, teacher: Model | None, sample: Tensor) -> Objective:
    """Loss of `stage` on `sample` (B, T + 1) of token ids; steps 1 and 2 need the teacher."""
    tokens, labels = sample[:, :-1], sample[:, 1:]
    if stage.kind == "lm":
        hidden, _ = student.model(tokens)
        return Objective(language_model_loss(hidden, student.head, labels))
    assert teacher is not None
    if stage.kind == "align":
        errors = alignment_errors(student, teacher, tokens)
        return Objective(errors.mean(), errors.detach())
    with torch.no_grad():
        teacher_hidden, _ = teacher.model(tokens)
    hidden, _ = student.model(tokens)
    weights = {"temperature": stage.temperature, "kl_weight": stage.kl_weight, "ce_weight": stage.ce_weight}
    return Objective(distillation_loss(hidden, student.head, teacher_hidden, teacher.head, labels, **weights))


def alignment_errors(student: Model, teacher: Model, tokens: Tensor) -> Tensor:
    """Step 1: per converted layer the mean over tokens of ||teacher mixer - student mixer||_2 / sqrt(D), float32 (L',).

    The residual stream is the teacher's throughout, so every student mixer sees exact teacher inputs. Only `v_first` of
    RAD-RWKV7 passes from student layer to student layer, and gradients pass with it (protocol section 1.3).
    """
    spec = student.spec
    errors = []
    converted: Any = student.model.layers
    with torch.no_grad():
        x = teacher.model.embed_tokens(tokens)
        state = empty_state(spec, len(tokens), tokens.device)
        teacher_context, _ = teacher.model.context(tokens, state, None, None, x.dtype)
    context, _ = student.model.context(tokens, state, None, None, x.dtype)
    layer: Any
    for index, layer in enumerate(teacher.model.layers):
        with torch.no_grad():
            normed = layer.input_layernorm(x)
            wanted, _ = layer.self_attn(normed, teacher_context, {})
        if MIXERS[spec.mixers[index]].recurrent:
            mixed, _ = converted[index].self_attn(normed, context, {})
            errors.append(torch.linalg.vector_norm(wanted - mixed, dim=-1).float().mean() * spec.D**-0.5)
        with torch.no_grad():
            x = x + wanted
            x = x + layer.mlp(layer.post_attention_layernorm(x))
    return torch.stack(errors)
