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

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scored]:
        """Score whole sequences (at least one token each), each from an empty state."""

    def state_arrays(self, state: Any) -> dict[str, npt.NDArray[Any]]:
        """The state as named arrays, for a state file."""

    def from_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> Any:
        """The inverse of `state_arrays`; R304 when the arrays do not fit the model."""
