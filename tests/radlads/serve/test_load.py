"""Fifty chats at once of every kind; `python -m tests.load` does it with a thousand and a model."""

import asyncio
from collections.abc import Callable

import pytest

pytest.importorskip("httpx")

from radlads.serve.worker import Worker
from radlads.tokenizer import Tokenizer
from tests.load import KINDS, TURNS, conversations, run_chats
from tests.toy import ToyEngine

Start = Callable[..., tuple[str, Worker]]
CHATS, TOKENS = 50, 6


@pytest.mark.parametrize("slots, waiting", [(8, 64), (4, 8)], ids=["all wait", "some are sent away"])
def test_no_chat_is_lost_or_mixed_up(start: Start, tokenizer: Tokenizer, slots: int, waiting: int) -> None:
    address, worker = start(ToyEngine(), slots=slots, waiting=waiting)
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
