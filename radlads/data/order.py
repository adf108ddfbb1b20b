"""The order of training samples: a function of seed and position alone, equal for every batch size and number of processes.

Samples are windows of the flat stream that do not overlap; documents run together, as in the published training.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from radlads.data.store import TokenStore
from radlads.errors import fail

ROUNDS = 4
MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SampleOrder:
    """Order of the samples of `seq_len` tokens (and one more as the last label) of a stream of `tokens` tokens.

    Each epoch visits every sample once, in its own permutation: a Feistel network on the sample's number, so that any
    position is found at once. Raises R302 when the stream is shorter than one sample.
    """

    tokens: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        if self.tokens <= self.seq_len:
            why = f"{self.tokens} tokens are fewer than one sample of {self.seq_len} + 1"
            raise fail("R302", where="data", why=why, fix="Add text or lower seq_len")

    def __len__(self) -> int:
        """Samples in an epoch."""
        return (self.tokens - 1) // self.seq_len

    def start(self, index: int) -> int:
        """First token of the sample at position `index` of the run (0, 1, ... over all epochs)."""
        epoch, position = divmod(index, len(self))
        keys = round_keys(self.seed, epoch)
        half = max(1, ((len(self) - 1).bit_length() + 1) // 2)
        place = feistel(position, half, keys)
        while place >= len(self):  # the network permutes 4^half >= n numbers; walk on until inside
            place = feistel(place, half, keys)
        return place * self.seq_len


@lru_cache(maxsize=8)
def round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """Keys of the rounds for one epoch, 64 bits each."""
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))


def feistel(value: int, half: int, keys: tuple[int, ...]) -> int:
    """Permutation of the numbers below 4^half."""
    low_bits = (1 << half) - 1
    left, right = value >> half, value & low_bits
    for key in keys:
        left, right = right, left ^ (mix(right ^ key) & low_bits)
    return left << half | right


def mix(value: int) -> int:
    """64-bit hash of a number (the finisher of splitmix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def batch(store: TokenStore, order: SampleOrder, first: int, count: int) -> npt.NDArray[np.int64]:
    """Samples first .. first+count-1 of the run, shape (count, seq_len + 1)."""
    starts = [order.start(index) for index in range(first, first + count)]
    return np.stack([store.tokens[start : start + order.seq_len + 1] for start in starts]).astype(np.int64)
