"""RAD-RWKV7 (docs/mixers.md, equations 7.1-7.9): generalised delta rule, variants A, B and C, no token shift."""

from collections.abc import Iterator
from typing import Any

from radlads.mixers.table import Mixer, RankRule, Row, projection_rows


def rwkv7_rows(spec: Any, layer: int) -> Iterator[Row]:
    """Tensors of one RAD-RWKV7 layer; `v0`-`v2` of the first such layer and `r_k` are stored but never read."""
    D, C, H, N, opts, ranks = spec.D, spec.C, spec.H, spec.N, spec.mixer, spec.ranks
    later = layer > spec.mixers.index("rwkv7")
    balanced = opts.variant == "C"
    yield from projection_rows(spec)
    yield Row("w0", (1, 1, C), "decay7", "mixer", keep=True)
    yield Row("w1", (D, ranks.decay), "zeros", "mixer", keep=True)
    yield Row("w2", (ranks.decay, C), "orthogonal:0.1", "mixer", keep=True)
    yield Row("a0", (1, 1, C), "zeros", "mixer", keep=True)
    yield Row("a1", (D, ranks.iclr), "zeros", "mixer", keep=True)
    yield Row("a2", (ranks.iclr, C), "orthogonal:0.1", "mixer", keep=True)
    yield Row("v0", (1, 1, C), "const:1.0" if later else "zeros", "mixer", keep=True, read=later)
    yield Row("v1", (D, ranks.value_residual), "zeros", "mixer", keep=True, read=later)
    yield Row("v2", (ranks.value_residual, C), "orthogonal:0.1" if later else "zeros", "mixer", keep=True, read=later)
    if opts.gate == "full":
        yield Row("gate.weight", (C, D), "zeros", "mixer", least_bits=8)
    elif opts.gate == "lowrank":
        yield Row("g1", (D, ranks.gate), "zeros", "mixer", keep=True)
        yield Row("g2", (ranks.gate, C), "orthogonal:0.1", "mixer", keep=True)
    yield Row("k_k", (1, 1, C), "const:0.85", "mixer", keep=True, read=not balanced)
    yield Row("k_a", (1, 1, C), "const:1.0", "mixer", keep=True, read=not balanced)
    yield Row("r_k", (H, N), "zeros", "mixer", keep=True, read=False)
    if opts.groupnorm:
        yield Row("ln_x.weight", (C,), "const:1.0", "mixer", keep=True)
        yield Row("ln_x.bias", (C,), "zeros", "mixer", keep=True)


def rwkv7_state(spec: Any) -> dict[str, tuple[int, ...]]:
    """State per sequence: `wkv` (H, N value, N key) float32."""
    return {"wkv": (spec.H, spec.N, spec.N)}


RWKV7 = Mixer(
    "rwkv7",
    rwkv7_rows,
    rwkv7_state,
    ranks={
        "decay": RankRule("D", 0.5, 1.8),
        "iclr": RankRule("D", 0.5, 1.8),
        "value_residual": RankRule("D", 0.5, 1.3),
        "gate": RankRule("D", 0.8, 0.6),
    },
    flags=("gate", "rope", "variant", "groupnorm"),
    scan_flops=8,
)
