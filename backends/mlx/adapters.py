"""Adapters in a model on MLX: the LoRA and DoRA layers of mlx-lm's tuner, and whole weights; a state is the engine's affair."""

import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from radlads.adapters import Adapter
from radlads.backends.mlx.model import Model


def apply_adapter(model: Model, adapter: Adapter) -> None:
    """Put a lora, dora or full adapter into a model; a state is the engine's affair."""
    if adapter.kind in ("lora", "dora"):
        dora = adapter.kind == "dora"
        add_layers(model, adapter.modules(), adapter.rank, adapter.scale, adapter.dropout, dora)
    if adapter.kind != "state":
        dtype = model.model.norm.weight.dtype if adapter.kind == "full" else mx.float32
        model.load_weights([(name, mx.array(adapter.array(name)).astype(dtype)) for name in adapter.entries], strict=False)
    model.eval()


def add_layers(model: Model, modules: list[str], rank: int, scale: float, dropout: float, dora: bool) -> None:
    """Make linear modules mlx-lm's LoRA or DoRA layers."""
    kind, named = DoRALinear if dora else LoRALinear, dict(model.named_modules())
    layers = [(name, kind.from_base(named[name], r=rank, scale=scale, dropout=dropout)) for name in modules]
    model.update_modules(tree_unflatten(layers))
