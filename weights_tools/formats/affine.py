"""MLX's affine quantisation in numpy, bit for bit: groups of a row as `scale * q + bias`, q packed into 32-bit words.

Of each group the end with the larger magnitude is hit exactly: it becomes the bias, and the scale is bent so that zero
falls on a step.
"""

import numpy as np

from radlads.tensors import Raw, decode, encode

TINIEST = np.float32(1e-7)  # a constant group gets this scale


def scales_and_biases(raw: Raw, dtype: str, bits: int, group_size: int) -> tuple[Raw, Raw, Raw]:
    """(groups of values, scale, bias) of rows (n, columns), all float32; scale and bias are (n, groups)."""
    values = decode(raw, dtype)
    groups = values.reshape(len(values), -1, group_size)
    low, high = groups.min(-1), groups.max(-1)
    low_end = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / np.float32(2**bits - 1), TINIEST)
    scale = np.where(low_end, scale, -scale)
    edge = np.where(low_end, low, high)
    zero = np.rint(edge / scale)
    off = zero == 0
    scale = np.where(off, scale, edge / np.where(off, np.float32(1), zero)).astype(np.float32)
    return groups, scale, np.where(off, np.float32(0), edge).astype(np.float32)


def quantise(raw: Raw, dtype: str, bits: int, group_size: int) -> Raw:
    """Rows (n, columns) of `dtype` as words, uint32 (n, columns * bits / 32)."""
    groups, scale, bias = scales_and_biases(raw, dtype, bits, group_size)
    q = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, 2**bits - 1)
    return pack(q.astype(np.uint8).reshape(len(groups), -1), bits)


def dequantise(words: Raw, scales: Raw, biases: Raw, dtype: str, bits: int) -> Raw:
    """The rows as raw bits of `dtype`: product and sum each rounded to it, as MLX does on a CPU."""
    q = unpack(words, bits).reshape(*scales.shape, -1).astype(np.float32)
    product = rounded(q * decode(scales, dtype)[..., None], dtype)
    return encode((product + decode(biases, dtype)[..., None]).reshape(len(words), -1), dtype)


def rounded(values: Raw, dtype: str) -> Raw:
    """Float32 values at the precision of `dtype`."""
    return decode(encode(values, dtype), dtype)


def pack(q: Raw, bits: int) -> Raw:
    """uint8 values (n, columns) as one little-endian stream of bits a row, in 32-bit words."""
    if bits == 4:
        q = q[:, 0::2] | q[:, 1::2] << 4
    elif bits != 8:
        stream = np.unpackbits(q[..., None], axis=-1, count=bits, bitorder="little")
        q = np.packbits(stream.reshape(len(q), -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(q).view("<u4")


def unpack(words: Raw, bits: int) -> Raw:
    """The inverse of `pack`."""
    q = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return q
    if bits == 4:
        return np.stack((q & 15, q >> 4), -1).reshape(len(q), -1)
    stream = np.unpackbits(q, axis=-1, bitorder="little").reshape(len(q), -1, bits)
    return np.packbits(stream, axis=-1, bitorder="little")[..., 0]
