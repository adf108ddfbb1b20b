"""The engine of the MLX backend: tokens in, logits and a new state out (radlads.engine says the contract)."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from radlads.backends.mlx.adapters import apply_adapter
from radlads.backends.mlx.layers import SEEN, SHIFT, WKV
from radlads.backends.mlx.load import load_model
from radlads.backends.mlx.model import Model
from radlads.engine import Scored, Seats, StateSeats
from radlads.errors import fail
from radlads.folder import ModelFolder
from radlads.positions import rope_depends_on_length

# Tokens per forward pass, so that the memory of a long prompt does not grow with it.
PREFILL_STEP = 1024
Layers = tuple[dict[str, mx.array], ...]
# Names in a state file: of the slots of a recurrent layer, and of a softmax layer's keys and values.
SLOTS = {WKV: "wkv", SHIFT: "shift"}


class MlxState:
    """Tokens fed, and per layer the arrays of its cache by name: wkv, shift, or k and v (1, Hkv, S, N). A value: never changed.

    After a step of several sequences it is row `row` of their joint arrays `held`, until its own are asked for.
    """

    def __init__(self, position: int, held: Layers, row: int | None = None) -> None:
        self.position, self.held, self.row = position, held, row

    @property
    def layers(self) -> Layers:
        """The arrays of this sequence alone, in memory of their own: a slice would keep the states of all the others alive."""
        if self.row is not None:
            row = mx.array([self.row])
            self.held, self.row = tuple({name: x[row] for name, x in layer.items()} for layer in self.held), None
            mx.eval(self.held)
        return self.held


class MlxEngine:
    """One loaded model, batch 1."""

    name = "mlx"

    def __init__(
        self, model: Model, initial: Mapping[str, npt.NDArray[Any]] | None = None, *, compiled: bool | None = None
    ) -> None:
        """`initial` is a trained state before the first token, by the names of a state adapter.

        `compiled` fuses the small operations of a decode step; None means on a GPU (on a CPU MLX would run a C++ compiler).
        """
        self.model = model
        self.spec = model.spec
        layers: list[dict[str, mx.array]] = [{} for _ in self.spec.mixers]
        for full, x in (initial or {}).items():
            _, layer, name = full.split(".")
            layers[int(layer)][name] = mx.array(x) if name == "wkv" else mx.array(x).astype(model.model.norm.weight.dtype)
        self.initial = MlxState(0, tuple(layers))
        self._rows: WeakSet[MlxState] = WeakSet()  # states that may still be rows of joint arrays
        self.device = str(mx.default_device().type).rsplit(".", 1)[-1]
        # Keys and values grow with every token and tables of some rotary positions with the length: no graph of those lasts.
        lasting = not self.spec.kept_layers and not rope_depends_on_length(self.spec)
        fuse = lasting and (self.device == "gpu" if compiled is None else compiled)
        self._decode = mx.compile(self._decoded) if fuse else self._decoded

    def start(self) -> MlxState:
        """The state before the first token."""
        return self.initial

    def feed(self, state: MlxState, tokens: Sequence[int]) -> tuple[npt.NDArray[np.float32], MlxState]:
        """Logits (V,) after the last of `tokens` (at least one), and the new state; `state` stays as it is."""
        if not tokens:
            raise ValueError("no tokens to feed")
        if len(tokens) == 1 and self._batched([state]):
            rows, (state,) = self.feed_many([state], tokens)
            return rows[0], state
        for first in range(0, len(tokens), PREFILL_STEP):
            hidden, state = self._step(state, tokens[first : first + PREFILL_STEP])
        logits = self.model.head(hidden[-1]).astype(mx.float32)
        return np.array(logits), state

    def feed_many(self, states: Sequence[MlxState], tokens: Sequence[int]) -> tuple[npt.NDArray[np.float32], list[MlxState]]:
        """One token to each of several sequences, in one forward pass; logits (n, V) and the new states.

        Sequences with softmax layers or without a token so far have states of different shapes: those go one by one.
        """
        if not self._batched(states):
            fed = [self.feed(state, [token]) for state, token in zip(states, tokens, strict=True)]
            return np.stack([logits for logits, _ in fed]), [state for _, state in fed]
        seen = mx.array([state.position for state in states], mx.int32)
        logits, layers = self._decode(mx.array(list(tokens))[:, None], seen, list(self._joined(states)))
        joint = tuple(layers)
        mx.eval(logits, joint)
        if len(states) == 1:
            return np.array(logits), [MlxState(states[0].position + 1, joint)]
        after = [MlxState(state.position + 1, joint, row) for row, state in enumerate(states)]
        self._rows.update(after)
        return np.array(logits), after

    def seats(self, count: int) -> Seats:
        """Seats over feed_many, which joins the states of sequences that go on together only once."""
        return StateSeats(self, count)

    def _joined(self, states: Sequence[MlxState]) -> Layers:
        """The arrays of the states, one above the other: those of the step before where the same sequences go on together."""
        # A state that somebody keeps, while the others of its step go on, takes its own arrays: theirs can be let go.
        for kept in set(self._rows) - set(states):
            self._rows.discard(kept)
            _ = kept.layers
        held = states[0].held
        in_order = all(state.held is held and state.row == row for row, state in enumerate(states))
        if in_order and len(held[0]["wkv"]) == len(states):
            return held
        parts = zip(*(state.layers for state in states), strict=True)
        return tuple({name: mx.concatenate([x[name] for x in layer]) for name in layer[0]} for layer in parts)

    def _batched(self, states: Sequence[MlxState]) -> bool:
        """Whether the states stack: none of them grows, and none is still empty."""
        return not self.spec.kept_layers and all(state.position > 0 for state in states)

    def _decoded(
        self, tokens: mx.array, seen: mx.array, layers: list[dict[str, mx.array]]
    ) -> tuple[mx.array, list[dict[str, mx.array]]]:
        """One token to each row of a batch: tokens (B, 1), those seen before (B,), states by layer; logits (B, V), new states."""
        caches = self.model.make_cache()
        for cache, arrays in zip(caches, layers, strict=True):
            fill(cache, seen, arrays)
        hidden = self.model.model(tokens, caches)[:, -1]
        return self.model.head(hidden).astype(mx.float32), [_taken(cache) for cache in caches]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scored]:
        """Score whole sequences (at least one token each), one after the other, in steps of bounded memory."""
        return [self._score(list(tokens)) for tokens in sequences]

    def _score(self, tokens: list[int]) -> Scored:
        state = self.start()
        logprobs, likeliest = [np.zeros(0, np.float32)], [np.zeros(0, np.bool_)]
        for first in range(0, len(tokens) - 1, PREFILL_STEP):
            wanted = mx.array(tokens[first + 1 : first + 1 + PREFILL_STEP])
            hidden, state = self._step(state, tokens[first : first + len(wanted)])
            logits = self.model.head(hidden).astype(mx.float32)
            chosen = mx.take_along_axis(logits, wanted[:, None], 1)[:, 0] - mx.logsumexp(logits, 1)
            logprobs.append(np.array(chosen))
            likeliest.append(np.array(mx.argmax(logits, 1) == wanted))
        return Scored(np.concatenate(logprobs), np.concatenate(likeliest))

    def _step(self, state: MlxState, tokens: Sequence[int]) -> tuple[mx.array, MlxState]:
        caches = self._caches(state)
        hidden = self.model.model(mx.array(list(tokens))[None], caches)[0]  # (T, D)
        state = MlxState(state.position + len(tokens), tuple(_taken(cache) for cache in caches))
        mx.eval(hidden, state.layers)
        if len(tokens) > 1:
            mx.clear_cache()
        return hidden, state

    def _caches(self, state: MlxState) -> list[Any]:
        """Fresh caches that hold the state's arrays. No array of the state is written to: KVCache grows by copying."""
        caches = self.model.make_cache()
        for cache, mixer, arrays in zip(caches, self.spec.mixers, state.layers, strict=True):
            if not arrays:
                continue
            if mixer == "softmax":
                cache.state = (arrays["k"], arrays["v"], state.position)
            else:
                fill(cache, mx.array([state.position], mx.int32), arrays)
        return caches

    def state_arrays(self, state: MlxState) -> dict[str, npt.NDArray[Any]]:
        """`position`, and per layer `layers.i.wkv` (1, H, N, N), `.shift` (1, 1, D), or `.k`, `.v` (1, S, Hkv, N); float32."""
        arrays: dict[str, npt.NDArray[Any]] = {"position": np.array(state.position, np.int64)}
        for layer, held in enumerate(state.layers):
            for name, x in held.items():
                x = x.swapaxes(1, 2) if name in ("k", "v") else x
                arrays[f"layers.{layer}.{name}"] = np.array(x.astype(mx.float32))
        return arrays

    def from_arrays(self, arrays: dict[str, npt.NDArray[Any]]) -> MlxState:
        """The inverse of `state_arrays`; R304 when names or shapes do not fit the model."""
        stored = arrays.get("position", np.zeros(0))
        position = int(stored) if stored.shape == () and stored.dtype.kind in "iu" else -1
        expected = self._state_shapes(position) if position > 0 else {}
        found = {name: x.shape for name, x in arrays.items() if name != "position"}
        if position < 0 or found != expected:
            wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            why = f"it is not a state of this model: {', '.join(wrong[:3]) or 'position'} does not fit"
            raise fail("R304", where="state", why=why, fix="Load the state with the model that made it")
        layers: list[dict[str, mx.array]] = [{} for _ in self.spec.mixers]
        for full in expected:
            _, layer, name = full.split(".")
            x = mx.array(arrays[full])
            x = x.swapaxes(1, 2) if name in ("k", "v") else x
            layers[int(layer)][name] = x if name == "wkv" else x.astype(self.model.model.norm.weight.dtype)
        return MlxState(position, tuple(layers))

    def _state_shapes(self, position: int) -> dict[str, tuple[int, ...]]:
        """The arrays of a state after `position` tokens, with their shapes."""
        keys = dict.fromkeys("kv", (position, self.spec.Hkv, self.spec.N))
        layers = (keys if mixer == "softmax" else held for mixer, held in zip(self.spec.mixers, self.spec.state(), strict=True))
        return {f"layers.{i}.{name}": (1, *shape) for i, held in enumerate(layers) for name, shape in held.items()}


def load_engine(folder: ModelFolder, dtype: str | None = None) -> MlxEngine:
    """The engine of a model folder; `dtype` None means the file's own on a GPU and float32 on the CPU, as torch has it."""
    on_cpu = mx.default_device() == mx.cpu
    model, adapter = load_model(folder, dtype or ("float32" if on_cpu else None)), folder.adapter
    if adapter is None:
        return MlxEngine(model)
    apply_adapter(model, adapter)
    return MlxEngine(model, adapter.tensors() if adapter.kind == "state" else None)


def fill(cache: Any, seen: mx.array, arrays: dict[str, mx.array]) -> None:
    """Put tokens seen (B,) and the arrays of a state into an empty cache of a recurrent layer."""
    cache[SEEN] = seen
    for slot, name in SLOTS.items():
        if name in arrays:
            cache[slot] = arrays[name]


def _taken(cache: Any) -> dict[str, mx.array]:
    """The arrays that a layer's cache holds after a step, by name."""
    if hasattr(cache, "keys_and_values"):
        return dict(zip("kv", cache.keys_and_values(), strict=True))
    return {name: cache[slot] for slot, name in SLOTS.items() if slot < len(cache.cache)}
