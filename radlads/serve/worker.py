"""One thread that serves every request at once: it reads prompts in pieces and writes a token to each sequence in turn.

States are of a fixed size, and keys and values of softmax layers grow by a fixed size with every token, so what fits is known
before a prompt is read. An error ends one request, never the loop.
"""

import logging
import math
import queue
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from radlads.engine import Engine, Logits
from radlads.errors import RadladsError
from radlads.sampling import Sampling
from radlads.session import Writer
from radlads.tokenizer import Tokenizer

# Tokens of one prompt read before the others get their turn.
PREFILL_STEP = 512


@dataclass(frozen=True)
class Event:
    """What a client hears: a piece of text, and in the last event why it ended or what went wrong."""

    text: str = ""
    finish: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Job:
    """One request. `publish` is called from the worker's thread; `cancel` may be called from any."""

    prompt_ids: list[int]
    sampling: Sampling
    max_tokens: int
    stop: tuple[str, ...]
    publish: Callable[[Event], None]
    cached_tokens: int = 0
    written_tokens: int = 0
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """The client has gone: its place is free before the next token."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether the client has gone."""
        return self._cancelled.is_set()


@dataclass(eq=False)
class Slot:
    """A job being served: what is left of its prompt, and where its sequence stands: a state, and a seat once it is written."""

    job: Job
    writer: Writer
    state: Any
    waiting: list[int]
    logits: Logits | None
    seat: int | None = None


