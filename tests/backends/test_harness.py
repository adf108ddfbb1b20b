"""Scores of an engine, and what lm-evaluation-harness makes of them, against stock transformers and single steps."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from radlads.backends import open_engine
from radlads.folder import open_folder
from radlads.tokenizer import Tokenizer
from tests.models import tiny_teacher

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

TEXTS = ["The cat sat on the mat and looked at the sea", "A house by the sea is a small house", "Once upon a time"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("model") / "teacher", "qwen3")


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_scores_are_those_of_single_steps(teacher: Path, backend: str) -> None:
    engine = open_engine(open_folder(teacher), backend)
    sequences = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7], [5], list(range(40))]
    for ids, found in zip(sequences, engine.score(sequences), strict=True):
        state, logprobs, likeliest = engine.start(), [], []
        for token, wanted in pairwise(ids):
            logits, state = engine.feed(state, [token])
            logprobs.append(logits[wanted] - np.logaddexp.reduce(logits))
            likeliest.append(int(logits.argmax()) == wanted)
        assert found.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert found.likeliest.tolist() == likeliest


def stock_likelihood(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood of a continuation under stock transformers, and whether greedy decoding would write it."""
    logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].double()
    wanted = torch.tensor(continuation)
    return float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


@torch.no_grad()
def test_the_harness_gets_what_stock_transformers_gives(teacher: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from radlads.backends.harness import LOCAL_CONFIGS, EngineLM, run_tasks

    folder = open_folder(teacher)
    engine, tokenizer = open_engine(folder, "torch"), Tokenizer(teacher, folder.spec.vocab_size)
    lambada = LOCAL_CONFIGS["lambada"]([{"text": text} for text in TEXTS])
    blimp = LOCAL_CONFIGS["blimp"]([{"good": good, "bad": good[::-1]} for good in TEXTS])
    seen: list[tuple[int, int]] = []
    found = run_tasks(engine, tokenizer, [lambada, blimp], None, lambda *counts: seen.append(counts))
    ours = {scores.task: scores.items for scores in found}
    assert seen[-1][0] == seen[-1][1]
    model, stock = AutoModelForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    for index, text in enumerate(TEXTS):
        context, whole = stock(text.rpartition(" ")[0]).input_ids, stock(text).input_ids
        likelihood, greedy = stock_likelihood(model, context, whole[len(context) :])
        assert ours["lambada"]["perplexity"][index] == pytest.approx(likelihood, abs=1e-4)
        assert ours["lambada"]["acc"][index] == float(greedy)
        good, bad = (stock_likelihood(model, [0], stock(sentence).input_ids)[0] for sentence in (text, text[::-1]))
        assert ours["blimp"]["acc"][index] == float(good > bad)
        whole_text = [Instance("loglikelihood_rolling", {}, (text,), 0)]
        rolling = EngineLM(engine, tokenizer, lambda *_: None).loglikelihood_rolling(whole_text)
        assert rolling[0] == pytest.approx(good, abs=1e-4)


@torch.no_grad()
def test_contexts_beyond_the_positions_lose_their_beginning_as_in_the_harness(teacher: Path) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from radlads.backends.harness import EngineLM

    folder = open_folder(teacher)
    ours = EngineLM(open_engine(folder, "torch"), Tokenizer(teacher, folder.spec.vocab_size), lambda *_: None)
    ours.longest = 8
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher).eval(), AutoTokenizer.from_pretrained(teacher)
    stock = HFLM(model, tokenizer=tokenizer, max_length=8)
    asked = [Instance("loglikelihood", {}, (text.rpartition(" ")[0], " " + text.rpartition(" ")[2]), 0) for text in TEXTS]
    whole = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in TEXTS]
    assert [value for value, _ in ours.loglikelihood(asked)] == pytest.approx(
        [value for value, _ in stock.loglikelihood(asked, disable_tqdm=True)], abs=1e-4
    )
    assert ours.cut > 0
    assert ours.loglikelihood_rolling(whole) == pytest.approx(stock.loglikelihood_rolling(whole, disable_tqdm=True), abs=1e-4)
