"""hxa079, hxa07A, hxa07B and hxa07C (docs/mixers.md, equations H.1-H.11): RWKV-7 layers of the OpenMOSE hybrids.

They keep names of their own; transfer maps the teacher's q, k, v, o to them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from radlads.mixers.table import Mixer, ProjectionNames, RankRule, Row, projection_rows

HXA_NAMES = ProjectionNames("receptance", "key", "value", "output", "r_norm", "k_norm")


@dataclass(frozen=True)
class HxaForm:
    """What tells the four apart.

    `residual`: k and v mix with those of the first recurrent layer (H.4). `value_pair`: a low-rank addition to v (H.5).
    `true_decay`: the key factor has the decay w where the others have L (H.7). `bonus`: the current token again (H.10).
    """

    residual: bool = False
    value_pair: bool = False
    true_decay: bool = False
    bonus: bool = False


HXA_FORMS = {
    "hxa079": HxaForm(residual=True, bonus=True),
    "hxa07a": HxaForm(),
    "hxa07b": HxaForm(value_pair=True),
    "hxa07c": HxaForm(value_pair=True, true_decay=True),
}


def hxa_rows(name: str, spec: Any, layer: int) -> Iterator[Row]:
    """Tensors of one layer of the kind `name`; in the first one of an hxa079 model `v0`-`v2`, `k0`-`k2` are never read."""
    D, C, Ckv, ranks, form = spec.D, spec.C, spec.Ckv, spec.ranks, HXA_FORMS[name]
    later = layer > spec.mixers.index(name)

    def pair(letter: str, rank: int, width: int, read: bool = True) -> Iterator[Row]:
        yield Row(f"{letter}1", (D, rank), "zeros", "mixer", keep=True, read=read)
        yield Row(f"{letter}2", (rank, width), "orthogonal:0.1", "mixer", keep=True, read=read)

    yield from projection_rows(spec, HXA_NAMES)
    yield Row("w0", (1, 1, C), "hxa_decay", "mixer", keep=True)
    yield from pair("w", ranks.decay, C)
    yield Row("a0", (1, 1, C), "hxa_iclr", "mixer", keep=True)
    yield from pair("a", ranks.iclr, C)
    if form.residual:
        for letter, rank in (("v", ranks.value_residual), ("k", ranks.key_residual)):
            yield Row(f"{letter}0", (1, 1, Ckv), "const:0.73", "mixer", keep=True, read=later)
            yield from pair(letter, rank, Ckv, later)
    if form.value_pair:
        yield from pair("v", ranks.value_residual, C)
    yield from pair("g", ranks.gate, C)
    if form.bonus:
        yield Row("r_k", (spec.H, spec.N), "const:-0.04", "mixer", keep=True)


def hxa_state(spec: Any) -> dict[str, tuple[int, ...]]:
    """State per sequence: `wkv` (H, N value, N key) float32."""
    return {"wkv": (spec.H, spec.N, spec.N)}


def hxa_mixer(name: str, **ranks: RankRule) -> Mixer:
    """The entry of one of the four in the register."""
    return Mixer(name, lambda spec, layer: hxa_rows(name, spec, layer), hxa_state, ranks=ranks, flags=("rope",), scan_flops=8)


HXA079 = hxa_mixer(
    "hxa079",
    decay=RankRule("C", 0.6, 1.7),
    iclr=RankRule("C", 0.5, 1.8),
    value_residual=RankRule("C", 0.5, 1.3),
    key_residual=RankRule("C", 0.5, 1.3),
    gate=RankRule("C", 0.8, 0.35),
)
HXA07A = hxa_mixer("hxa07a", decay=RankRule("C", 0.6, 1.7), iclr=RankRule("C", 0.5, 1.3), gate=RankRule("C", 0.6, 1.7))
# No source names the widths of 07B and 07C: those of 07A, and hxa079's of the value.
HXA07B, HXA07C = (
    hxa_mixer(
        name,
        decay=RankRule("C", 0.6, 1.7),
        iclr=RankRule("C", 0.5, 1.3),
        value_residual=RankRule("C", 0.5, 1.3),
        gate=RankRule("C", 0.6, 1.7),
    )
    for name in ("hxa07b", "hxa07c")
)
