"""What the chunk-parallel recurrences share: the chunk size, cutting time into chunks, decays inside a chunk."""

from typing import cast

import mlx.core as mx

# exp(-20) = 2e-9 is below float32's resolution beside the token that a state has just taken in.
FLOOR = -20.0
# Decays are factorised around the middle of a chunk: exp(80) leaves a factor of 6000 below float32's largest number.
LARGEST_EXPONENT = 80.0
LARGEST_CHUNK = 32


def chunk_size(length: int, min_log_w: float | None) -> int:
    """Tokens per chunk, a power of two: half a chunk of the strongest decay stays within float32, no longer than needed."""
    bound = FLOOR if min_log_w is None else max(FLOOR, min_log_w)
    size = 2
    while size < min(length, LARGEST_CHUNK) and size * -bound <= LARGEST_EXPONENT:
        size *= 2
    return size


def split_chunks(x: mx.array, size: int) -> mx.array:
    """(B, T, H, N) of any float type to float32 (B, H, chunks, size, N); zeros fill the last chunk, which change no state."""
    B, T, H, N = x.shape
    short = -T % size
    if short:
        x = mx.pad(x, [(0, 0), (0, short), (0, 0), (0, 0)])
    return x.astype(mx.float32).reshape(B, -1, size, H, N).transpose(0, 3, 1, 2, 4)


def join_chunks(x: mx.array, length: int, dtype: mx.Dtype) -> mx.array:
    """The inverse of `split_chunks`: (B, H, chunks, size, N) to (B, length, H, N) of `dtype`."""
    B, H, _, _, N = x.shape
    return x.transpose(0, 2, 3, 1, 4).reshape(B, -1, H, N)[:, :length].astype(dtype)


def each_chunk(x: mx.array) -> list[mx.array]:
    """The parts (B, H, ...) of x (B, H, chunks, ...)."""
    return cast(list[mx.array], cut_chunks(x))


@mx.custom_function
def cut_chunks(x: mx.array) -> list[mx.array]:
    """`each_chunk` with a gradient of one stack: MLX's own gradient of a split costs the square of the number of parts."""
    return [part.squeeze(2) for part in mx.split(x, x.shape[2], axis=2)]


@cut_chunks.vjp
def stack_chunks(x: mx.array, cotangents: list[mx.array], parts: list[mx.array]) -> mx.array:
    """The gradient of `cut_chunks`."""
    return mx.stack(cotangents, axis=2)


def floored(log_w: mx.array, min_log_w: float | None) -> mx.array:
    """log_w with what lies below the floor raised to it, unless the bound rules that out; at the floor the gradient passes."""
    return mx.where(log_w < FLOOR, FLOOR, log_w) if min_log_w is None or min_log_w < FLOOR else log_w


def from_start(log_w: mx.array) -> mx.array:
    """Log-decay from the chunk's start to each boundary between tokens, 0 first: (..., size, N) to (..., size + 1, N)."""
    return mx.concatenate([mx.zeros_like(log_w[..., :1, :]), mx.cumsum(log_w, axis=-2)], axis=-2)


def from_middle(log_w: mx.array) -> mx.array:
    """Log-decay from the chunk's middle to each boundary, positive before it: (..., size, N) to (..., size + 1, N).

    Each half is summed outwards, so that rounding grows with the distance from the middle, not from the start.
    """
    before, after = mx.split(log_w, 2, axis=-2)
    return mx.concatenate([-mx.cumsum(before, axis=-2, reverse=True), from_start(after)], axis=-2)


def to_end(log_w: mx.array) -> mx.array:
    """Log-decay from each token to the chunk's end, 0 for the last: (..., size, N)."""
    return mx.cumsum(log_w, axis=-2, reverse=True, inclusive=False)


def decayed_products(left: mx.array, right: mx.array, left_mid: mx.array, right_mid: mx.array, *, lag: int) -> mx.array:
    """left_t . right_s decayed from s to t, (..., size, size), zero where s > t - lag; `lag` is 0 or 1.

    `left_mid` and `right_mid` carry the decay to and from the middle. No decay lies between t and t - lag: that pair is
    multiplied plainly, because its two shares in the gradient of log_w would cancel only up to rounding.
    """
    if lag:
        right = mx.pad(right[..., :-1, :], [*[(0, 0)] * (right.ndim - 2), (1, 0), (0, 0)])
    plain = (left * right).sum(-1, keepdims=True)  # (..., size, 1)
    position = mx.arange(left.shape[-2])
    distance = position[:, None] - position[None]
    return mx.where(distance > lag, left_mid @ right_mid.swapaxes(-1, -2), mx.where(distance == lag, plain, 0.0))


def zero_state(x: mx.array) -> mx.array:
    """The state before the first token of x (B, T, H, N): float32 (B, H, N value, N key)."""
    B, _, H, N = x.shape
    return mx.zeros((B, H, N, N), mx.float32)
