"""Fifty chats at once of every kind; `python -m tests.load` does it with a thousand and a model."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

pytest.importorskip("httpx")

from radlads.serve.worker import Full, Job, Worker
from radlads.tokenizer import Tokenizer
from tests.load import KINDS, TURNS, conversations, run_chats
from tests.toy import ToyEngine

Start = Callable[..., tuple[str, Worker]]
CHATS, TOKENS = 50, 6


class Held(ToyEngine):
    """Reads nothing before it is let go: here, when the queue has been full."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def feed(self, state: Any, tokens: Sequence[int]) -> Any:
        assert self.go.wait(60)
        return super().feed(state, tokens)


@pytest.mark.parametrize("slots, waiting", [(8, 64), (4, 8)], ids=["all wait", "some are sent away"])
def test_no_chat_is_lost_or_mixed_up(
    start: Start, tokenizer: Tokenizer, slots: int, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Held()
    address, worker = start(engine, slots=slots, waiting=waiting)
    submit = worker.submit

    def watched(job: Job) -> None:
        try:
            submit(job)
        except Full:
            engine.go.set()
            raise

    monkeypatch.setattr(worker, "submit", watched)
    if waiting >= CHATS:
        engine.go.set()
    expected = conversations(ToyEngine(), tokenizer, CHATS, TOKENS)
    assert len({tuple(answers) for answers in expected}) > 0.9 * CHATS
    tally, health = asyncio.run(run_chats(address, expected, TOKENS))
    staying = sum("leaves" not in KINDS[i % len(KINDS)] for i in range(CHATS))
    assert not tally.lost and not tally.wrong and tally.right >= TURNS * staying  # some answers end before their client leaves
    assert (health["active"], health["waiting"], health["failed"], health["restarts"]) == (0, 0, 0, 0)
    assert bool(tally.told_to_wait) == (waiting < CHATS)
    assert worker.is_alive()


def test_a_wrong_answer_is_noticed(start: Start, tokenizer: Tokenizer) -> None:
    expected = conversations(ToyEngine(), tokenizer, 6, TOKENS)
    expected[0], expected[1] = expected[1], expected[0]
    tally, _ = asyncio.run(run_chats(start()[0], expected, TOKENS))
    assert len(tally.wrong) >= 2
