"""Blind changes of files: bits, numbers, pieces, words of the format, and two files spliced."""

from collections.abc import Sequence
from random import Random

EDGES = (0, 1, 2, 7, 8, 31, 32, 63, 64, 127, 128, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**62 + 4, 2**63 - 1, 2**63, 2**64 - 1)


def mutated(rng: Random, data: bytes, others: Sequence[bytes], words: Sequence[bytes], limit: int = 4096) -> bytes:
    """A copy of `data` with one to eight changes, at most `limit` bytes long."""
    copy = bytearray(data)
    for _ in range(1 << rng.randrange(4)):
        change(rng, copy, others, words)
    return bytes(copy[:limit])


def change(rng: Random, copy: bytearray, others: Sequence[bytes], words: Sequence[bytes]) -> None:
    """One change in place."""
    start = rng.randrange(len(copy) + 1)
    stop = min(len(copy), start + rng.randint(1, 16))
    kind = rng.randrange(10)
    if kind == 0 and copy:
        copy[start % len(copy)] ^= 1 << rng.randrange(8)
    elif kind == 1 and copy:
        copy[start % len(copy)] = rng.randrange(256)
    elif kind == 2:
        width = rng.choice((1, 2, 4, 8))
        copy[start : start + width] = (rng.choice(EDGES) % 256**width).to_bytes(width, "little")
    elif kind == 3:
        del copy[start:stop]
    elif kind == 4:
        copy[start:start] = copy[start:stop] * rng.choice((1, 1, 2, 50))
    elif kind == 5:
        copy[start:start] = rng.choice(words)
    elif kind == 6:
        word = rng.choice(words)
        copy[start : start + len(word)] = word
    elif kind == 7:
        other = rng.choice(others)
        begin = rng.randrange(len(other) + 1)
        copy[start:stop] = other[begin : begin + rng.randint(1, 64)]
    elif kind == 9:
        copy[start:start] = rng.randbytes(rng.randint(1, 2))
    elif kind == 8 and copy:
        spot = start % len(copy)
        copy[spot] = (copy[spot] + rng.choice((-1, 1))) % 256
