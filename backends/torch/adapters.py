"""Adapters in a model on PyTorch: peft's LoRA and DoRA layers, whole weights, and the state before the first token."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from radlads.adapters import Adapter
from radlads.backends.torch.model import Model
from radlads.backends.torch.state import LayerState, ModelState, empty_state
from radlads.errors import fail

# Where peft's layers keep the parts of an adapter.
PLACES = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}


def apply_adapter(model: Model, adapter: Adapter) -> None:
    """Put a lora, dora or full adapter into a model; a state is the engine's affair."""
    if adapter.kind in ("lora", "dora"):
        dora = adapter.kind == "dora"
        add_layers(model, adapter.modules(), adapter.rank, adapter.scale, adapter.dropout, dora)
    if adapter.kind != "state":
        for name, place in places(model, list(adapter.entries)).items():
            put(place, adapter.array(name))
    model.eval().requires_grad_(False)


def add_layers(model: Model, modules: list[str], rank: int, scale: float, dropout: float, dora: bool) -> None:
    """Make linear modules peft's LoRA or DoRA layers, with float32 adapters. Raises R104 without peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        why = "peft is not installed"
        raise fail("R104", where="adapters on PyTorch", why=why, fix="Run `pip install 'radlads[finetune]'`") from None
    config = LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=dropout, target_modules=modules, use_dora=dora)
    inject_adapter_in_model(config, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(tuple(PLACES.values())):
                parameter.data = parameter.data.float()


class Place(NamedTuple):
    """Where a tensor of an adapter lives; peft's matrices are the transposes of what the file holds."""

    parameter: nn.Parameter
    turned: bool


def places(model: Model, names: Iterable[str]) -> dict[str, Place]:
    """The places of an adapter's tensors in a model."""
    known, found = dict(model.named_parameters()), {}
    for name in names:
        module, _, part = name.rpartition(".")
        inner = known.get(f"{module}.{PLACES[part]}") if part in PLACES else None
        found[name] = Place(known[name] if inner is None else inner, inner is not None and inner.ndim == 2)
    return found


@torch.no_grad()
def put(place: Place, value: npt.NDArray[Any]) -> None:
    """Set a tensor to what an adapter holds."""
    x = torch.from_numpy(np.array(value))
    place.parameter.copy_(x.T if place.turned else x)


def taken(place: Place, x: Tensor) -> npt.NDArray[Any]:
    """A copy of the values x of a place as the adapter's file has them, float32."""
    x = x.detach().float().cpu()
    return np.array((x.T if place.turned else x).numpy(), order="C")


def initial_state(model: Model, values: Mapping[str, Tensor], batch: int) -> ModelState:
    """The state before the first token of a batch, from `layers.i.wkv` and `layers.i.shift` of one row."""
    parameter = model.model.norm.weight
    layers: list[LayerState] = [{} for _ in range(model.spec.L)]
    for name, x in values.items():
        _, layer, slot = name.split(".")
        x = x.to(parameter.device, torch.float32 if slot == "wkv" else parameter.dtype)
        layers[int(layer)][slot] = x.expand(batch, *x.shape[1:])
    return replace(empty_state(model.spec, batch, parameter.device), layers=tuple(layers))
