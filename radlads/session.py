"""Answers as streams of text, and conversations that can be undone, retried and forked.

A session keeps ids, texts and a handful of states; with recurrent layers its memory does not grow with the context.
Knows only the Engine protocol: no backend, no terminal.
"""

import copy
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from radlads.engine import Engine, Logits
from radlads.errors import fail
from radlads.sampling import PENALTY_WINDOW, Sampling, pick
from radlads.tokenizer import Message, StreamDecoder, Tokenizer, continued

PREFILL_STEP = 1024  # tokens fed at once, so that the memory for a prompt does not grow with its length


class Point(NamedTuple):
    """The model after `length` tokens: the logits (V,) for the next one, and the state."""

    length: int
    logits: Logits
    state: Any


class Context:
    """One sequence of ids and the last few points along it; going back to a kept point costs nothing.

    With a `base`, from a state file, the sequence goes on from there: its ids are those after the base.
    """

    KEPT = 4

    def __init__(self, engine: Engine, base: Point | None = None) -> None:
        self.engine = engine
        self.base = base
        self._ids: list[int] = []
        self._points: deque[Point] = deque(maxlen=self.KEPT)

    def reach(self, ids: Sequence[int]) -> tuple[Point, int]:
        """The point after `ids` (at least one, unless there is a base), and how many of them had to be fed."""
        ids = list(ids)
        while self._points and not self._leads_to(self._points[-1], ids):
            self._points.pop()
        logits: Logits | None
        if self._points:
            length, logits, state = self._points[-1]
        elif self.base is not None:
            length, logits, state = 0, self.base.logits, self.base.state
        else:
            length, logits, state = 0, None, self.engine.start()
        for first in range(length, len(ids), PREFILL_STEP):
            logits, state = self.engine.feed(state, ids[first : first + PREFILL_STEP])
        if logits is None:
            raise ValueError("no tokens to feed")
        self._ids = ids
        point = Point(len(ids), logits, state)
        if length < len(ids):
            self._points.append(point)
        return point, len(ids) - length

    def keep(self, ids: Sequence[int], point: Point) -> None:
        """Remember a point further along the ids that were reached."""
        self._ids = list(ids)
        if not self._points or self._points[-1].length < point.length:
            self._points.append(point)

    def fork(self) -> "Context":
        """A second context from here on; the states are shared, as they never change."""
        twin = Context(self.engine, self.base)
        twin._ids, twin._points = list(self._ids), self._points.copy()
        return twin

    def _leads_to(self, point: Point, ids: list[int]) -> bool:
        return point.length <= len(ids) and self._ids[: point.length] == ids[: point.length]


