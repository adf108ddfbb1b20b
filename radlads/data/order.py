"""The order of training samples: a function of seed and position alone, equal for every batch size and number of processes.

An order says which sample stands at a position of the run (0, 1, ... over all epochs); `samples` says what a sample is.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from radlads.errors import fail

ROUNDS = 4
MASK = (1 << 64) - 1
# Positions over which a mixture keeps its proportions exactly.
BLOCK = 4096


class Order(Protocol):
    """Which of `len` samples stands at a position."""

    def __len__(self) -> int:
        """Samples in an epoch."""

    def place(self, index: int) -> int:
        """Number of the sample at position `index` of the run."""


@dataclass(frozen=True)
class Shuffled:
    """Each epoch visits each of `count` samples once, in its own permutation.

    The permutation is a Feistel network on the sample's number: any position is found at once, without a table.
    """

    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def place(self, index: int) -> int:
        """Number of the sample at position `index`."""
        epoch, position = divmod(index, self.count)
        keys = round_keys(self.seed, epoch)
        half = max(1, ((self.count - 1).bit_length() + 1) // 2)
        place = feistel(position, half, keys)
        while place >= self.count:  # the network permutes 4^half >= count numbers; walk on until inside
            place = feistel(place, half, keys)
        return place


@dataclass(frozen=True)
class MagicPrime:
    """The order of the published training (protocol section 1.8), which knows no seed: (floor(P phi) ii^3) mod P.

    phi is (sqrt 5 - 1) / 2, P the largest prime below `count` with P mod 3 = 2 (cubing permutes the residues then), and
    ii = 1 + epoch 40320 + idx world_size + rank upstream, which is 1 + position. After P samples it begins anew.
    Raises R302 when there are too few samples for such a prime.
    """

    count: int

    def __post_init__(self) -> None:
        if self.count < 3:
            why = f"{self.count} samples are too few for the magic prime"
            raise fail("R302", where="data.order", why=why, fix="Use order: shuffled, or more data")

    def __len__(self) -> int:
        return magic_prime(self.count)

    def place(self, index: int) -> int:
        """Number of the sample at position `index`."""
        prime = magic_prime(self.count)
        return int(prime * ((math.sqrt(5) - 1) / 2)) * (1 + index) ** 3 % prime


@lru_cache(maxsize=64)
def magic_prime(count: int) -> int:
    """The largest prime below `count` that is 2 modulo 3; `count` is at least 3."""
    prime = count - 1
    while prime % 3 != 2 or not is_prime(prime):
        prime -= 1
    return prime


def is_prime(number: int) -> bool:
    """Whether a number is prime, by trial division: 64 bits would be slow, but 10^15 tokens are not."""
    return number >= 2 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


@dataclass(frozen=True)
class Mixture:
    """Which of several parts a position belongs to, in the proportions of `weights`, and how often the part came before.

    In every block of 4096 positions each part has its share, rounded by largest remainder (and at least one position), in
    an order shuffled by seed and block.
    """

    weights: tuple[float, ...]
    seed: int

    def find(self, index: int) -> tuple[int, int]:
        """(part, position within the part) of position `index` of the run."""
        if len(self.weights) == 1:
            return 0, index
        block, within = divmod(index, BLOCK)
        counts = shares(self.weights)
        parts, ranks = block_plan(self.weights, self.seed, block)
        part = int(parts[within])
        return part, block * counts[part] + int(ranks[within])


@lru_cache(maxsize=16)
def shares(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Positions of a block that each part gets; they sum to BLOCK."""
    exact = [BLOCK * weight / sum(weights) for weight in weights]
    counts = [max(1, int(value)) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: max(0, BLOCK - sum(counts))]:
        counts[part] += 1
    counts[counts.index(max(counts))] -= max(0, sum(counts) - BLOCK)
    return tuple(counts)


@lru_cache(maxsize=16)
def block_plan(weights: tuple[float, ...], seed: int, block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Part of every position of one block, and how many positions of the block before it have the same part."""
    counts = shares(weights)
    ordered = np.repeat(np.arange(len(weights)), counts)
    shuffled = Shuffled(BLOCK, seed ^ 0x9E3779B97F4A7C15)
    parts = ordered[[shuffled.place(block * BLOCK + position) for position in range(BLOCK)]]
    ranks = np.zeros(BLOCK, np.int64)
    for part, count in enumerate(counts):
        ranks[parts == part] = np.arange(count)
    return parts, ranks


@lru_cache(maxsize=64)
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
