"""What a mixer declares: its tensors, its state, and how both depend on the model's dimensions.

Standard library only: the model files shipped in a checkpoint carry this module.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One tensor of a model: its name, shape, first value and treatment.

    `init` is "copy" (the teacher's tensor of this name), "copy:q_proj.weight" (the teacher's tensor of that name in the same
    place), or a rule of `radlads.inits` such as "zeros", "const:0.85", "uniform:0.01", "orthogonal:0.1", "decay6".
    `group` is the optimiser group: "mixer" or "base". `keep` marks tensors that quantisation must not touch, `least_bits` those
    that it must leave so many bits.
    `read` is False for a tensor that stands in published files but that no forward pass reads.
    """

    name: str
    shape: tuple[int, ...]
    init: str = "copy"
    group: str = "base"
    keep: bool = False
    least_bits: int = 0
    read: bool = True

    @property
    def copied(self) -> bool:
        """Whether a student takes it over from its teacher."""
        return self.init.partition(":")[0] == "copy"

    def quantisation(self) -> dict[str, Any] | bool:
        """How MLX may quantise this matrix: False not at all, True as asked, or with settings of its own (MLX's names).

        Those hold groups of 64 weights, or of 32 where a row does not divide so.
        """
        if self.keep or not self.least_bits:
            return not self.keep
        group = next((size for size in (64, 32) if not self.shape[-1] % size), None)
        return False if group is None else {"group_size": group, "bits": self.least_bits, "mode": "affine"}

    def origin(self, full_name: str) -> str:
        """Full name of the teacher's tensor that the row `full_name` takes over."""
        return full_name.removesuffix(self.name) + (self.init.partition(":")[2] or self.name)


@dataclass(frozen=True)
class RankRule:
    """Width of a low-rank pair of a new student: 32 max(1, round(base^exponent factor / 32)), `base` "D" or "C"."""

    base: str
    exponent: float
    factor: float

    def width(self, spec: Any) -> int:
        """The width for a model (`spec`: ModelSpec)."""
        return 32 * max(1, round(getattr(spec, self.base) ** self.exponent * self.factor / 32))


@dataclass(frozen=True)
class Mixer:
    """A kind of token mixing: `rows(spec, layer)` yields its tensors, named below `self_attn.`.

    `state(spec)` maps the names of its recurrent state to shapes without the batch axis; softmax attention has
    none of constant size. `ranks` holds the rule of each low-rank width it uses, `flags` the MixerOptions it reads,
    `scan_flops` the operations of the recurrence per head as a multiple of N^2. `recurrent` is False for softmax.
    """

    name: str
    rows: Callable[[Any, int], Iterator[Row]]
    state: Callable[[Any], dict[str, tuple[int, ...]]]
    recurrent: bool = True
    ranks: Mapping[str, RankRule] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    scan_flops: int = 0


@dataclass(frozen=True)
class ProjectionNames:
    """How a mixer names its projections and per-head norms."""

    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    q_norm: str = "q_norm"
    k_norm: str = "k_norm"


TEACHER_NAMES = ProjectionNames()


def projection_rows(spec: Any, names: ProjectionNames = TEACHER_NAMES, recurrent: bool = True) -> Iterator[Row]:
    """q, k, v, o with the teacher's biases and per-head norms, under `names` (`spec`: ModelSpec).

    What a recurrent mixer writes into its state keeps 8 bits: of all matrices these drift most for the bytes they save.
    """

    def row(name: str, origin: str, shape: tuple[int, ...], least_bits: int = 0) -> Row:
        return Row(name, shape, "copy" if name == origin else f"copy:{origin}", "mixer", least_bits=least_bits)

    for which, width in (("q", spec.C), ("k", spec.Ckv), ("v", spec.Ckv), ("o", spec.D)):
        name, origin = getattr(names, which), getattr(TEACHER_NAMES, which)
        yield row(
            f"{name}.weight", f"{origin}.weight", (width, spec.C if which == "o" else spec.D), 8 * (recurrent and which in "kv")
        )
        if spec.output_bias if which == "o" else spec.qkv_bias:
            yield row(f"{name}.bias", f"{origin}.bias", (width,))
    if spec.qk_norm:
        yield row(f"{names.q_norm}.weight", "q_norm.weight", (spec.N,))
        yield row(f"{names.k_norm}.weight", "k_norm.weight", (spec.N,))
