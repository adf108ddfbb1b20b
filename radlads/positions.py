"""Rotary position frequencies, in plain floats, for both backends and the oracle (docs/mixers.md, S.3)."""

import math
from typing import Any

from radlads.spec import ModelSpec


def inverse_frequencies(spec: ModelSpec, length: int = 0) -> list[float]:
    """Angle per position of each of the N/2 rotary pairs: theta^(-2i/N), changed as `rope_scaling` says.

    `length` is what `rope_length` makes of the longest position; most kinds do not depend on it.
    """
    scaling: dict[str, Any] = spec.rope_scaling or {"rope_type": "default"}
    kind, pairs = scaling["rope_type"], range(spec.head_dim // 2)
    theta = spec.rope_theta
    if kind == "dynamic" and length:
        stretch = scaling["factor"] * length / spec.max_positions - (scaling["factor"] - 1)
        theta *= stretch ** (spec.head_dim / (spec.head_dim - 2))
    freqs = [theta ** (-2 * i / spec.head_dim) for i in pairs]
    if kind == "linear":
        return [f / scaling["factor"] for f in freqs]
    if kind == "llama3":
        return [llama3_frequency(f, scaling) for f in freqs]
    if kind == "yarn":
        return [f * (1 - share) + f / scaling["factor"] * share for f, share in zip(freqs, yarn_ramp(spec, scaling), strict=True)]
    if kind == "longrope":
        return [f / factor for f, factor in zip(freqs, scaling["long_factor" if length else "short_factor"], strict=True)]
    return freqs


def rope_length(spec: ModelSpec, longest: int) -> int:
    """The sequence length on which the frequencies depend: 0 below the original context, and for most kinds always."""
    scaling = spec.rope_scaling or {}
    if scaling.get("rope_type") == "dynamic":
        return longest if longest > spec.max_positions else 0
    if scaling.get("rope_type") == "longrope":
        beyond = int(scaling["original_max_position_embeddings"]) + 1
        return beyond if longest >= beyond else 0
    return 0


def rope_depends_on_length(spec: ModelSpec) -> bool:
    """Whether `rope_length` ever differs from 0."""
    return (spec.rope_scaling or {}).get("rope_type") in ("dynamic", "longrope")


def rope_amplitude(spec: ModelSpec) -> float:
    """What cosines and sines are multiplied by: 1 but for yarn and longrope, whose "attention factor" it is."""
    scaling = spec.rope_scaling or {}
    kind, stated = scaling.get("rope_type"), scaling.get("attention_factor")
    if kind not in ("yarn", "longrope") or stated is not None:
        return float(stated or 1.0) if kind in ("yarn", "longrope") else 1.0
    factor = scaling["factor"]
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(scaling["original_max_position_embeddings"]))
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if over and under:
        return (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def llama3_frequency(freq: float, scaling: dict[str, Any]) -> float:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, a ramp between."""
    length, low, high = scaling["original_max_position_embeddings"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / freq
    if wavelength < length / high:
        return freq
    if wavelength > length / low:
        return freq / scaling["factor"]
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * freq / scaling["factor"] + smooth * freq


def yarn_ramp(spec: ModelSpec, scaling: dict[str, Any]) -> list[float]:
    """YaRN: for each pair the share of the interpolated frequency, 0 for fast pairs, 1 for slow ones, a ramp between."""
    N, length = spec.head_dim, scaling["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        """The pair that turns so many times within the original context."""
        return N * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(spec.rope_theta))

    low, high = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, N - 1)
    width = high - low if high != low else 0.001
    return [min(1.0, max(0.0, (i - low) / width)) for i in range(N // 2)]
