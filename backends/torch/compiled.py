"""torch.compile, a layer at a time: all layers of one kind share one graph, so that the first step stays short."""

from typing import Any

from torch import nn

# Graphs that one layer's code may have: mixers, with and without gradients, first layer and others, batch shapes.
GRAPHS = 64


def compile_layers(model: nn.Module) -> None:
    """Compile every decoder layer of `model` in place; parameters, names and results stay as they are."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    layers: Any = model.model.layers
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False)


def compiles_layers(model: nn.Module) -> bool:
    """Whether compile_layers was called on `model`."""
    layers: Any = model.model.layers
    return layers[0]._compiled_call_impl is not None
