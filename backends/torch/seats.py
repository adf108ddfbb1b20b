"""Sequences written side by side, each at a length of its own: their states lie in one pool a layer and are never moved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from radlads.backends.torch.decode import empty_states, feed_forward_step, logits_of, recurrent_step
from radlads.backends.torch.layer_step import step_has_kernels
from radlads.backends.torch.model import Model
from radlads.backends.torch.state import MixContext, ModelState


@dataclass(frozen=True)
class TorchState:
    """The state of one sequence."""

    model: ModelState
    position: int


class TorchSeats:
    """`count` seats in a model without softmax layers, whose caches would grow (see radlads.engine.Seats)."""

    def __init__(self, model: Model, count: int) -> None:
        self.model = model
        self.layers = empty_states(model, count)
        self.device = model.model.norm.weight.device
        self.seen = torch.zeros(count, dtype=torch.long, device=self.device)
        self.fused = [step_has_kernels(model, rows) for rows in range(count + 1)]
        self.free = list(reversed(range(count)))

    @torch.no_grad()
    def enter(self, state: TorchState) -> int:
        """A seat for a copy of `state`. Raises ValueError when all are taken."""
        if not self.free:
            raise ValueError("all seats are taken")
        seat = self.free[-1]
        for pool, found in zip(self.layers, state.model.layers, strict=True):
            for name, values in pool.items():
                if name in found:
                    values[seat].copy_(found[name][0])
                else:
                    values[seat].zero_()
        self.seen[seat] = state.position
        return self.free.pop()

    def leave(self, seat: int) -> None:
        """The seat is free again."""
        self.free.append(seat)

    @torch.no_grad()
    def state(self, seat: int) -> TorchState:
        """A copy of the state in a seat."""
        layers = tuple({name: values[seat : seat + 1].clone() for name, values in pool.items()} for pool in self.layers)
        seen = self.seen[seat : seat + 1].clone()
        return TorchState(ModelState(layers, seen), int(seen))

    @torch.no_grad()
    def step(self, seats: Sequence[int], tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """One token to each of these seats; logits (n, V) after it. Raises ValueError for a seat given twice or free."""
        if len(set(seats)) < len(seats) or set(seats) & set(self.free):
            raise ValueError(f"seats must be taken, and each given once, got {list(seats)}")
        decoder, slots = self.model.model, torch.tensor(list(seats), device=self.device)
        layers: list[Any] = list(decoder.layers)
        x = decoder.embed_tokens(torch.tensor(list(tokens), device=self.device))[:, None]
        context = MixContext(decoder.rotary(self.seen[slots][:, None], x.dtype), in_place=True, slots=slots)
        fused = self.fused[len(seats)]
        for layer, held in zip(layers, self.layers, strict=True):
            x = recurrent_step(layer, x, context, held, fused)
            x = feed_forward_step(layer, x, fused)
        self.seen[slots] += 1
        return logits_of(self.model, decoder.norm(x)[:, 0]).cpu().numpy()
