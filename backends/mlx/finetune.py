"""Fine-tuning on MLX, also of quantised models: which tensors are trained, and one update of them (radlads.tuning.loop.Tuner)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from radlads.adapters import Settings, chosen_modules, first_values, full_names
from radlads.backends.mlx.adapters import add_layers
from radlads.backends.mlx.layers import SEEN, SHIFT, WKV
from radlads.backends.mlx.load import load_model
from radlads.backends.mlx.model import Model
from radlads.errors import fail
from radlads.folder import ModelFolder
from radlads.tuning.examples import Batch
from radlads.tuning.loop import Loss
from radlads.tuning.settings import Tuning

Arrays = dict[str, npt.NDArray[Any]]
SLOTS = {"wkv": WKV, "shift": SHIFT}


class InitialState(nn.Module):
    """The state before the first token as parameters: `layers.i.wkv` and `layers.i.shift`."""

    def __init__(self, values: Mapping[str, npt.NDArray[Any]]) -> None:
        super().__init__()
        for name, x in values.items():
            self[name] = mx.array(x)

    def caches(self, model: Model, batch: int) -> list[Any]:
        """Caches of a batch that stand before its first token; None for softmax layers."""
        caches: list[Any] = [None] * model.spec.L
        for full, x in self.items():
            _, index, slot = full.split(".")
            if caches[int(index)] is None:
                caches[int(index)] = model.layers[int(index)].self_attn.make_cache()
                caches[int(index)][SEEN] = mx.zeros((batch,), mx.int32)
            caches[int(index)][SLOTS[slot]] = mx.broadcast_to(x, (batch, *x.shape[1:]))
        return caches


class MlxTuner:
    """A model with the tensors that are trained; see radlads.tuning.loop.Tuner."""

    def __init__(self, model: Model, tuning: Tuning, settings: Settings) -> None:
        self.model, self.tuning, self.settings = model, tuning, settings
        self.device = str(mx.default_device().type).rsplit(".", 1)[-1]
        spec = model.spec
        model.freeze()
        self.trained: nn.Module = model
        if settings.kind == "full":
            unfreeze(model, full_names(spec, settings.layers))
        else:
            values = first_values(spec, settings, tuning.seed)
            if settings.kind == "state":
                self.trained = InitialState(values)
            else:
                dora = settings.kind == "dora"
                add_layers(model, chosen_modules(spec, settings), settings.rank, settings.scale, settings.dropout, dora)
                # The new layers are not frozen, what they wrap still is.
                self.load(values)
        self.names = list(dict(tree_flatten(self.trained.trainable_parameters())))
        if tuning.grad_checkpoint:
            for layer in model.layers:
                recompute(layer)
        self.optimizer = optimizer_of(tuning)
        self.optimizer.init(self.trained.trainable_parameters())
        self.state = [self.trained.state, self.optimizer.state, mx.random.state]
        self.value_and_grad = nn.value_and_grad(self.trained, self.mean)
        # On a CPU mx.compile calls a C++ compiler for every shape, which takes longer than it saves.
        compiled = mx.default_device() != mx.cpu
        self.step = partial(mx.compile, inputs=self.state, outputs=self.state)(self.one) if compiled else self.one
        self.last = partial(mx.compile, inputs=self.state, outputs=self.state)(self.final) if compiled else self.final

    def mean(self, inputs: mx.array, targets: mx.array, counted: mx.array) -> mx.array:
        """Mean cross-entropy of a batch over the tokens that count."""
        caches = self.trained.caches(self.model, len(inputs)) if self.settings.kind == "state" else None
        logits = self.model(inputs, caches).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, targets)
        return (losses * counted).sum() / mx.maximum(counted.sum(), 1)

    def one(self, batch: list[mx.array], before: Any) -> tuple[mx.array, Any]:
        """Loss and gradient of a batch, the latter added to the one before."""
        loss, grad = self.value_and_grad(*batch)
        return loss, grad if before is None else tree_map(mx.add, before, grad)

    def final(self, batch: list[mx.array], before: Any, count: int) -> mx.array:
        """The last batch of an update: its loss, after which the mean gradient of all `count` has been applied."""
        loss, grad = self.one(batch, before)
        self.optimizer.update(self.trained, grad if count == 1 else tree_map(lambda x: x / count, grad))
        return loss

    def update(self, batches: list[Batch], rate: float, seed: int) -> list[Loss]:
        """One update; see Tuner."""
        mx.random.seed(seed)
        self.model.train()
        self.optimizer.learning_rate = rate
        before, losses = None, []
        for number, batch in enumerate(batches, 1):
            arrays = as_arrays(batch)
            if number < len(batches):
                loss, before = self.step(arrays, before)
            else:
                loss = self.last(arrays, before, len(batches))
            mx.eval(loss, before, self.state)
            losses.append(Loss(float(loss), int(batch.counted.sum())))
        return losses

    def loss(self, batch: Batch) -> Loss:
        """The loss of a batch, without dropout."""
        self.model.eval()
        return Loss(float(self.mean(*as_arrays(batch))), int(batch.counted.sum()))

    def gradients(self, batch: Batch) -> Arrays:
        """The gradient of a batch's mean loss in every tensor."""
        self.model.train()
        _, grad = self.value_and_grad(*as_arrays(batch))
        return as_numpy(dict(tree_flatten(grad)))

    def tensors(self) -> Arrays:
        """What is trained, float32."""
        return as_numpy(dict(tree_flatten(self.trained.trainable_parameters())))

    def load(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over tensors, all or some."""
        if self.settings.kind == "state":
            self.trained.update({name: mx.array(x) for name, x in tensors.items()})
            return
        known = dict(tree_flatten(self.model.parameters()))
        self.model.load_weights([(name, mx.array(x).astype(known[name].dtype)) for name, x in tensors.items()], strict=False)

    def moments(self) -> Arrays:
        """What the optimiser remembers."""
        return {name: np.array(x) for name, x in tree_flatten(self.optimizer.state)}

    def restore(self, moments: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what an optimiser remembered."""
        self.optimizer.state = tree_unflatten([(name, mx.array(x)) for name, x in moments.items()])
        self.state[1] = self.optimizer.state


def recompute(layer: nn.Module) -> None:
    """Let a layer keep its inputs alone, and compute the rest again for the gradient."""
    plain = type(layer)

    def call(self: Any, x: mx.array, mask: Any, cache: Any, carry: Any) -> tuple[mx.array, Any]:
        # Only arguments get a gradient: what the cache holds has to be one.
        def again(parameters: Any, held: Any, x: mx.array, carry: Any) -> tuple[mx.array, Any]:
            self.update(parameters)
            fresh: Any = None if held is None else self.self_attn.make_cache()
            for slot, array in enumerate(held or []):
                fresh[slot] = array
            return plain.__call__(self, x, mask, fresh, carry)

        return mx.checkpoint(again)(self.trainable_parameters(), None if cache is None else list(cache.cache), x, carry)

    layer.__class__ = type(plain.__name__, (plain,), {"__call__": call})


def unfreeze(model: Model, names: list[str]) -> None:
    """Let the named weights be trained."""
    modules = dict(model.named_modules())
    for name in names:
        path, _, leaf = name.rpartition(".")
        modules[path].unfreeze(recurse=False, keys=[leaf], strict=True)


def optimizer_of(tuning: Tuning) -> optim.Optimizer:
    """The optimiser; Adam with bias correction, unless the settings leave it out."""
    constants, rate = tuning.constants(), tuning.rate(0)
    if tuning.optimizer == "sgd":
        return optim.SGD(rate, momentum=constants.momentum, weight_decay=constants.weight_decay)
    shared = {"betas": list(constants.betas), "eps": constants.eps, "bias_correction": constants.bias_correction}
    if tuning.optimizer == "adamw":
        return optim.AdamW(rate, weight_decay=constants.weight_decay, **shared)
    return optim.Adam(rate, **shared)


def as_arrays(batch: Batch) -> list[mx.array]:
    """The three arrays of a batch."""
    return [mx.array(x) for x in batch]


def as_numpy(tensors: Mapping[str, mx.array]) -> Arrays:
    """Float32 copies."""
    return {name: np.array(x.astype(mx.float32)) for name, x in tensors.items()}


def open_tuner(folder: ModelFolder, tuning: Tuning, settings: Settings) -> MlxTuner:
    """A tuner for the model of `folder`. Raises R101 for full fine-tuning of quantised weights."""
    if settings.kind == "full" and folder.quantised:
        why = "quantised weights cannot be trained"
        raise fail("R101", where="--fine-tune-type full", why=why, fix="Train a lora or dora, or start from the float model")
    on_cpu = mx.default_device() == mx.cpu
    # Steps of full fine-tuning are smaller than what bfloat16 can tell apart.
    dtype = tuning.dtype or ("float32" if on_cpu or settings.kind == "full" else None)
    return MlxTuner(load_model(folder, dtype), tuning, settings)