class Writer:
    """Turns logits into an answer, a token at a time: chooses, decodes, and watches for the end.

    `finish` is "stop" (end of text or a stop string), "length" (`max_tokens`), or None while it goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str] = (),
        rng: np.random.Generator | None = None,
    ) -> None:
        if max_tokens < 1:
            raise fail("R101", where="--max-tokens", why=f"{max_tokens} is not above 0", fix="Give the number of tokens to write")
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.text = ""
        self.finish: str | None = None
        self._ends = tokenizer.eos_ids | tokenizer.turn_ids
        self._decoder = StreamDecoder(tokenizer, prompt_ids)
        self._recent = deque(prompt_ids[-PENALTY_WINDOW:], maxlen=PENALTY_WINDOW)
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._stop = tuple(text for text in stop if text)
        self._rng = rng or sampling.generator()
        self._held = ""  # text that may begin a stop string

    def take(self, logits: Logits) -> str:
        """Choose the next token from logits (V,); the text that is certain now, maybe none. See `finish` for the end."""
        token, logprob = pick(logits, self._sampling, self._rng, list(self._recent))
        if token in self._ends:
            self.finish = "stop"
            return self._show(self._decoder.finish())
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        self._recent.append(token)
        piece = self._decoder.add(token)
        if len(self.token_ids) == self._max_tokens:
            self.finish = "length"
            piece += self._decoder.finish()
        return self._show(piece)

    def _show(self, piece: str) -> str:
        self._held += piece
        ends = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if ends:
            shown, self.finish = self._held[: min(ends)], "stop"
        elif self.finish is not None:
            shown = self._held
        else:
            shown = self._held[: len(self._held) - max((_overlap(self._held, text) for text in self._stop), default=0)]
        self._held = self._held[len(shown) :]
        self.text += shown
        return shown


class Generation:
    """One answer being written: iterate over it for pieces of text; its counters are right at every moment.

    `finish` is None while it runs or when it was interrupted, else as in Writer.
    """

    def __init__(
        self,
        context: Context,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str] = (),
        rng: np.random.Generator | None = None,
    ) -> None:
        if not prompt_ids and context.base is None:
            why = "it is empty, and the model has no token that begins a text"
            raise fail("R101", where="the prompt", why=why, fix="Give some text")
        self.prompt_ids = list(prompt_ids)
        self.fed_tokens = 0
        self.prompt_seconds = 0.0
        self.seconds = 0.0
        self._steps, self._first_step = 0, 0.0  # tokens fed while writing, and when the first of them was done
        self._context = context
        self._writer = Writer(tokenizer, self.prompt_ids, sampling, max_tokens, stop, rng)

    @property
    def token_ids(self) -> list[int]:
        """Ids written so far."""
        return self._writer.token_ids

    @property
    def logprobs(self) -> list[float]:
        """Log-probability of each of them."""
        return self._writer.logprobs

    @property
    def text(self) -> str:
        """Text shown so far."""
        return self._writer.text

    @property
    def finish(self) -> str | None:
        """Why it ended."""
        return self._writer.finish

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens fed per second."""
        return self.fed_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_tps(self) -> float:
        """Tokens written per second, from the second step on where there are more: the first may build kernels."""
        if self._steps > 1 and self.seconds > self._first_step:
            return (self._steps - 1) / (self.seconds - self._first_step)
        return len(self.token_ids) / self.seconds if self.seconds else 0.0

    def __iter__(self) -> Iterator[str]:
        began = time.perf_counter()
        point, self.fed_tokens = self._context.reach(self.prompt_ids)
        self.prompt_seconds = time.perf_counter() - began
        began = time.perf_counter()
        try:
            while self.finish is None:
                piece = self._writer.take(point.logits)
                self.seconds = time.perf_counter() - began
                if self._steps == 1:
                    self._first_step = self.seconds
                if piece:
                    yield piece
                if self.finish is None:
                    point = Point(point.length + 1, *self._context.engine.feed(point.state, self.token_ids[-1:]))
                    self._steps += 1
        finally:
            self._context.keep(self.prompt_ids + self.token_ids, point)


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    max_tokens: int,
    stop: Sequence[str] = (),
) -> Generation:
    """Continue `prompt_ids`: iterate over the result for pieces of text."""
    return Generation(Context(engine), tokenizer, prompt_ids, sampling, max_tokens, stop)


@dataclass
class Turn:
    """One exchange, and the length of ids and text before it."""

    said: str
    answer: str
    ids_before: int
    text_before: int


