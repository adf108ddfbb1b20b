"""What a mixer declares: its tensors, its state, and how both depend on the model's dimensions.

Standard library only: the model files shipped in a checkpoint carry this module.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One tensor of a model: its name, shape, first value and treatment.

    `init` is "copy" (the teacher's tensor), or a rule of `radlads.inits` such as "zeros", "const:0.85",
    "uniform:0.01", "orthogonal:0.1", "decay6", "decay7".
    `group` is the optimiser group: "mixer" or "base". `keep` marks tensors that quantisation must not touch.
    `read` is False for a tensor that stands in published files but that no forward pass reads.
    """

    name: str
    shape: tuple[int, ...]
    init: str = "copy"
    group: str = "base"
    keep: bool = False
    read: bool = True


@dataclass(frozen=True)
class Mixer:
    """A kind of token mixing: `rows(spec, layer)` yields its tensors, named below `self_attn.`.

    `state(spec)` maps the names of its recurrent state to shapes without the batch axis; softmax attention has
    none of constant size. `ranks` names the low-rank widths it uses. `recurrent` is False for softmax.
    """

    name: str
    rows: Callable[[Any, int], Iterator[Row]]
    state: Callable[[Any], dict[str, tuple[int, ...]]]
    recurrent: bool = True
    ranks: tuple[str, ...] = field(default=())


def projection_rows(spec: Any) -> Iterator[Row]:
    """q, k, v, o with the teacher's names, biases and per-head norms (`spec`: ModelSpec)."""
    for name, width in (("q_proj", spec.C), ("k_proj", spec.Ckv), ("v_proj", spec.Ckv)):
        yield Row(f"{name}.weight", (width, spec.D), group="mixer")
        if spec.qkv_bias:
            yield Row(f"{name}.bias", (width,), group="mixer")
    yield Row("o_proj.weight", (spec.D, spec.C), group="mixer")
    if spec.output_bias:
        yield Row("o_proj.bias", (spec.D,), group="mixer")
    if spec.qk_norm:
        yield Row("q_norm.weight", (spec.N,), group="mixer")
        yield Row("k_norm.weight", (spec.N,), group="mixer")
