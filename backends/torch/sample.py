"""Text written by a model in large batches, as training data: sampled at a temperature, seeded."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from radlads.backends.torch.decode import WARM_UP, Rows, captured, draw, logits_of
from radlads.backends.torch.load import load_model
from radlads.backends.torch.model import Model
from radlads.folder import ModelFolder


class Turns(NamedTuple):
    """Tokens of a chat template: before an answer, before the next question, and those that end a turn.

    Plain text is one without either: what ends a turn then ends a document, and the model goes on as it likes.
    """

    answer: Sequence[int] = ()
    again: Sequence[int] = ()
    ends: frozenset[int] = frozenset()


# Texts written at once: a GPU reads the weights of a small model for many of them in the same time.
ROWS_AT_ONCE = {"cpu": 64, "cuda": 1024}
# Where a token comes from: the model wrote it, it begins what the template puts there, or it is given otherwise.
WROTE, TEMPLATE, GIVEN = range(3)


class Written(NamedTuple):
    """Rows of text: tokens (B, T), and where each comes from (B, T)."""

    tokens: npt.NDArray[np.int64]
    origin: npt.NDArray[np.uint8]


def sample_rows(
    folder: ModelFolder,
    openings: Iterator[Sequence[int]],
    turns: Turns,
    *,
    tokens: int,
    seed: int,
    temp: float = 1.0,
    seq_len: int = 512,
    batch_size: int | None = None,
    device: str | None = None,
    seconds: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Written]:
    """Rows of `seq_len` tokens that begin with `openings` (of one length), until there are `tokens` of them or time is up.

    `progress` gets (tokens so far, tokens in all). The same seed gives the same rows on the same kind of device. `seconds`
    bounds the time: no batch is begun that would not end in it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch_size = min(batch_size or ROWS_AT_ONCE["cpu" if device == "cpu" else "cuda"], -(-tokens // seq_len))
    model = load_model(folder, device=device, dtype="float32" if device == "cpu" else None)
    generator = torch.Generator(device).manual_seed(seed)
    writer, began, took, done = None, time.monotonic(), 0.0, 0
    while done < tokens and (seconds is None or time.monotonic() + took - began < seconds):
        before = time.monotonic()
        opening = torch.tensor([list(ids) for ids in islice(openings, batch_size)], device=device)
        writer = writer or Writer(model, len(opening), seq_len, turns, temp, generator)
        found = writer.write(opening)
        rows = min(batch_size, -(-(tokens - done) // seq_len))
        yield Written(found.tokens[:rows], found.origin[:rows])
        done += rows * seq_len
        took = time.monotonic() - before
        if progress is not None:
            progress(min(done, tokens), tokens)


class Writer:
    """Writes `count` rows of `length` tokens at a time."""

    def __init__(self, model: Model, count: int, length: int, turns: Turns, temp: float, generator: torch.Generator) -> None:
        self.rows = Rows(model, count, length + WARM_UP)
        self.model, self.temp, self.generator = model, temp, generator
        device = self.rows.device
        templates = (list(turns.answer), list(turns.again))
        width = max(1, *map(len, templates))
        self.templates = torch.tensor([ids + [0] * (width - len(ids)) for ids in templates], device=device)
        self.lengths = torch.tensor([len(ids) for ids in templates], device=device)
        self.ends = torch.tensor(sorted(turns.ends), dtype=torch.long, device=device)
        # Of each row: whose turn it is (0: a question), the template that is due, and how much of it stands there already.
        self.turn, self.template, self.place = (torch.zeros(count, dtype=torch.long, device=device) for _ in range(3))
        self.tokens = torch.zeros(length + WARM_UP, count, dtype=torch.long, device=device)
        self.origin = torch.full((length + WARM_UP, count), GIVEN, dtype=torch.uint8, device=device)
        self.logits = torch.zeros(count, model.spec.V, device=device)
        self.length = length
        self.go: Callable[[], None] | None = None

    def write(self, opening: torch.Tensor) -> Written:
        """The rows that begin with opening (count, T)."""
        if self.go is None:
            self.begin(opening)
            self.go = captured(self.step, self.rows, self.generator)
        self.begin(opening)
        for _ in range(self.length - opening.shape[1]):
            self.go()
        # In memory of their own: the next rows are written where these were.
        return Written(*(x[: self.length].T.cpu().numpy().copy() for x in (self.tokens, self.origin)))

    @torch.no_grad()
    def begin(self, opening: torch.Tensor) -> None:
        """Nothing written yet but the opening."""
        self.logits.copy_(logits_of(self.model, self.rows.begin(opening)))
        self.tokens[: opening.shape[1]] = opening.T
        self.turn.zero_()
        self.template.zero_()
        self.place.copy_(self.lengths[0].expand_as(self.place))

    @torch.no_grad()
    def step(self) -> None:
        """Draw a token for each row, put the template's in its place where one is due, and feed it."""
        drawn = draw(self.logits, self.temp, self.generator)
        ended = (self.place >= self.lengths[self.template]) & (drawn[:, None] == self.ends).any(-1)
        # The template's own tokens follow, the end of the turn being the first of them.
        self.template.copy_(torch.where(ended, self.turn, self.template))
        self.turn.copy_(torch.where(ended, 1 - self.turn, self.turn))
        self.place.masked_fill_(ended, 0)
        due = self.place < self.lengths[self.template]
        origin = torch.where(due, torch.where(self.place == 0, TEMPLATE, GIVEN), WROTE)
        wanted = self.templates[self.template, self.place.clamp(max=self.templates.shape[1] - 1)]
        token = torch.where(due, wanted, drawn)
        self.place += due
        self.tokens.index_copy_(0, self.rows.seen, token[None])
        self.origin.index_copy_(0, self.rows.seen, origin[None].to(self.origin.dtype))
        self.logits.copy_(logits_of(self.model, self.rows.step(token)))


def said(tokens: Sequence[int], origin: Sequence[int]) -> list[list[int]]:
    """The finished turns of one row: what the model wrote before each of the template's words, question and answer in turn."""
    turns: list[list[int]] = [[]]
    for token, came_from in zip(tokens, origin, strict=True):
        if came_from == TEMPLATE:
            turns.append([])
        elif came_from == WROTE:
            turns[-1].append(token)
    return turns[:-1]