@dataclass
class Session:
    """A conversation with a model: by its chat template, or as one growing text where it has none."""

    engine: Engine
    tokenizer: Tokenizer
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    text: str = ""  # what `ids` stand for, as far as it was shown
    last: Generation | None = None

    def __post_init__(self) -> None:
        self.context = Context(self.engine)
        self.rng = self.sampling.generator()
        if self.system:
            self.set_system(self.system)

    @property
    def plain(self) -> bool:
        """Whether the conversation is one growing text, as the model has no chat template."""
        return not self.tokenizer.has_chat_template

    def say(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer to `text`. Closing the iterator early keeps what was written as the answer."""
        ids, prompt = self._prompt(text)
        generation = Generation(self.context, self.tokenizer, ids, self.sampling, self.max_tokens, rng=self.rng)
        self.last = generation
        try:
            yield from generation
        finally:
            if generation.token_ids or generation.finish:
                self.turns.append(Turn(text, generation.text, len(self.ids), len(self.text)))
                self.ids = ids + generation.token_ids
                self.text = prompt + generation.text

    def undo(self) -> Turn:
        """Take back the last exchange and return it; R101 when there is none."""
        if not self.turns:
            raise fail("R101", where="/undo", why="nothing was said yet", fix="Say something first")
        turn = self.turns.pop()
        del self.ids[turn.ids_before :]
        self.text = self.text[: turn.text_before]
        return turn

    def retry(self) -> Generator[str, None, None]:
        """Pieces of another answer to the last thing said."""
        return self.say(self.undo().said)

    def fork(self) -> "Session":
        """A second conversation from this point on; neither sees what is said in the other."""
        twin = copy.copy(self)
        twin.turns, twin.ids = list(self.turns), list(self.ids)
        twin.context, twin.rng = self.context.fork(), copy.deepcopy(self.rng)
        return twin

    def point(self) -> Point:
        """The model after all that was said. R101 when nothing was."""
        if not self.ids:
            raise fail("R101", where="/save", why="nothing was said yet", fix="Say something first")
        return self.context.reach(self.ids)[0]

    def record(self) -> dict[str, Any]:
        """What a session file keeps beside the state and the ids: texts and turns, as JSON values."""
        return {"system": self.system, "text": self.text, "turns": [asdict(turn) for turn in self.turns]}

    def restore(self, point: Point, ids: Sequence[int], record: Mapping[str, Any]) -> None:
        """Take up a conversation where `record`, `ids` and `point` left it. ValueError when they do not fit together."""
        turns = [Turn(**turn) for turn in record["turns"]]
        marks = [(0, 0), *((turn.ids_before, turn.text_before) for turn in turns), (len(ids), len(record["text"]))]
        in_order = all(a <= c and b <= d for (a, b), (c, d) in pairwise(marks))
        if point.length != len(ids) or not in_order or not isinstance(record["text"], str):
            raise ValueError("the turns, the ids and the state do not fit together")
        self.turns, self.ids, self.text, self.system, self.last = turns, list(ids), record["text"], record["system"], None
        self.context = Context(self.engine)
        self.context.keep(ids, point)

    def reset(self) -> None:
        """Forget everything said; the system prompt and the settings stay."""
        self.turns, self.ids, self.text, self.last = [], [], "", None

    def set_system(self, text: str) -> None:
        """Set the system prompt of this conversation; R101 for a model without a chat template."""
        if self.plain:
            why = "the model has no chat template, so a system prompt has no place"
            raise fail("R101", where="system prompt", why=why, fix="Put the instructions into the prompt")
        self.system = text or None

    def set_sampling(self, sampling: Sampling) -> None:
        """Change how tokens are chosen; a new seed starts its random numbers afresh."""
        if sampling.seed != self.sampling.seed:
            self.rng = sampling.generator()
        self.sampling = sampling

    def _prompt(self, said: str) -> tuple[list[int], str]:
        """Ids and text of everything up to the answer to `said`."""
        if self.plain:
            full = continued(self.text, said)
        else:
            full = self.tokenizer.chat(self._messages(said))
        if self.ids and full.startswith(self.text):
            return self.ids + self.tokenizer.encode(full[len(self.text) :]), full
        # The template rewrote an earlier message (or this is the first): read the whole text again.
        return self.tokenizer.encode(full, add_special=self.plain), full

    def _messages(self, said: str) -> list[Message]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.said}, {"role": "assistant", "content": turn.answer}]
        return [*messages, {"role": "user", "content": said}]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
