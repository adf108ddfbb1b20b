"""Recall items fill their length, hold their answer once, and tell a model that recalls from one that does not."""


import numpy as np
import pytest

from radlads.engine import Scored
from radlads.errors import RadladsError
from radlads.evals.recall import TASKS, RecallItem, recall_items, recalled
from radlads.tokenizer import Tokenizer
from tests.models import tiny_teacher


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_teacher(tmp_path_factory.mktemp("model") / "teacher"))


@pytest.mark.parametrize("task", TASKS)
def test_items_fill_their_length_and_hold_the_answer(task: str, tokenizer: Tokenizer) -> None:
    items = recall_items(task, tokenizer, 900, 4, seed=0)
    for item in items:
        size = len(item.prompt) + len(item.answer)
        assert 700 < size <= 900
        assert tokenizer.decode(item.answer) in tokenizer.decode(item.prompt)
    assert items == recall_items(task, tokenizer, 900, 4, seed=0) != recall_items(task, tokenizer, 900, 4, seed=1)


def test_the_answer_moves_through_the_prompt(tokenizer: Tokenizer) -> None:
    places = []
    for item in recall_items("passkey", tokenizer, 1200, 3, seed=0):
        text = tokenizer.decode(item.prompt)
        places.append(text.index(tokenizer.decode(item.answer).strip()) / len(text))
    assert places == sorted(places) and places[0] < 0.3 and places[-1] > 0.6


def test_a_length_that_holds_no_item_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RadladsError, match="8 tokens hold no item"):
        recall_items("passkey", tokenizer, 8, 1, seed=0)


class Parrot:
    """An engine that finds the last `known` tokens of every sequence likely, and no other."""

    def __init__(self, known: int) -> None:
        self.known = known

    def score(self, sequences: list[list[int]]) -> list[Scored]:
        return [
            Scored(np.zeros(len(ids) - 1, np.float32), np.arange(len(ids) - 1) >= len(ids) - 1 - self.known) for ids in sequences
        ]


def test_every_token_of_the_answer_counts() -> None:
    items = [RecallItem([1, 2, 3], [4, 5]), RecallItem([1], [2, 3, 4])]
    assert recalled(Parrot(2), items) == [True, False]  # type: ignore[arg-type]
    assert recalled(Parrot(3), items) == [True, True]  # type: ignore[arg-type]
