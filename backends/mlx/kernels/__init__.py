"""What the chunk-parallel recurrences share: the chunk size, cutting time into chunks, decays inside a chunk."""

import mlx.core as mx

# exp(-20) = 2e-9 is below float32's resolution beside the token that a state has just taken in.
FLOOR = -20.0
# Decays are factorised around the middle of a chunk: exp(80) leaves a factor of 6000 below float32's largest number.
LARGEST_EXPONENT = 80.0
LARGEST_CHUNK = 64


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


def floored(log_w: mx.array, min_log_w: float | None) -> mx.array:
    """log_w, which without a bound may be anything below zero, kept above the floor; the gradient passes at the floor itself."""
    return mx.where(log_w < FLOOR, FLOOR, log_w) if min_log_w is None or min_log_w < FLOOR else log_w


def from_middle(log_w: mx.array, *, inclusive: bool) -> mx.array:
    """Log-decay from the middle of the chunk to each token (positive before it); (..., size, N).

    `inclusive` counts the token's own decay. Each half is summed outwards, so that rounding grows with the distance
    from the middle and not from the chunk's start.
    """
    before, after = mx.split(log_w, 2, axis=-2)
    left = -mx.cumsum(before, axis=-2, reverse=True, inclusive=not inclusive)
    return mx.concatenate([left, mx.cumsum(after, axis=-2, inclusive=inclusive)], axis=-2)


def causal(size: int, *, diagonal: bool) -> mx.array:
    """Boolean (size, size): which earlier tokens s (columns) a token t (row) sees; with or without itself."""
    position = mx.arange(size)
    return position[:, None] >= position[None] if diagonal else position[:, None] > position[None]


def zero_state(x: mx.array) -> mx.array:
    """The state before the first token of x (B, T, H, N): float32 (B, H, N value, N key)."""
    B, _, H, N = x.shape
    return mx.zeros((B, H, N, N), mx.float32)
