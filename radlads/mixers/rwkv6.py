"""RAD-RWKV6 (docs/mixers.md, equations 6.1-6.8): vector decay, token shift, gate, no bonus."""

from collections.abc import Iterator
from typing import Any

from radlads.mixers.table import Mixer, RankRule, Row, projection_rows


def rwkv6_rows(spec: Any, layer: int) -> Iterator[Row]:
    """Tensors of one RAD-RWKV6 layer, with the first values of the published method."""
    D, C, opts, ranks = spec.D, spec.C, spec.mixer, spec.ranks
    yield from projection_rows(spec)
    if opts.token_shift:
        yield Row("time_maa_x", (1, 1, D), "const:1.0", "mixer", keep=True)
        for slot in "rkvwg":
            read = slot != "g" or opts.gate != "none"
            yield Row(f"time_maa_{slot}", (1, 1, D), "zeros", "mixer", keep=True, read=read)
        yield Row("time_maa_w1", (D, 5 * ranks.tokenshift), "zeros", "mixer", keep=True)
        yield Row("time_maa_w2", (5, ranks.tokenshift, D), "uniform:0.01", "mixer", keep=True)
    yield Row("time_decay", (1, 1, C), "decay6", "mixer", keep=True)
    yield Row("time_decay_w1", (D, ranks.decay), "zeros", "mixer", keep=True)
    yield Row("time_decay_w2", (ranks.decay, C), "uniform:0.01", "mixer", keep=True)
    if opts.gate == "full":
        yield Row("gate.weight", (C, D), "zeros", "mixer", least_bits=8)
    elif opts.gate == "lowrank":
        yield Row("g1", (D, ranks.gate), "zeros", "mixer", keep=True)
        yield Row("g2", (ranks.gate, C), "orthogonal:0.1", "mixer", keep=True)
    if opts.groupnorm:
        yield Row("ln_x.weight", (C,), "const:1.0", "mixer", keep=True)
        yield Row("ln_x.bias", (C,), "zeros", "mixer", keep=True)


def rwkv6_state(spec: Any) -> dict[str, tuple[int, ...]]:
    """State per sequence: `wkv` (H, N value, N key) float32 and, with token shift, the last normed input."""
    state: dict[str, tuple[int, ...]] = {"wkv": (spec.H, spec.N, spec.N)}
    if spec.mixer.token_shift:
        state["shift"] = (1, spec.D)
    return state


RWKV6 = Mixer(
    "rwkv6",
    rwkv6_rows,
    rwkv6_state,
    ranks={"tokenshift": RankRule("D", 0.5, 1.8), "decay": RankRule("D", 0.5, 1.8), "gate": RankRule("D", 0.8, 0.6)},
    flags=("gate", "rope", "token_shift", "balance", "groupnorm", "clamp"),
    scan_flops=4,
)
