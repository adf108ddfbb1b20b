"""The torch engine: tokens in, logits and a new state out (see radlads.engine)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from radlads.backends.torch.adapters import apply_adapter, initial_state
from radlads.backends.torch.decode import LOGITS_AT_ONCE, log_probabilities, logits_of
from radlads.backends.torch.load import load_model
from radlads.backends.torch.model import Model
from radlads.backends.torch.seats import TorchSeats, TorchState
from radlads.backends.torch.state import ModelState
from radlads.engine import Scored, Seats, StateSeats
from radlads.errors import fail
from radlads.folder import ModelFolder
from radlads.spec import ModelSpec

# Tokens of one forward pass while scoring.
SCORED_AT_ONCE = 16384


class TorchEngine:
    """A model on one device, fed one sequence at a time."""

    name = "torch"

    def __init__(self, model: Model, initial: Mapping[str, torch.Tensor] | None = None) -> None:
        """`initial` is a trained state before the first token, by the names of a state adapter."""
        self.model = model
        self.initial = initial or {}

    @property
    def spec(self) -> ModelSpec:
        """Dimensions and mixers of the model."""
        return self.model.spec

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(next(self.model.parameters()).device)

    def start(self) -> TorchState:
        """The state before the first token."""
        return TorchState(initial_state(self.model, self.initial, 1), 0)

    @torch.inference_mode()
    def feed(self, state: TorchState, tokens: Sequence[int]) -> tuple[npt.NDArray[np.float32], TorchState]:
        """Logits (V,) after the last of `tokens`, and the new state."""
        hidden, model_state = self.model.model(torch.tensor([list(tokens)], device=self.device), state.model)
        logits = logits_of(self.model, hidden[0, -1]).cpu().numpy()
        return logits, TorchState(model_state, state.position + len(tokens))

    @torch.inference_mode()
    def feed_many(
        self, states: Sequence[TorchState], tokens: Sequence[int]
    ) -> tuple[npt.NDArray[np.float32], list[TorchState]]:
        """One token to each of several sequences, in one forward pass; logits (n, V) and the new states.

        Sequences with softmax layers or without a token so far have states of different shapes: those go one by one.
        """
        if len(states) == 1 or self.spec.kept_layers or any(state.position == 0 for state in states):
            fed = [self.feed(state, [token]) for state, token in zip(states, tokens, strict=True)]
            return np.stack([logits for logits, _ in fed]), [state for _, state in fed]
        names = [tuple(layer) for layer in states[0].model.layers]
        layers = tuple(
            {name: torch.cat([state.model.layers[index][name] for state in states]) for name in held}
            for index, held in enumerate(names)
        )
        joint = ModelState(layers, torch.cat([state.model.seen for state in states]))
        hidden, joint = self.model.model(torch.tensor(tokens, device=self.device)[:, None], joint)
        logits = logits_of(self.model, hidden[:, -1]).cpu().numpy()
        after = []
        for row, state in enumerate(states):
            # In memory of its own: a view would keep the states of all the others alive.
            own = tuple({name: value[row : row + 1].clone() for name, value in layer.items()} for layer in joint.layers)
            after.append(TorchState(ModelState(own, joint.seen[row : row + 1]), state.position + 1))
        return logits, after

    def seats(self, count: int) -> Seats:
        """Seats whose states are advanced in place; where softmax layers' caches grow, states that are replaced."""
        return StateSeats(self, count) if self.spec.kept_layers else TorchSeats(self.model, count)

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scored]:
        """Score whole sequences, those of like length together; what pads a row stands after all that is read."""
        scored: dict[int, Scored] = {}
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]), reverse=True)
        while order:
            width = max(2, len(sequences[order[0]]))
            rows, order = order[: max(1, SCORED_AT_ONCE // width)], order[max(1, SCORED_AT_ONCE // width) :]
            tokens = torch.zeros(len(rows), width, dtype=torch.long)
            for row, index in zip(tokens, rows, strict=True):
                row[: len(sequences[index])] = torch.tensor(list(sequences[index]))
            tokens = tokens.to(self.device)
            hidden, _ = self.model.model(tokens[:, :-1], initial_state(self.model, self.initial, len(rows)))
            logprobs, likeliest = self.judge(hidden.flatten(0, 1), tokens[:, 1:].flatten())
            for row, index in enumerate(rows):
                part = slice(row * (width - 1), row * (width - 1) + len(sequences[index]) - 1)
                scored[index] = Scored(logprobs[part], likeliest[part])
        return [scored[index] for index in range(len(sequences))]

    def judge(self, hidden: torch.Tensor, wanted: torch.Tensor) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Log-probability of each token `wanted` (n,) after the hidden states (n, D), and whether it is the likeliest."""
        logprobs, likeliest = [], []
        for rows, ids in zip(hidden.split(LOGITS_AT_ONCE), wanted.split(LOGITS_AT_ONCE), strict=True):
            log_p = log_probabilities(self.model, rows)
            logprobs.append(log_p.gather(1, ids[:, None])[:, 0])
            likeliest.append(log_p.argmax(-1) == ids)
        return torch.cat(logprobs).cpu().numpy(), torch.cat(likeliest).cpu().numpy()

    def state_arrays(self, state: TorchState) -> dict[str, npt.NDArray[Any]]:
        """The state as float32 arrays named `layers.<i>.<name>`, and `position`."""
        arrays: dict[str, npt.NDArray[Any]] = {"position": np.array(state.position, np.int64)}
        for index, layer in enumerate(state.model.layers):
            arrays |= {f"layers.{index}.{name}": value.float().cpu().numpy() for name, value in layer.items()}
        return arrays

    def from_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> TorchState:
        """The inverse of `state_arrays`. R304 when the arrays do not fit the model."""
        state, dtype = self.start(), next(self.model.parameters()).dtype
        position = int(arrays.get("position", -1))
        layers: list[dict[str, torch.Tensor]] = []
        for index, mixer in enumerate(self.spec.mixers):
            kept = (position, self.spec.Hkv, self.spec.N)
            shapes = {"k": kept, "v": kept} if mixer == "softmax" else self.spec.state()[index]
            layer = {}
            for name, shape in shapes.items() if position else ():
                array = arrays.get(f"layers.{index}.{name}")
                if array is None or array.shape != (1, *shape):
                    why = f"layers.{index}.{name} is missing or has another shape than {(1, *shape)}"
                    raise fail("R304", where="state", why=why, fix="Use a state saved with this model")
                layer[name] = torch.from_numpy(array).to(self.device, torch.float32 if name == "wkv" else dtype)
            layers.append(layer)
        if position < 0:
            raise fail("R304", where="state", why="it has no position", fix="Use a state saved with this model")
        return TorchState(ModelState(tuple(layers), state.model.seen + position), position)


def load_engine(folder: ModelFolder, dtype: str | None = None) -> TorchEngine:
    """An engine for the model of `folder`, on a GPU where there is one; on the CPU float32 unless `dtype` says otherwise."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(folder, device=device, dtype=dtype or ("float32" if device == "cpu" else None))
    adapter = folder.adapter
    if adapter is None:
        return TorchEngine(model)
    apply_adapter(model, adapter)
    initial = {name: torch.from_numpy(x).to(device) for name, x in adapter.tensors().items()} if adapter.kind == "state" else None
    return TorchEngine(model, initial)
