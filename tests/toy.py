"""An engine without a model: its logits depend on every token fed, so that a wrong state shows at once."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from radlads.engine import Scored, StateSeats
from radlads.spec import ModelSpec
from tests.models import tiny_spec


class ToyState(NamedTuple):
    """A hash of the tokens so far stands for the state."""

    position: int
    mixed: int


class ToyEngine:
    """Keeps the Engine protocol; `fed` holds the tokens of every call."""

    name, device = "toy", "paper"

    def __init__(self, spec: ModelSpec | None = None, loud: Sequence[int] = ()) -> None:
        self.spec = spec or tiny_spec()
        self.loud = list(loud)  # tokens to write one after the other, whatever was fed
        self.fed: list[list[int]] = []

    def start(self) -> ToyState:
        return ToyState(0, 7)

    def feed(self, state: ToyState, tokens: Sequence[int]) -> tuple[np.ndarray, ToyState]:
        self.fed.append(list(tokens))
        mixed = state.mixed
        for token in tokens:
            mixed = (mixed * 31 + token + 1) % 2**31
        logits = np.random.default_rng(mixed).standard_normal(self.spec.vocab_size).astype(np.float32)
        if self.loud:
            logits[self.loud.pop(0)] = 50.0
        return logits, ToyState(state.position + len(tokens), mixed)

    def feed_many(self, states: Sequence[ToyState], tokens: Sequence[int]) -> tuple[np.ndarray, list[ToyState]]:
        fed = [self.feed(state, [token]) for state, token in zip(states, tokens, strict=True)]
        return np.stack([logits for logits, _ in fed]), [state for _, state in fed]

    def seats(self, count: int) -> StateSeats:
        return StateSeats(self, count)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scored]:
        scored = []
        for tokens in sequences:
            state, logprobs, likeliest = self.start(), [], []
            for token, wanted in pairwise(tokens):
                logits, state = self.feed(state, [token])
                logprobs.append(logits[wanted] - np.logaddexp.reduce(logits))
                likeliest.append(int(logits.argmax()) == wanted)
            scored.append(Scored(np.array(logprobs, np.float32), np.array(likeliest, bool)))
        return scored

    def state_arrays(self, state: ToyState) -> dict[str, np.ndarray]:
        return {"toy": np.array(state)}

    def from_arrays(self, arrays: dict[str, Any]) -> ToyState:
        return ToyState(*map(int, arrays["toy"]))
