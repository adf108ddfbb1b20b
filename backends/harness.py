"""lm-evaluation-harness over any engine: its tasks, and our local ones as configurations of it."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from lm_eval import evaluator, simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from radlads.engine import Engine
from radlads.errors import fail
from radlads.sampling import Sampling
from radlads.session import stream
from radlads.tokenizer import Tokenizer

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
Array = npt.NDArray[np.float64]
# Sequences between two reports of progress.
REPORT_EVERY = 64


class EngineLM(TemplateLM):  # type: ignore[misc]
    """What the harness asks of a model.

    Contexts longer than the config's `max_position_embeddings` lose their beginning, as in the harness's own models, so that
    teacher and student read the same text; `cut` counts them.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, progress: Progress) -> None:
        super().__init__()
        self.engine, self.tokens, self.progress = engine, tokenizer, progress
        self.longest, self.cut = engine.spec.max_positions, 0

    def fitting(self, context: list[int], after: int) -> list[int]:
        """The end of a context that leaves room for `after` tokens more, at least one token."""
        room = max(1, self.longest - after)
        self.cut += len(context) > room
        return context[-room:]

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        found = self.tokens.eos_id if self.tokens.eos_id is not None else self.tokens.bos_id
        if found is None:
            raise fail("R206", where=self.tokens.path, why="no token begins or ends a text", fix="Name one in its config")
        return found

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context, by the harness's own rule."""
        return self.tokens.bos_id if self.tokens.bos_id is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with the tokenizer's own beginning unless that is switched off."""
        return self.tokens.encode(string, add_special=add_special_tokens is not False)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the likeliest; progress is ours to show."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        # Long ones first: each batch then holds sequences of like length, and memory peaks at the start.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        answers: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(order), REPORT_EVERY):
            part = order[first : first + REPORT_EVERY]
            # The last token is predicted, not read.
            scored = self.engine.score([self.fitting(requests[i][1], len(requests[i][2]) - 1) + requests[i][2] for i in part])
            for i, found in zip(part, scored, strict=True):
                size = len(requests[i][2])
                kept = slice(len(found.logprobs) - size, None)
                answers[i] = float(found.logprobs[kept].sum(dtype=np.float64)), bool(found.likeliest[kept].all())
            self.progress(len(answers), len(requests))
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts after the prefix token, in windows where they are too long for one."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.longest, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        found = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            found[number] += value
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy or sampled continuations up to a stop text."""
        answers = []
        for request in requests:
            prompt, settings = request.args
            stop = settings.get("until", [])
            sampling = Sampling(temp=float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0)
            most = int(settings.get("max_gen_toks", 256))
            ids = self.fitting(self.tok_encode(prompt), most)
            written = stream(self.engine, self.tokens, ids, sampling, most, [stop] if isinstance(stop, str) else stop)
            answers.append("".join(written))
            self.progress(len(answers), len(requests))
        return answers


@dataclass(frozen=True)
class TaskScores:
    """What one model made of one task: per metric the score of each item (n,), in the task's order."""

    task: str
    items: dict[str, Array]


def lambada_config(items: list[dict[str, str]]) -> dict[str, Any]:
    """The last word of each text, given all before it."""
    return {
        "task": "lambada",
        "output_type": "loglikelihood",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(items)},
        "test_split": "test",
        "doc_to_text": lambda doc: doc["text"].rpartition(" ")[0],
        "doc_to_target": lambda doc: " " + doc["text"].rpartition(" ")[2],
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }


def blimp_config(items: list[dict[str, str]]) -> dict[str, Any]:
    """Which of two sentences is likelier: the first one is right."""
    return {
        "task": "blimp",
        "output_type": "multiple_choice",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(items)},
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_choice": lambda doc: [doc["good"], doc["bad"]],
        "doc_to_target": lambda doc: 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }


LOCAL_CONFIGS = {"lambada": lambada_config, "blimp": blimp_config}


def run_tasks(
    engine: Engine, tokenizer: Tokenizer, tasks: list[str | dict[str, Any]], limit: int | None, progress: Progress
) -> list[TaskScores]:
    """Score the harness's tasks, by name or configuration. Raises R101 for a name it does not know."""
    # The harness warns of what we ask of it on purpose, such as a data set made in memory.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None  # outside a checkout git would complain on our stderr
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    named = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(named))
    unknown = sorted(set(named) - set(manager.all_tasks)) if named else []
    if unknown:
        raise fail("R101", where="--tasks", why=f"{unknown[0]!r} is no task", fix="`lm_eval ls tasks` lists those of the harness")
    model = EngineLM(engine, tokenizer, progress)
    found = simple_evaluate(model, tasks=tasks, limit=limit, task_manager=manager, bootstrap_iters=0, log_samples=True)
    if model.cut:
        log.warning("%d contexts are longer than the model's %d positions and lost their beginning", model.cut, model.longest)
    return [scores_of(name, samples) for name, samples in found["samples"].items()]


def scores_of(task: str, samples: list[dict[str, Any]]) -> TaskScores:
    """The scores of one task by metric, items in order; a metric that is no number for each item is left out."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    metrics = [name for name in ordered[0]["metrics"] if all(isinstance(s[name], int | float) for s in ordered)]
    return TaskScores(task, {name: np.array([float(s[name]) for s in ordered]) for name in metrics})
