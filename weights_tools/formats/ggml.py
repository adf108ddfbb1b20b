"""The number formats of GGUF: blocks of a row as float32, with the arithmetic and its order as ggml's plain code has them.

A decoder takes the bytes of blocks of 32 or 256 numbers; those of 256 hold 8 or 16 sub-blocks with scales of their own.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]  # (blocks, bytes of a block)
Integers = npt.NDArray[Any]  # small unsigned numbers
Floats = npt.NDArray[np.float32]  # (blocks, values of a block)


def half(blocks: Bytes, at: int) -> Floats:
    """The 16-bit float at byte `at` of every block, (blocks, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def nibbles(data: Bytes) -> Integers:
    """Low halves of all bytes, then high halves, along the last axis."""
    return np.concatenate((data & 15, data >> 4), -1)


def signed(data: Integers, zero: int) -> Floats:
    """Unsigned integers around `zero` as float32."""
    return (data.astype(np.int16) - zero).astype(np.float32)


def fifth_bits(blocks: Bytes, at: int) -> Integers:
    """The 32 bits at byte `at` of every block, as the fifth bit of 32 numbers."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def q4_0(b: Bytes) -> Floats:
    """d, 32 numbers of 4 bits around 8."""
    return half(b, 0) * signed(nibbles(b[:, 2:]), 8)


def q4_1(b: Bytes) -> Floats:
    """d, m, 32 numbers of 4 bits."""
    return half(b, 0) * nibbles(b[:, 4:]).astype(np.float32) + half(b, 2)


def q5_0(b: Bytes) -> Floats:
    """d, the fifth bits, 32 numbers of 4 bits around 16."""
    return half(b, 0) * signed(nibbles(b[:, 6:]) | fifth_bits(b, 2), 16)


def q5_1(b: Bytes) -> Floats:
    """d, m, the fifth bits, 32 numbers of 4 bits."""
    return half(b, 0) * (nibbles(b[:, 8:]) | fifth_bits(b, 4)).astype(np.float32) + half(b, 2)


def q8_0(b: Bytes) -> Floats:
    """d, 32 signed bytes."""
    return half(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


def crumbs(data: Bytes) -> Integers:
    """256 numbers of 2 bits: each half of 32 bytes gives its lowest bits, then the next two, four times."""
    halves = data.reshape(len(data), 2, 1, 32)
    return (halves >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(len(data), 256)


def q2_k(b: Bytes) -> Floats:
    """16 scales and minima of 4 bits, 256 numbers of 2 bits, d, dmin."""
    scales = half(b, 80) * (b[:, :16] & 15).astype(np.float32)
    minima = half(b, 82) * (b[:, :16] >> 4).astype(np.float32)
    q = crumbs(b[:, 16:80]).reshape(len(b), 16, 16).astype(np.float32)
    return (scales[..., None] * q - minima[..., None]).reshape(len(b), 256)


def q3_k(b: Bytes) -> Floats:
    """Third bits (clear: minus 4), 256 numbers of 2 bits, 16 scales of 6 bits around 32, d."""
    low = nibbles(b[:, 96:104])
    high = (b[:, 104:108][:, None] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3).reshape(len(b), 16)
    scales = half(b, 108) * signed(low | high << 4, 32)
    third = (b[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1).reshape(len(b), 256)
    q = signed(crumbs(b[:, 32:96]) | third << 2, 4).reshape(len(b), 16, 16)
    return (scales[..., None] * q).reshape(len(b), 256)


def six_bits(packed: Bytes) -> tuple[Integers, Integers]:
    """8 scales and 8 minima of 6 bits from 12 bytes: four of each whole, the others' upper bits stand above those."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate((first & 63, third & 15 | first >> 6 << 4), -1)
    return scales, np.concatenate((second & 63, third >> 4 | second >> 6 << 4), -1)


def with_scales(b: Bytes, q: Integers) -> Floats:
    """d, dmin and 12 bytes of scales in front of 256 numbers `q` in 8 sub-blocks."""
    scales, minima = six_bits(b[:, 4:16])
    steps, offsets = half(b, 0) * scales.astype(np.float32), half(b, 2) * minima.astype(np.float32)
    numbers = q.reshape(len(b), 8, 32).astype(np.float32)
    return (steps[..., None] * numbers - offsets[..., None]).reshape(len(b), 256)


def q4_k(b: Bytes) -> Floats:
    """d, dmin, scales, 256 numbers of 4 bits."""
    return with_scales(b, nibbles(b[:, 16:].reshape(len(b), 4, 32)))


def q5_k(b: Bytes) -> Floats:
    """d, dmin, scales, fifth bits, 256 numbers of 4 bits."""
    fifth = b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    low = nibbles(b[:, 48:].reshape(len(b), 4, 32)).reshape(len(b), 8, 32)
    return with_scales(b, low | fifth << 4)


def q6_k(b: Bytes) -> Floats:
    """Low 4 bits, high 2 bits, 16 signed scales, d; 256 numbers around 32."""
    low = nibbles(b[:, :128].reshape(len(b), 2, 64)).reshape(len(b), 256)
    q = signed(low | crumbs(b[:, 128:192]) << 4, 32).reshape(len(b), 16, 16)
    scales = half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[..., None] * q).reshape(len(b), 256)


# Types that are decoded; F32, F16 and BF16 are read as they are.
DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0,
    "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k,
}  # fmt: skip
