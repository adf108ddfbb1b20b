"""How hard each layer is to convert, measured after step 1: what guides the choice of layers that stay softmax."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from radlads.backends.torch.losses import IGNORED
from radlads.backends.torch.model import Model
from radlads.backends.torch.objectives import unpack
from radlads.backends.torch.state import empty_state
from radlads.mixers import MIXERS


class LayerDifficulty(NamedTuple):
    """One converted layer: `error` ||t - s|| / sqrt(D), `relative` ||t - s|| / ||t||, and `kl`, all means over tokens.

    `kl` is KL(teacher || teacher with only this layer converted): what the layer alone costs.
    """

    layer: int
    error: float
    relative: float
    kl: float


@torch.no_grad()
def layer_difficulty(student: Model, teacher: Model, samples: Tensor) -> list[LayerDifficulty]:
    """Difficulty of each converted layer of `student` on samples (n, T + 1), one sample at a time.

    The cost is that of L / 2 + 1 forward passes for a model of L layers.
    """
    spec = student.spec
    layers = [index for index, mixer in enumerate(spec.mixers) if MIXERS[mixer].recurrent]
    sums = {index: torch.zeros(3, dtype=torch.float64) for index in layers}
    count = 0
    for sample in samples.to(teacher.head.device).split(1):
        tokens, labels, *_ = unpack(sample)
        counted = labels[0] != IGNORED
        count += int(counted.sum())
        for index, measured in one_sample(student, teacher, tokens, counted):
            sums[index] += measured
    return [LayerDifficulty(index, *(sums[index] / max(1, count)).tolist()) for index in layers]


def one_sample(student: Model, teacher: Model, tokens: Tensor, counted: Tensor) -> list[tuple[int, Tensor]]:
    """(layer, sums over counted tokens of error, relative error and KL) for tokens (1, T)."""
    state = empty_state(student.spec, 1, tokens.device)
    x = teacher.model.embed_tokens(tokens)
    contexts = [model.model.context(tokens, state, None, None, x.dtype)[0] for model in (teacher, student)]
    hidden, _ = teacher.model(tokens)
    target = F.linear(hidden[0, counted], teacher.head).float().log_softmax(-1)
    own: Any = teacher.model.layers
    found = []
    for index, layer in enumerate(own):
        normed = layer.input_layernorm(x)
        wanted, _ = layer.self_attn(normed, contexts[0], {})
        if MIXERS[student.spec.mixers[index]].recurrent:
            converted: Any = student.model.layers[index]
            mixed, _ = converted.self_attn(normed, contexts[1], {})
            distance = torch.linalg.vector_norm((wanted - mixed)[0, counted].float(), dim=-1)
            length = torch.linalg.vector_norm(wanted[0, counted].float(), dim=-1)
            y = after_mixing(layer, x, mixed)
            for later in own[index + 1 :]:
                y, _ = later(y, contexts[0], {})
            log_p = F.linear(teacher.model.norm(y)[0, counted], teacher.head).float().log_softmax(-1)
            kl = (target.exp() * (target - log_p)).sum()
            sums = (distance.sum() * student.spec.D**-0.5, (distance / length.clamp(min=1e-30)).sum(), kl)
            found.append((index, torch.stack(sums).double().cpu()))
        x = after_mixing(layer, x, wanted)
    return found


def after_mixing(layer: Any, x: Tensor, mixed: Tensor) -> Tensor:
    """The residual stream x (B, T, D) after a layer whose mixer gave `mixed`."""
    x = x + mixed
    return x + layer.mlp(layer.post_attention_layernorm(x))
