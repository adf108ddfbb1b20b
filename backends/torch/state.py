"""What passes between calls (the state of a batch) and between layers (the context of one call)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from radlads.spec import ModelSpec

# The state of one layer by name: `wkv` (B, H, N, N) and `shift` (B, 1, D), or `k` and `v` (B, S, Hkv, N).
LayerState = dict[str, Tensor]


@dataclass(frozen=True)
class ModelState:
    """State of a batch: per layer, the tokens seen by each row (B,), and which cached keys are real (B, S), None if all."""

    layers: tuple[LayerState, ...]
    seen: Tensor
    real: Tensor | None = None


@dataclass
class MixContext:
    """What all layers of one call share; `carry` holds the first recurrent layer's values (7.5), and keys (H.4).

    in_place: one token of every row, without gradients; the states `wkv` that are given are overwritten with the new ones.
    slots (B,), only then: which state of a pool is each row's, as in kernels.decode; None is row i in place i.
    """

    cos_sin: tuple[Tensor, Tensor]
    visible: Tensor | None = None
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    in_place: bool = False
    slots: Tensor | None = None
    carry: dict[str, Tensor] = field(default_factory=dict)


def empty_state(spec: ModelSpec, batch: int, device: torch.device) -> ModelState:
    """The state before the first token of `batch` rows."""
    return ModelState(tuple({} for _ in range(spec.L)), torch.zeros(batch, dtype=torch.long, device=device))


def positions_of(tokens: Tensor, seen: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Positions (B, T) counted over real tokens only, from 0 in each packed sequence."""
    if cu_seqlens is not None:
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True)
        return (steps - cu_seqlens[sequence])[None]
    if mask is None:
        return seen[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
    return seen[:, None] + (mask.long().cumsum(1) - 1).clamp(min=0)


def visible_keys(real: Tensor | None, past: int, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor | None:
    """Attention mask (B or 1, 1, T, past + T), None for plain causal. A pad sees itself, so that no row is empty."""
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), torch.arange(tokens, device=device), right=True)
        return (sequence[:, None] == sequence[None, :]).tril()[None, None]
    if real is None and (past == 0 or tokens == 1):
        return None
    causal = torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)[None, None]
    if real is None:
        return causal
    itself = torch.zeros_like(causal).diagonal_scatter(torch.ones(1, 1, tokens, dtype=torch.bool, device=device), past, 2, 3)
    return causal & (real[:, None, None, :] | itself)
