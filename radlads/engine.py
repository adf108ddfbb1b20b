"""What chat, generate and the server see of a backend: an engine that feeds tokens to a model, and its states.

Only protocols live here; `radlads.backends.open_engine` makes the real thing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from radlads.spec import ModelSpec

Logits = npt.NDArray[np.float32]


class Scored(NamedTuple):
    """What a model says of each token of a sequence but the first, given those before it."""

    logprobs: npt.NDArray[np.float32]
    """(T - 1,) log-probability of the token, in nats."""
    likeliest: npt.NDArray[np.bool_]
    """(T - 1,) whether no other token was likelier."""


class State(Protocol):
    """What a sequence leaves behind: of constant size for recurrent layers, growing for softmax layers."""

    @property
    def position(self) -> int:
        """Number of tokens fed so far."""


class Engine(Protocol):
    """A loaded model. States are values: feeding never changes the state handed in, so fork and undo are free."""

    @property
    def spec(self) -> ModelSpec:
        """Dimensions and mixers of the model."""

    @property
    def name(self) -> str:
        """Name of the backend: "torch" or "mlx"."""

    @property
    def device(self) -> str:
        """Where it computes, such as "cpu", "cuda:0" or "gpu"."""

    def start(self) -> Any:
        """The state before the first token."""

    def feed(self, state: Any, tokens: Sequence[int]) -> tuple[Logits, Any]:
        """Logits (V,) float32 after the last of `tokens` (at least one), and the new state."""

    def feed_many(self, states: Sequence[Any], tokens: Sequence[int]) -> tuple[Logits, list[Any]]:
        """One token to each of several sequences: logits (n, V) float32 and the new states."""

    def seats(self, count: int) -> "Seats":
        """Places for `count` sequences that are written side by side."""

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scored]:
        """Score whole sequences (at least one token each), each from an empty state."""

    def state_arrays(self, state: Any) -> dict[str, npt.NDArray[Any]]:
        """The state as named arrays, for a state file."""

    def from_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> Any:
        """The inverse of `state_arrays`; R304 when the arrays do not fit the model."""


class Seats(Protocol):
    """Where sequences sit that are written side by side: what a seat holds changes with every token, unlike a state."""

    def enter(self, state: Any) -> int:
        """A seat for the sequence that stands at `state`, which stays as it is. ValueError when all are taken."""

    def step(self, seats: Sequence[int], tokens: Sequence[int]) -> Logits:
        """One token to each of several seats, each named once: logits (n, V) float32 after it."""

    def state(self, seat: int) -> Any:
        """The state a seat's sequence has come to, a value like every state."""

    def leave(self, seat: int) -> None:
        """The seat is free for another sequence."""


class StateSeats:
    """Seats over states as values, by feed_many."""

    def __init__(self, engine: Engine, count: int) -> None:
        self.engine = engine
        self.free = list(reversed(range(count)))
        self.held: dict[int, Any] = {}

    def enter(self, state: Any) -> int:
        """See Seats."""
        if not self.free:
            raise ValueError("all seats are taken")
        seat = self.free.pop()
        self.held[seat] = state
        return seat

    def step(self, seats: Sequence[int], tokens: Sequence[int]) -> Logits:
        """See Seats."""
        logits, states = self.engine.feed_many([self.held[seat] for seat in seats], tokens)
        self.held.update(zip(seats, states, strict=True))
        return logits

    def state(self, seat: int) -> Any:
        """See Seats."""
        return self.held[seat]

    def leave(self, seat: int) -> None:
        """See Seats."""
        del self.held[seat]
        self.free.append(seat)
