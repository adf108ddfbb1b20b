"""What the trainer draws: samples of `seq_len` + 1 tokens from one or several stores, with flags beside the tokens.

A batch is one int64 array: the token in the low 32 bits, and above it the flags of that place. Without masks and document
boundaries no flag is set, and the array holds the tokens themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from radlads.data.order import MagicPrime, Mixture, Order, Shuffled
from radlads.data.store import TokenStore
from radlads.errors import fail

TOKEN = (1 << 32) - 1  # the bits of the token
SILENT = 1 << 32  # as a label this token does not count
FIRST = 1 << 33  # the first token of a document
PAD = 1 << 34  # no token of the text at all

Packing = Literal["stream", "reset", "document"]
OrderName = Literal["shuffled", "magic_prime"]
Ints = npt.NDArray[np.int64]


class Part(NamedTuple):
    """One component of a mixture; weights need not sum to one."""

    store: TokenStore
    weight: float


@dataclass(frozen=True)
class Corpus:
    """The token stores that a run trains on, and in which order. Raises R302 when it is empty."""

    parts: tuple[Part, ...]
    order: OrderName = "shuffled"

    def __post_init__(self) -> None:
        if not self.parts:
            raise fail("R302", where="data", why="there is no source", fix="Name at least one source")

    @classmethod
    def of(cls, store: TokenStore) -> "Corpus":
        """The corpus of one store."""
        return cls((Part(store, 1.0),))

    @property
    def tokens(self) -> int:
        """Tokens of all parts, each counted once."""
        return sum(len(part.store) for part in self.parts)

    def samples(self, seq_len: int, seed: int, packing: Packing = "stream") -> "Samples":
        """The samples of a stage, in their order."""
        return Samples(self, seq_len, seed, packing)


class Samples:
    """Samples of `seq_len` tokens (and one more as the last label), by their position in the run.

    packing "stream": windows of the text that do not overlap, documents run together, as in the published training;
    "reset": the same windows, the first token of every document marked FIRST, where the state is to begin anew;
    "document": a sample holds one document or a stretch of it, the rest is marked PAD.
    Raises R302 when a part is shorter than one sample.
    """

    def __init__(self, corpus: Corpus, seq_len: int, seed: int, packing: Packing = "stream") -> None:
        self.parts, self.seq_len, self.packing = [part.store for part in corpus.parts], seq_len, packing
        self.mixture = Mixture(tuple(part.weight for part in corpus.parts), seed)
        # In document packing the first token of every sample, and where its document ends.
        self.stretches = [stretches(store, seq_len) for store in self.parts] if packing == "document" else []
        self.starts = [store.document_starts() for store in self.parts] if packing == "reset" else []
        self.orders: list[Order] = []
        self.counts: list[int] = []
        for number, store in enumerate(self.parts):
            count = len(self.stretches[number][0]) if self.stretches else (len(store) - 1) // seq_len
            if count < 1:
                why = f"{len(store)} tokens are fewer than one sample of {seq_len} + 1"
                raise fail("R302", where=store.path, why=why, fix="Add text or lower seq_len")
            self.counts.append(count)
            part_seed = seed + (number << 32)
            self.orders.append(MagicPrime(count) if corpus.order == "magic_prime" else Shuffled(count, part_seed))

    def __len__(self) -> int:
        """Samples that visit every part once."""
        return sum(map(len, self.orders))

    def batch(self, first: int, count: int) -> Ints:
        """The samples at positions first .. first + count - 1 of the run, shape (count, seq_len + 1)."""
        return np.stack([self.sample(index) for index in range(first, first + count)])

    def sample(self, index: int) -> Ints:
        """The sample at one position of the run, shape (seq_len + 1,)."""
        number, position = self.mixture.find(index)
        return self.at(number, self.orders[number].place(position))

    def span(self, index: int) -> tuple[int, int, int]:
        """Where the sample at one position of the run comes from: part, and first and last-but-one token of its store."""
        number, position = self.mixture.find(index)
        return number, *self.place(number, self.orders[number].place(position))

    def place(self, number: int, place: int) -> tuple[int, int]:
        """First and last-but-one token of sample `place` of part `number`; samples are numbered along the store."""
        if not self.stretches:
            return place * self.seq_len, (place + 1) * self.seq_len + 1
        start, end = (int(table[place]) for table in self.stretches[number])
        return start, end

    def at(self, number: int, place: int) -> Ints:
        """Sample `place` of part `number`, shape (seq_len + 1,)."""
        store, length = self.parts[number], self.seq_len + 1
        start, end = self.place(number, place)
        tokens, counted = store.read(start, end)
        found = np.full(length, PAD | SILENT, np.int64)
        found[: end - start] = tokens
        if counted is not None:
            found[: end - start][~counted] |= SILENT
        if self.starts:
            starts = self.starts[number]
            inside = starts[np.searchsorted(starts, start) : np.searchsorted(starts, end)] - start
            found[inside] |= FIRST | SILENT  # what begins a document cannot be told from the one before it
        return found


def stretches(store: TokenStore, seq_len: int) -> tuple[Ints, Ints]:
    """First and last-but-one token of every sample of one document at most; documents of one token give none."""
    starts = store.document_starts()
    ends = np.append(starts[1:], len(store))
    counts = np.maximum(0, -(-(ends - starts - 1) // seq_len))
    document = np.repeat(np.arange(len(starts)), counts)
    within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[document] + within * seq_len
    return first, np.minimum(first + seq_len + 1, ends[document])


def corpus_of(stores: Sequence[TokenStore], weights: Sequence[float] | None, order: OrderName = "shuffled") -> Corpus:
    """A corpus of stores; without weights each is visited in proportion to its size."""
    shares = [float(len(store)) for store in stores] if weights is None else list(weights)
    return Corpus(tuple(map(Part, stores, shares)), order)
