"""Tensors that stay on the disk: rows are read, changed and written a piece at a time, so that size does not matter.

Raw bits everywhere, in safetensors' dtypes; a change of dtype that loses nothing can be undone to the bit.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from radlads.errors import fail
from radlads.tensors import DTYPES, Entry, Raw, decode, encode

PIECE = 2**24  # bytes of a piece, unless a single row has more


@dataclass(frozen=True)
class Lazy:
    """A tensor of `dtype` and `shape`; `read(start, stop)` gives rows [start, stop) of its first axis as raw bits.

    `row_cost` is the memory that reading a row takes, where that is more than the row's own bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, int], Raw]
    row_cost: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def rows(self) -> int:
        """Length of the first axis; a scalar has one row."""
        return self.shape[0] if self.shape else 1

    def pieces(self) -> Iterator[Raw]:
        """All rows in order, in pieces of about `PIECE` bytes."""
        step = max(1, PIECE // max(1, self.row_cost, self.nbytes // max(1, self.rows)))
        for start in range(0, self.rows, step):
            yield self.read(start, min(start + step, self.rows))

    def whole(self) -> Raw:
        """The tensor in memory; for small ones."""
        return self.read(0, self.rows).reshape(self.shape)


def stored(entry: Entry) -> Lazy:
    """The tensor of a weights file, read with plain reads: a memory map would count as memory in use. R201 where it is cut."""
    dtype, width = np.dtype(DTYPES[entry.dtype]), math.prod(entry.shape[1:])

    def read(start: int, stop: int) -> Raw:
        count = (stop - start) * width
        values = read_at(entry.path, dtype, count, entry.start + start * width * dtype.itemsize)
        return values.reshape(stop - start, *entry.shape[1:])

    return Lazy(entry.dtype, entry.shape, read)


def read_at(path: Path, dtype: "np.dtype[Any]", count: int, offset: int) -> Raw:
    """`count` values of a file from the byte `offset` on; R201 where it is cut."""
    try:
        values = np.fromfile(path, dtype, count, offset=offset)
    except OSError as error:
        why = f"it changed after it was opened: {error.strerror or error}"
        raise fail("R201", where=path, why=why, fix="Start again") from None
    if values.size != count:
        raise fail("R201", where=path, why="it was cut after it was opened", fix="Start again")
    return values


def mapped(source: Lazy, dtype: str, change: Callable[[Raw], Raw], shape: tuple[int, ...] | None = None) -> Lazy:
    """`change` applied to each run of rows; the number of rows stays."""
    return Lazy(dtype, source.shape if shape is None else shape, lambda start, stop: change(source.read(start, stop)))


def small(source: Lazy, change: Callable[[Raw], Raw], shape: Sequence[int]) -> Lazy:
    """`change` applied to the whole tensor, whose axes it may turn; only for tensors that fit in memory easily."""
    return Lazy(source.dtype, tuple(shape), lambda start, stop: change(source.whole())[start:stop])


def cast(source: Lazy, dtype: str) -> Lazy:
    """The values in another float dtype, rounded to nearest even where they have to be."""
    if source.dtype == dtype:
        return source
    return mapped(source, dtype, lambda raw: narrowed(widened(raw, source.dtype), dtype))


def widened(raw: Raw, dtype: str) -> Raw:
    """Float32 of the same values; a NaN keeps its sign and payload, which conversion by the processor may change."""
    values = decode(raw, dtype)
    if dtype == "F16" and (nan := np.isnan(values)).any():
        half = raw.view(np.uint16)[nan].astype(np.uint32)
        values.view(np.uint32)[nan] = (half & 0x8000) << 16 | 0x7F800000 | (half & 0x3FF) << 13
    return values


def narrowed(values: Raw, dtype: str) -> Raw:
    """Float32 values in `dtype`; the inverse of `widened` wherever no bit is lost, NaN payloads included."""
    raw = encode(values, dtype)
    if dtype != "F32" and (nan := np.isnan(values)).any():
        bits = np.ascontiguousarray(values).view(np.uint32)[nan]
        keep = 16 if dtype == "BF16" else 13
        exact = (bits & ((1 << keep) - 1)) == 0
        upper = bits >> 16 if dtype == "BF16" else (bits >> 16) & 0x8000 | 0x7C00 | (bits >> 13) & 0x3FF
        raw.view(np.uint16)[nan] = np.where(exact, upper, raw.view(np.uint16)[nan])
    return raw


def finite(raw: Raw, dtype: str) -> bool:
    """True if no value of a float piece is NaN or infinite."""
    if dtype == "F32":
        # A sum of finite numbers may overflow, so only the rare suspicious piece is looked at closely.
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(np.sum(raw))
        return math.isfinite(total) or bool(np.isfinite(raw).all())
    ones = {"BF16": 0x7F80, "F16": 0x7C00}.get(dtype)
    return ones is None or not raw.size or int((raw.view(np.uint16) & np.uint16(ones)).max()) != ones
