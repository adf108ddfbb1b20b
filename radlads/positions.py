"""Rotary position frequencies, in plain floats, for both backends and the oracle."""

import math

from radlads.spec import ModelSpec


def inverse_frequencies(spec: ModelSpec) -> list[float]:
    """Angle per position of each of the N/2 rotary pairs: theta^(-2i/N), scaled as `rope_scaling` says.

    "linear" divides by the factor; "llama3" divides long wavelengths only, with a ramp between (Llama 3.1).
    """
    freqs = [spec.rope_theta ** (-2 * i / spec.head_dim) for i in range(spec.head_dim // 2)]
    scaling = spec.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        return [f / scaling["factor"] for f in freqs]
    if scaling["rope_type"] == "llama3":
        return [_llama3(f, scaling) for f in freqs]
    return freqs


def _llama3(freq: float, scaling: dict[str, float]) -> float:
    length, low, high = scaling["original_max_position_embeddings"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / freq
    if wavelength < length / high:
        return freq
    if wavelength > length / low:
        return freq / scaling["factor"]
    smooth = (length / wavelength - low) / (high - low)
    return (1 - smooth) * freq / scaling["factor"] + smooth * freq
