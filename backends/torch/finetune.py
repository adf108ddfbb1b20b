"""Fine-tuning on PyTorch: which tensors of a model are trained, and one update of them (radlads.tuning.loop.Tuner)."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from radlads.adapters import Settings, chosen_modules, first_values, full_names
from radlads.backends.torch.adapters import Place, add_layers, initial_state, places, put, taken
from radlads.backends.torch.load import load_model
from radlads.backends.torch.losses import IGNORED, distillation_loss
from radlads.backends.torch.model import Model
from radlads.backends.torch.state import LayerState, MixContext
from radlads.errors import fail
from radlads.folder import ModelFolder
from radlads.tuning.examples import Batch
from radlads.tuning.loop import Loss
from radlads.tuning.settings import Tuning

Arrays = dict[str, npt.NDArray[Any]]


class TorchTuner:
    """A model with the tensors that are trained; see radlads.tuning.loop.Tuner."""

    def __init__(self, model: Model, tuning: Tuning, settings: Settings) -> None:
        self.model, self.tuning, self.settings = model, tuning, settings
        self.device = str(model.model.norm.weight.device)
        model.requires_grad_(False)
        spec = model.spec
        if settings.kind == "state":
            values = first_values(spec, settings, tuning.seed)
            device = model.model.norm.weight.device
            self.places = {name: Place(nn.Parameter(torch.from_numpy(x).to(device)), False) for name, x in values.items()}
        elif settings.kind == "full":
            self.places = places(model, full_names(spec, settings.layers))
        else:
            modules, dora = chosen_modules(spec, settings), settings.kind == "dora"
            add_layers(model, modules, settings.rank, settings.scale, settings.dropout, dora)
            parts = ("lora_a", "lora_b", "m") if dora else ("lora_a", "lora_b")
            self.places = places(model, (f"{module}.{part}" for module in modules for part in parts))
            self.load(first_values(spec, settings, tuning.seed))
        for place in self.places.values():
            place.parameter.requires_grad_(True)
        if tuning.grad_checkpoint:
            for layer in model.model.layers:
                layer.forward = recomputed(layer.forward)  # type: ignore[method-assign, assignment]
        self.optimizer = optimizer_of(tuning, [place.parameter for place in self.places.values()])

    def mean(self, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch over the tokens that count."""
        inputs, targets, counted = (torch.from_numpy(x).to(self.device) for x in batch)
        start = None
        if self.settings.kind == "state":
            values = {name: place.parameter for name, place in self.places.items()}
            start = initial_state(self.model, values, len(inputs))
        hidden, _ = self.model.model(inputs.long(), start)
        labels = targets.long().masked_fill(~counted, IGNORED)
        return distillation_loss(hidden, self.model.head, None, labels, kl_weight=0.0, ce_weight=1.0)

    def update(self, batches: list[Batch], rate: float, seed: int) -> list[Loss]:
        """One update; see Tuner."""
        torch.manual_seed(seed)
        self.model.train()
        losses = []
        for batch in batches:
            loss = self.mean(batch)
            (loss / len(batches)).backward()
            losses.append(Loss(float(loss.detach()), int(batch.counted.sum())))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses

    @torch.no_grad()
    def loss(self, batch: Batch) -> Loss:
        """The loss of a batch, without dropout."""
        self.model.eval()
        return Loss(float(self.mean(batch)), int(batch.counted.sum()))

    def gradients(self, batch: Batch) -> Arrays:
        """The gradient of a batch's mean loss in every tensor."""
        self.model.train()
        found = torch.autograd.grad(self.mean(batch), [place.parameter for place in self.places.values()])
        return {name: taken(place, grad) for (name, place), grad in zip(self.places.items(), found, strict=True)}

    def tensors(self) -> Arrays:
        """What is trained, float32."""
        return {name: taken(place, place.parameter) for name, place in self.places.items()}

    def load(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over tensors, all or some."""
        for name, x in tensors.items():
            put(self.places[name], x)

    def moments(self) -> Arrays:
        """What the optimiser remembers, by name of the tensor and of the memory."""
        return {
            f"{name}/{key}": np.array(value.detach().float().cpu().numpy())
            for name, place in self.places.items()
            for key, value in self.optimizer.state.get(place.parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def restore(self, moments: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what an optimiser remembered."""
        for full, value in moments.items():
            name, _, key = full.rpartition("/")
            parameter = self.places[name].parameter
            x = torch.from_numpy(value)
            self.optimizer.state[parameter][key] = x if key == "step" else x.to(parameter.device, parameter.dtype)


def optimizer_of(tuning: Tuning, trained: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser, with the constants that MLX's has."""
    constants, rate = tuning.constants(), tuning.rate(0)
    if not constants.bias_correction:
        why = "PyTorch's Adam always corrects its bias"
        raise fail("R101", where="optimizer_config", why=why, fix="Leave it true, or use --backend mlx")
    if tuning.optimizer == "sgd":
        return torch.optim.SGD(trained, rate, momentum=constants.momentum, weight_decay=constants.weight_decay or 0.0)
    kind = torch.optim.AdamW if tuning.optimizer == "adamw" else torch.optim.Adam
    return kind(trained, rate, betas=constants.betas, eps=constants.eps, weight_decay=constants.weight_decay or 0.0)


def recomputed(forward: Callable[..., tuple[Tensor, LayerState]]) -> Callable[..., tuple[Tensor, LayerState]]:
    """A layer's forward pass that keeps its inputs alone and computes the rest again for the gradient."""

    def call(x: Tensor, context: MixContext, state: LayerState) -> tuple[Tensor, LayerState]:
        # What the layer leaves to later ones must look the same when it is computed again.
        before = dict(context.carry)

        def run(x: Tensor, carry: dict[str, Tensor]) -> tuple[Tensor, LayerState, dict[str, Tensor]]:
            inner = replace(context, carry=dict(carry))
            out, after = forward(x, inner, state)
            return out, after, inner.carry

        out, after, carry = checkpoint(run, x, before, use_reentrant=False)
        context.carry.update(carry)
        return out, after

    return call


def open_tuner(folder: ModelFolder, tuning: Tuning, settings: Settings) -> TorchTuner:
    """A tuner for the model of `folder`, on a GPU where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Steps of full fine-tuning are smaller than what bfloat16 can tell apart.
    dtype = tuning.dtype or ("float32" if device == "cpu" or settings.kind == "full" else None)
    return TorchTuner(load_model(folder, device=device, dtype=dtype), tuning, settings)
