"""What the chunk-parallel recurrences share: chunks and segments of time, decays inside a chunk, products with their gradient.

Matrices are multiplied as a @ b with b as it lies in memory, never as its transpose: the reference BLAS that MLX brings for Linux
is half as fast there. An exponential costs as much as a dozen multiplications: each decay is taken once.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import mlx.core as mx

# exp(-20) = 2e-9 is below float32's resolution beside the token that a state has just taken in.
FLOOR = -20.0
# Decays are factorised around the middle of a chunk: exp(80) leaves a factor of 6000 below float32's largest number.
LARGEST_EXPONENT = 80.0
LARGEST_CHUNK = 16
# Heads times tokens that are worked on together: enough to hide what an operation costs to start, little memory.
SEGMENT = 1024


def with_gradient(op: Callable[..., Any]) -> Any:
    """mx.custom_function, whose result MLX types as an object."""
    return mx.custom_function(op)


def chunk_size(length: int, min_log_w: float | None) -> int:
    """Tokens per chunk, a power of two: half a chunk of the strongest decay stays within float32, no longer than needed."""
    bound = FLOOR if min_log_w is None else max(FLOOR, min_log_w)
    size = 2
    while size < min(length, LARGEST_CHUNK) and size * -bound <= LARGEST_EXPONENT:
        size *= 2
    return size


def segments(x: mx.array, size: int) -> Iterator[slice]:
    """Parts of the time of x (B, T, H, N), whole chunks of `size` tokens but for the last."""
    B, T, H, _ = x.shape
    step = size * max(1, SEGMENT // (B * H * size))
    return (slice(first, first + step) for first in range(0, T, step))


def by_segments(form: Callable[..., Any], size: int) -> Any:
    """`form(*inputs, state) -> (p, state)` over parts of time, as one function of MLX with a gradient.

    Inputs and p are (B, T, H, N). Only one part's intermediate arrays exist at a time, also in the gradient, which goes
    through a part again from the state it began with.
    """

    @with_gradient
    def run(*arrays: mx.array) -> list[mx.array]:
        *inputs, state = arrays
        parts, starts = [], []
        for part in segments(inputs[0], size):
            starts.append(state)
            p, state = form(*after([x[:, part] for x in inputs], [state]), state)
            parts.append(p)
            (state,) = after([state], [p])
        return [mx.concatenate(parts, axis=1), state, *starts]

    @run.vjp
    def gradient(arrays: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, ...]:
        *inputs, _ = arrays
        dp, dstate, *_ = cotangents
        found = []
        for part, start in reversed(list(zip(segments(dp, size), outputs[2:], strict=True))):
            given = after([x[:, part] for x in inputs], [dstate])
            _, (*slopes, dstate) = mx.vjp(form, [*given, start], [dp[:, part], dstate])
            found.append(slopes)
            (dstate,) = after([dstate], slopes)
        return *(mx.concatenate(list(slopes), axis=1) for slopes in zip(*reversed(found), strict=True)), dstate

    return run


def after(arrays: list[mx.array], others: list[mx.array]) -> list[mx.array]:
    """The arrays, to be made only when the others are: otherwise MLX begins all parts of time at once and holds them all."""
    tied: list[mx.array] = mx.depends(arrays, others)
    return tied


def split_chunks(x: mx.array, size: int) -> mx.array:
    """(B, T, H, N) of any float type to float32 (chunks, B, H, size, N); zeros fill the last chunk, which change no state."""
    B, T, H, N = x.shape
    short = -T % size
    if short:
        x = mx.pad(x, [(0, 0), (0, short), (0, 0), (0, 0)])
    return mx.contiguous(x.astype(mx.float32).reshape(B, -1, size, H, N).transpose(1, 0, 3, 2, 4))


def join_chunks(x: mx.array, length: int, dtype: mx.Dtype) -> mx.array:
    """The inverse of `split_chunks`: (chunks, B, H, size, N) to (B, length, H, N) of `dtype`."""
    x = x.transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length].astype(dtype)


def each_chunk(*arrays: mx.array) -> list[tuple[mx.array, ...]]:
    """Of every chunk its parts (1, ...) of the arrays (chunks, ...)."""
    return list(zip(*(mx.split(x, len(x)) for x in arrays), strict=True))


@with_gradient
def chunk_states(keep: mx.array, keys: mx.array, values: mx.array, state: mx.array, *delta: mx.array) -> list[mx.array]:
    """The one thing that goes from chunk to chunk: S^T (chunks, B, H, N key, N value) before each chunk, and the last one.

    A chunk leaves keep S^T + keys^T values, for keep (chunks, B, H, N, 1), keys and values (..., n, N). With delta = (x, y),
    both (..., m, N), the rows x S^T + y are written too: keys has n + m rows, and all rows written come as a third result.
    """
    starts, written = [], []
    for kept, across, new, *system in each_chunk(keep, keys.swapaxes(-1, -2), values, *delta):
        starts.append(state)
        if system:
            x, y = system
            new = mx.concatenate([new, mx.addmm(y, x, state)], axis=-2)
            written.append(new)
        state = mx.addmm(kept * state, across, new)
    return [mx.concatenate(starts), state, *([mx.concatenate(written)] if delta else [])]


@chunk_states.vjp
def of_chunk_states(arrays: Any, slopes: Any, outputs: Any) -> tuple[mx.array, ...]:
    """The gradient of `chunk_states`: only the slope of the state goes from chunk to chunk."""
    keep, keys, values, _, *delta = arrays
    starts, _, *written = outputs
    of_starts, of_state, *of_written = slopes
    of_written = of_written or [mx.zeros_like(values)]
    size = values.shape[-2]
    of_ends, of_rows = [], []
    across = [delta[0].swapaxes(-1, -2)] if delta else []
    for kept, key, of_start, of_row, *x in reversed(each_chunk(keep, keys, of_starts, *of_written, *across)):
        of_ends.append(of_state)
        of_rows.append(mx.addmm(of_row, key, of_state))
        of_state = of_start + kept * of_state
        if x:
            of_state = mx.addmm(of_state, x[0], of_rows[-1][..., size:, :])
    ends, rows = (mx.concatenate(parts[::-1]) for parts in (of_ends, of_rows))
    of_y = mx.contiguous(rows[..., size:, :])
    of_delta = (of_y @ flipped(starts), of_y) if delta else ()
    of_keys = (written[0] if delta else values) @ flipped(ends)
    return (ends * starts).sum(-1, keepdims=True), of_keys, rows[..., :size, :], of_state, *of_delta


@with_gradient
def plus_product(c: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """c + a @ b, all with the same leading axes."""
    return mx.addmm(c, a, b)


@plus_product.vjp
def of_plus_product(arrays: Any, slope: mx.array, _: Any) -> tuple[mx.array, mx.array, mx.array]:
    """The gradient of `plus_product`."""
    _, a, b = arrays
    return slope, slope @ flipped(b), a.swapaxes(-1, -2) @ slope


@with_gradient
def product(a: mx.array, b: mx.array) -> mx.array:
    """a @ b, both with the same leading axes."""
    return a @ b


@product.vjp
def of_product(arrays: Any, slope: mx.array, _: Any) -> tuple[mx.array, mx.array]:
    """The gradient of `product`."""
    a, b = arrays
    return slope @ flipped(b), a.swapaxes(-1, -2) @ slope


def flipped(x: mx.array) -> mx.array:
    """The transpose of the last two axes, laid out anew."""
    return mx.contiguous(x.swapaxes(-1, -2))


def floored(log_w: mx.array, min_log_w: float | None) -> mx.array:
    """log_w with what lies below the floor raised to it, unless the bound rules that out; at the floor the gradient passes."""
    return mx.where(log_w < FLOOR, FLOOR, log_w) if min_log_w is None or min_log_w < FLOOR else log_w


@with_gradient
def decays(log_w: mx.array) -> list[mx.array]:
    """Decays inside chunks, from log_w (..., size, N), where m is the log-decay from the middle to a boundary between tokens:

    exp(m) and exp(-m) at each of the size + 1 boundaries, m being positive before the middle; the decay from the chunk's
    start to each boundary (..., size + 1, N), and from each token to the end (..., size, N).
    """
    w = mx.power(math.e, log_w)  # on a CPU half the price of mx.exp
    before, later = mx.split(w, 2, axis=-2)
    one = mx.ones_like(w[..., :1, :])
    # Each half is multiplied outwards, so that rounding grows with the distance from the middle.
    before, later = mx.cumprod(before, axis=-2, reverse=True), mx.cumprod(later, axis=-2)
    return [
        mx.concatenate([mx.reciprocal(before), one, later], axis=-2),
        mx.concatenate([before, one, mx.reciprocal(later)], axis=-2),
        mx.concatenate([one, mx.cumprod(w, axis=-2)], axis=-2),
        mx.concatenate([mx.cumprod(w[..., 1:, :], axis=-2, reverse=True), one], axis=-2),
    ]


@decays.vjp
def of_decays(log_w: mx.array, slopes: Any, outputs: Any) -> mx.array:
    """The gradient of `decays`, without a division: the slope of a logarithm is that of its exponential times this."""
    of_m = slopes[0] * outputs[0] - slopes[1] * outputs[1]
    from_start, to_end = slopes[2] * outputs[2], slopes[3] * outputs[3]
    half = log_w.shape[-2] // 2
    before = -mx.cumsum(of_m[..., :half, :], axis=-2)
    behind = mx.cumsum(of_m[..., half + 1 :, :], axis=-2, reverse=True)
    later = mx.cumsum(from_start[..., 1:, :], axis=-2, reverse=True)
    sooner = mx.cumsum(to_end, axis=-2, inclusive=False)
    return mx.concatenate([before, behind], axis=-2) + later + sooner


@lru_cache
def pair_masks(size: int, lag: int) -> tuple[mx.array, mx.array]:
    """Of rows t and columns s (size, size): s < t - lag as bool, and 1.0 where s = t - lag, float32."""
    position = mx.arange(size)
    distance = position[:, None] - position[None]
    masks = distance > lag, (distance == lag).astype(mx.float32)
    mx.eval(masks)
    return masks


def earlier(x: mx.array) -> mx.array:
    """x (..., size, N) one token earlier, zeros for the first."""
    return mx.pad(x[..., :-1, :], [*[(0, 0)] * (x.ndim - 2), (1, 0), (0, 0)])


def plain_products(left: mx.array, right: mx.array) -> mx.array:
    """left_t . right_t: (..., size, N) to (..., size, 1).

    Pairs with no decay between them are multiplied so, because the two shares that exp(m) and exp(-m) have in the gradient
    of log_w would cancel only up to rounding.
    """
    return (left * right).sum(-1, keepdims=True)


def zero_state(x: mx.array) -> mx.array:
    """The state before the first token of x (B, T, H, N): float32 (B, H, N value, N key)."""
    B, _, H, N = x.shape
    return mx.zeros((B, H, N, N), mx.float32)