class PrefixStore:
    """States after whole sequences, the last used kept; found again only for a prompt that begins with exactly those ids.

    `capacity` bytes at most, as `nbytes` counts them for a number of tokens.
    """

    def __init__(self, capacity: float, nbytes: Callable[[int], int]) -> None:
        self.capacity, self.nbytes = capacity, nbytes
        self.hits = self.misses = self.reused_tokens = self.held_bytes = 0
        self._held: OrderedDict[bytes, tuple[Logits, Any]] = OrderedDict()  # by the ids, four bytes each

    def __len__(self) -> int:
        return len(self._held)

    def find(self, ids: Sequence[int]) -> tuple[int, Logits | None, Any]:
        """(tokens, logits, state) of the longest kept beginning of `ids`; (0, None, None) without one."""
        whole = array("i", ids).tobytes()
        lengths = sorted({len(held) for held in self._held}, reverse=True)
        best = next((whole[:length] for length in lengths if length <= len(whole) and whole[:length] in self._held), b"")
        if not best:
            self.misses += 1
            return 0, None, None
        self.hits += 1
        self.reused_tokens += len(best) // 4
        self._held.move_to_end(best)
        return len(best) // 4, *self._held[best]

    def keep(self, ids: Sequence[int], logits: Logits, state: Any) -> None:
        """Keep a state that fits at all, and let go of those used longest ago when there is no room."""
        key = array("i", ids).tobytes()
        if self.nbytes(len(ids)) > self.capacity:
            return
        self.held_bytes += 0 if key in self._held else self.nbytes(len(ids))
        self._held[key] = (logits, state)
        self._held.move_to_end(key)
        while self.held_bytes > self.capacity:
            oldest, _ = self._held.popitem(last=False)
            self.held_bytes -= self.nbytes(len(oldest) // 4)


class Full(Exception):
    """The queue is full."""


class Worker(threading.Thread):
    """Serves jobs with at most `slots` of them at once, whose states take at most `memory` bytes, and `waiting` in the queue;
    states for later turns are kept in `prefixes` bytes.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, slots: int, waiting: int, prefixes: float, memory: float = math.inf
    ) -> None:
        super().__init__(name="radlads-worker", daemon=True)
        self.engine, self.tokenizer, self.places, self.memory = engine, tokenizer, slots, memory
        self.seats = engine.seats(int(min(slots, max(1, memory / max(1, engine.spec.state_bytes())))))
        self.prefixes = PrefixStore(prefixes, self.kept_bytes)
        self.served = self.failed = self.restarts = self.written_tokens = 0
        self.fed_at = 0.0  # when the engine last did its work, by time.perf_counter
        self.active: list[Slot] = []
        self._queue: queue.Queue[Job | None] = queue.Queue(waiting)
        self._first: Job | None = None  # taken from the queue before there was memory for it
        self._stopping = threading.Event()

    def submit(self, job: Job) -> None:
        """Put a job in the queue. Raises Full when there is no room, or no time."""
        if self._stopping.is_set():
            raise Full
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise Full from None

    def stop(self) -> None:
        """End the loop; jobs still served hear of it."""
        self._stopping.set()
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            pass

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return self._queue.qsize() + (self._first is not None)

    def kept_bytes(self, tokens: int) -> int:
        """What a state after `tokens` tokens takes when it is kept: itself, logits and ids."""
        return self.engine.spec.state_bytes(tokens) + 4 * self.engine.spec.vocab_size + 4 * tokens

    def needs(self, job: Job) -> int:
        """Bytes that a job's state takes at its end, at most."""
        return self.engine.spec.state_bytes(len(job.prompt_ids) + job.max_tokens)

    def run(self) -> None:
        """The loop; an error in the middle of a step ends the jobs of that step and the loop goes on."""
        while not self._stopping.is_set():
            try:
                self.step()
            except Exception as error:
                self.restarts += 1
                logging.getLogger(__name__).exception("the serving loop failed and goes on")
                for slot in self.active[:]:
                    self.end(slot, Event(error=f"internal error: {type(error).__name__}"))
        stopping = Event(error="the server is stopping")
        for slot in self.active[:]:
            self.end(slot, stopping)
        while self.waiting:
            job = self._first or self._queue.get_nowait()
            self._first = None
            if job is not None:
                job.publish(stopping)

    def step(self) -> None:
        """Admit what fits, read one piece of one prompt, write one token to each sequence that is ready."""
        self.admit()
        for slot in [slot for slot in self.active if slot.job.cancelled]:
            self.end(slot, None)
        reading = next((slot for slot in self.active if slot.waiting), None)
        if reading is not None:
            self.read(reading)
        ready = [slot for slot in self.active if not slot.waiting and slot.logits is not None]
        going = [slot for slot in ready if self.write(slot)]
        if going:
            logits = self.seats.step([self.seat_of(slot) for slot in going], [slot.writer.token_ids[-1] for slot in going])
            self.fed_at = time.perf_counter()
            for slot, row in zip(going, logits, strict=True):
                slot.logits = row

    def seat_of(self, slot: Slot) -> int:
        """The seat of a sequence; one is taken when it begins to be written."""
        if slot.seat is None:
            slot.seat, slot.state = self.seats.enter(slot.state), None
        return slot.seat

    def admit(self) -> None:
        """Take jobs from the queue, in their order, while there are places and memory; wait for one when idle."""
        while len(self.active) < self.places:
            try:
                job = self._first or self._queue.get(block=not self.active)
            except queue.Empty:
                return
            self._first = None
            if job is None:
                return
            if job.cancelled:
                continue
            if self.active and sum(self.needs(slot.job) for slot in self.active) + self.needs(job) > self.memory:
                self._first = job
                return
            try:
                self.active.append(self.begin(job))
            except RadladsError as error:
                self.failed += 1
                job.publish(Event(error=str(error)))

    def begin(self, job: Job) -> Slot:
        """A place for a job, from the longest beginning of its prompt that is kept."""
        known, logits, state = self.prefixes.find(job.prompt_ids)
        job.cached_tokens = known
        writer = Writer(self.tokenizer, job.prompt_ids, job.sampling, job.max_tokens, job.stop)
        return Slot(job, writer, self.engine.start() if state is None else state, job.prompt_ids[known:], logits)

    def read(self, slot: Slot) -> None:
        """Read one piece of a prompt."""
        part, slot.waiting = slot.waiting[:PREFILL_STEP], slot.waiting[PREFILL_STEP:]
        try:
            slot.logits, slot.state = self.engine.feed(slot.state, part)
            self.fed_at = time.perf_counter()
        except Exception as error:
            self.end(slot, Event(error=f"the prompt could not be read: {type(error).__name__}"))

    def write(self, slot: Slot) -> bool:
        """Choose the next token of a sequence and say what is certain of it; False when the answer has ended."""
        assert slot.logits is not None
        try:
            text = slot.writer.take(slot.logits)
        except RadladsError as error:
            self.end(slot, Event(error=str(error)))
            return False
        slot.job.written_tokens = len(slot.writer.token_ids)
        if slot.writer.finish is None:
            if text:
                slot.job.publish(Event(text))
            return True
        self.end(slot, Event(text, slot.writer.finish))
        return False

    def end(self, slot: Slot, last: Event | None) -> None:
        """Free the place of a job and tell it so; what it read is kept for the next turn."""
        if last is not None and last.error is None and slot.logits is not None and not slot.waiting and self.prefixes.capacity:
            state = slot.state if slot.seat is None else self.seats.state(slot.seat)
            fed = slot.job.prompt_ids + slot.writer.token_ids
            self.prefixes.keep(fed[: state.position], np.array(slot.logits), state)
        if slot.seat is not None:
            self.seats.leave(slot.seat)
            slot.seat = None
        if slot in self.active:
            self.active.remove(slot)
        if last is not None:
            self.failed += last.error is not None
            self.served += last.error is None
            self.written_tokens += slot.job.written_tokens
            slot.job.publish(last)
