"""torch.compile, a layer at a time: all layers of one kind share one graph, so that the first step stays short."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Graphs that one layer's code may have: mixers, with and without gradients, first layer and others, batch shapes.
GRAPHS = 64


@contextmanager
def compiled_layers(*models: nn.Module, wanted: bool = True, by_part: bool = False, **options: Any) -> Iterator[None]:
    """Compile every decoder layer of `models` while the block runs; parameters and names stay as they are.

    With `by_part` each norm, mixer and feed-forward is compiled by itself: what FSDP does before and after them stays between.
    `options` go to torch.compile. Not `wanted`: nothing happens. What cannot be one graph raises where it is run.
    """
    if not wanted:
        yield
        return
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    layers: list[Any] = [layer for model in models for layer in layers_of(model)]
    parts: list[Any] = [part for layer in layers for part in layer.children()] if by_part else []
    for part in parts:
        part.forward = torch.compile(part.forward, fullgraph=True, dynamic=False, **options)
    for layer in layers if not by_part else ():
        layer.compile(fullgraph=True, dynamic=False, **options)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        for part in parts:
            del part.forward


def layers_compiled(model: nn.Module) -> bool:
    """Whether the layers of `model` are compiled now, each as a whole."""
    return all(layer._compiled_call_impl is not None for layer in layers_of(model))


def layers_of(model: Any) -> list[Any]:
    """The decoder layers."""
    return list(model.model.layers)
