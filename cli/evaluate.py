"""`radlads eval`: what a model knows, and what a student kept of its teacher, with intervals over the items."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radlads.cli.options import ModelOptions, opt
from radlads.cli.render import Table, progress_lines
from radlads.errors import fail

if TYPE_CHECKING:
    from radlads.cli.options import OpenModel
    from radlads.evals.statistics import Array


@dataclass(kw_only=True)
class EvalOptions(ModelOptions):
    """What to measure, on which files, beside whom."""

    tasks: str = opt(
        "lambada,blimp,bits,recall", "Comma-separated, ours or the harness's; with --prompts may be empty.", metavar="NAMES"
    )
    data: list[str] = opt([], "File or folder with lambada*.jsonl, blimp*.jsonl; may be given several times.", metavar="PATH")
    text: str | None = opt(None, "Held-out text for bits and kl.", metavar="FILE")
    against: str | None = opt(None, "Folder of the teacher to compare with.", metavar="DIR")
    limit: int | None = opt(None, "Only the first items of each task.", metavar="N")
    lengths: str = opt("256,512,1024,2048", "Tokens of the recall prompts.", metavar="NUMBERS")
    recall_items: int = opt(20, "Recall items at each length.", metavar="N")
    window: int = opt(512, "Tokens of context for bits and kl.", metavar="N")
    draws: int = opt(10_000, "Bootstrap draws of the intervals.", metavar="N")
    prompts: str | None = opt(None, "File with one prompt per line, answered by both models side by side.", metavar="FILE")
    max_tokens: int = opt(128, "Tokens of one answer at most.", "--max-tokens", "-m")
    min_relative: float | None = opt(None, "Exit with 3 when a task keeps a smaller share of the teacher.", metavar="SHARE")
    seed: int = opt(0, "Seed of the recall items and of the bootstrap.")
    output_dir: str | None = opt(None, "Also write eval.json there.", metavar="DIR")
    json: bool = opt(False, "Print one JSON document.", "--json")

    @property
    def names(self) -> list[str]:
        """The tasks, in the order asked for; none at all leaves the prompts."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]


@dataclass
class Figure:
    """One figure of one task; intervals are 95 % over items, `relative` is the share of the teacher's knowledge kept."""

    task: str
    metric: str
    items: int
    value: float
    low: float
    high: float
    teacher: float | None = None
    relative: float | None = None
    relative_low: float | None = None
    relative_high: float | None = None


@dataclass
class Answers:
    """What both models answered to one prompt."""

    prompt: str
    model: str
    against: str | None = None


@dataclass
class EvalResult:
    """All figures, by task."""

    model: str
    against: str | None
    backend: str
    device: str
    seed: int
    draws: int
    figures: list[Figure] = field(default_factory=list)
    answers: list[Answers] = field(default_factory=list)
    kl_by_position: list[float] = field(default_factory=list)
    agreement_by_position: list[float] = field(default_factory=list)
    exit_status: int = 0

    def blocks(self) -> Iterator[Table | str]:
        """A table with the interval beside each figure."""
        columns = ["task", "metric", "items", "value", "95 % interval"]
        if self.against:
            columns += ["teacher", "relative", "95 % interval"]
        rows = []
        for f in self.figures:
            row = [f.task, f.metric, f"{f.items:,}", f"{f.value:.4f}", f"{f.low:.4f} – {f.high:.4f}"]
            if self.against:
                kept = "" if f.relative is None else f"{f.relative:.4f}"
                span = "" if f.relative_low is None else f"{f.relative_low:.4f} – {f.relative_high:.4f}"
                row += ["" if f.teacher is None else f"{f.teacher:.4f}", kept, span]
            rows.append(row)
        if rows:
            yield Table(columns, rows, right=tuple(columns[2:]))
        if self.exit_status:
            yield "NOT MET: a task keeps less of the teacher than --min-relative asks for."
        for shown in self.answers:
            yield f"\n> {shown.prompt}\nmodel: {shown.model}"
            if shown.against is not None:
                yield f"teacher: {shown.against}"


@dataclass(frozen=True)
class Measured:
    """The scores of each item (n,) of one metric, and how their means make the figure and the comparison."""

    task: str
    metric: str
    items: "tuple[Array, ...]"
    statistic: "Callable[..., Array]"
    chance: float | None = None


def evaluate(options: EvalOptions) -> EvalResult:
    """Measure a model and, with `against`, its teacher on the same items."""
    from radlads.evals.statistics import bootstrap, relative_to

    check(options)
    # The harness's bars would run into our lines; the variable is read when tqdm is imported, and torch imports it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    student = options.open()
    teacher = None
    if options.against is not None:
        teacher = ModelOptions(model=options.against, backend=options.backend, dtype=options.dtype).open()
    result = EvalResult(options.model, options.against, student.engine.name, student.engine.device, options.seed, options.draws)
    found = measure(student, options, "model")
    beside = measure(teacher, options, "teacher") if teacher is not None else [None] * len(found)
    for mine, theirs in zip(found, beside, strict=True):
        own = bootstrap(mine.statistic, *mine.items, draws=options.draws, seed=options.seed)
        figure = Figure(mine.task, mine.metric, len(mine.items[0]), own.value, own.low, own.high)
        if theirs is not None:
            figure.teacher = bootstrap(theirs.statistic, *theirs.items, draws=1).value
            compare = quotient(mine.statistic, len(mine.items)) if mine.chance is None else relative_to(mine.chance)
            # Beside a teacher at chance there is nothing to keep.
            if mine.chance is None or figure.teacher > mine.chance:
                share = bootstrap(compare, *mine.items, *theirs.items, draws=options.draws, seed=options.seed)
                figure.relative, figure.relative_low, figure.relative_high = share.value, share.low, share.high
        result.figures.append(figure)
    if "kl" in options.names:
        assert teacher is not None
        add_distance(result, student, teacher, options)
    if options.prompts is not None:
        result.answers = side_by_side(student, teacher, options)
    if options.output_dir is not None:
        save(result, Path(options.output_dir))
    kept = [f.relative for f in result.figures if f.relative is not None and f.metric == "accuracy"]
    if options.min_relative is not None and any(share < options.min_relative for share in kept):
        result.exit_status = 3
    return result


def check(options: EvalOptions) -> None:
    """R101 for what cannot work, before anything is loaded."""
    names = options.names
    if not names and options.prompts is None:
        raise fail("R101", where="--tasks", why="there is nothing to measure", fix="Name tasks, or give `--prompts FILE`")
    if ("bits" in names or "kl" in names) and options.text is None:
        why, fix = "bits and kl need a held-out text", "Give one with `--text FILE`, or leave them out of `--tasks`"
        raise fail("R101", where="--text", why=why, fix=fix)
    for flag, file in (("--text", options.text), ("--prompts", options.prompts)):
        if file is not None and not Path(file).is_file():
            raise fail("R201", where=f"{flag} {file}", why="there is no such file", fix="Check the path")
    if "kl" in names and options.against is None:
        raise fail("R101", where="--tasks kl", why="there is no teacher to compare with", fix="Give one with `--against DIR`")
    for name, least in (("limit", 1), ("recall_items", 1), ("window", 2), ("draws", 100), ("max_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise fail("R101", where=flag, why=f"{value} is below {least}", fix=f"Give at least {least}")


def measure(model: "OpenModel", options: EvalOptions, title: str) -> list[Measured]:
    """All tasks but kl for one model, in the order asked for."""
    import numpy as np

    from radlads.evals.recall import TASKS, recall_items, recalled
    from radlads.evals.statistics import mean

    names, shown = options.names, progress_lines(title)
    found = harness_tasks(model, options, [name for name in names if name not in ("bits", "recall", "kl")], title)
    if "bits" in names:
        found.append(bits(model, options, title))
    rounds = [(length, task) for length in lengths(options) for task in TASKS] if "recall" in names else []
    for done, (length, task) in enumerate(rounds, 1):
        items = recall_items(task, model.tokenizer, length, options.recall_items, options.seed)
        right = np.array(recalled(model.engine, items), np.float64)
        found.append(Measured(f"{task} {length}", "accuracy", (right,), mean, 0.0))
        shown(done, len(rounds))
    return found


def lengths(options: EvalOptions) -> list[int]:
    """The lengths of the recall prompts. R101 for anything but positive integers."""
    parts = options.lengths.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise fail("R101", where="--lengths", why=f"{options.lengths!r} is no list of lengths", fix="Write for example 256,1024")
    return [int(part) for part in parts]


def harness_tasks(model: "OpenModel", options: EvalOptions, names: list[str], title: str) -> list[Measured]:
    """Tasks that lm-evaluation-harness runs: LAMBADA and BLiMP from files, others by their names there."""
    from radlads.evals.local import LOCAL_TASKS, find_file, read_items
    from radlads.evals.statistics import mean, perplexity

    if not names:
        return []
    local = [LOCAL_TASKS[name] for name in names if name in LOCAL_TASKS]
    items = {task.name: read_items(task, find_file(task, options.data)) for task in local}
    try:
        from radlads.backends.harness import LOCAL_CONFIGS, run_tasks
    except ImportError:
        why = "lm-evaluation-harness is not installed"
        raise fail("R104", where="radlads eval", why=why, fix="Run `pip install 'radlads[eval]'`") from None
    asked = [LOCAL_CONFIGS[name](items[name]) if name in items else name for name in names]
    found = []
    for scores in run_tasks(model.engine, model.tokenizer, asked, options.limit, progress_lines(title)):
        chance = LOCAL_TASKS[scores.task].chance if scores.task in LOCAL_TASKS else None
        for metric, values in scores.items.items():
            if metric == "perplexity":  # the harness keeps the log-likelihood of each item
                found.append(Measured(scores.task, "perplexity", (-values,), perplexity))
            elif metric in ("acc", "acc_norm"):
                found.append(Measured(scores.task, "accuracy" if metric == "acc" else metric, (values,), mean, chance))
    return found


def bits(model: "OpenModel", options: EvalOptions, title: str) -> Measured:
    """Bits per byte on the held-out text."""
    import numpy as np

    from radlads.evals.local import windows
    from radlads.evals.statistics import ratio

    assert options.text is not None
    shown = progress_lines(title)
    parts = list(windows(Path(options.text), model.tokenizer, options.window))[: options.limit]
    if not parts:
        raise fail("R302", where=options.text, why="it holds no text", fix="Give another file with `--text`")
    nats: list[float] = []
    for first in range(0, len(parts), 32):
        scored = model.engine.score([part.ids for part in parts[first : first + 32]])
        nats += [-float(found.logprobs.sum(dtype=np.float64)) for found in scored]
        shown(len(nats), len(parts))
    sizes = np.array([part.size for part in parts])
    return Measured("bits", "bits per byte", (np.array(nats) / np.log(2), sizes), ratio)


def quotient(statistic: "Callable[..., Array]", count: int) -> "Callable[..., Array]":
    """statistic(model) / statistic(teacher), of `count` kinds of means each."""

    def share(*means: "Array") -> "Array":
        return statistic(*means[:count]) / statistic(*means[count:])

    return share


def add_distance(result: EvalResult, student: "OpenModel", teacher: "OpenModel", options: EvalOptions) -> None:
    """KL(teacher || model) and next-token agreement on whole windows of the held-out text, over all of it and by position."""
    if student.engine.name != "torch":
        raise fail("R405", where="--tasks kl", why="it is measured on the torch backend", fix="Add `--backend torch`")
    import torch

    from radlads.backends.torch.evaluate import by_position, compare
    from radlads.evals.local import windows
    from radlads.evals.statistics import bootstrap, mean

    assert options.text is not None
    parts = windows(Path(options.text), teacher.tokenizer, options.window + 1)
    full = [part.ids for part in parts if len(part.ids) == options.window + 1][: options.limit]
    if not full:
        raise fail("R302", where=options.text, why=f"it is shorter than {options.window} tokens", fix="Lower `--window`")
    engines: list[Any] = [student.engine, teacher.engine]
    found = compare(engines[0].model, torch.tensor(full), engines[1].model)
    assert found.kl is not None and found.agrees is not None
    for metric, values in (("KL to teacher", found.kl), ("agreement", found.agrees)):
        own = bootstrap(mean, values.double().mean(1).numpy(), draws=options.draws, seed=options.seed)
        result.figures.append(Figure("kl", metric, len(full), own.value, own.low, own.high))
    result.kl_by_position = by_position(found.kl, found.counted)
    result.agreement_by_position = by_position(found.agrees, found.counted)


def side_by_side(student: "OpenModel", teacher: "OpenModel | None", options: EvalOptions) -> list[Answers]:
    """Greedy answers of both models to each prompt, through the chat template where there is one."""
    from radlads.sampling import Sampling
    from radlads.session import stream

    def answer(model: "OpenModel", prompt: str) -> str:
        tokenizer = model.tokenizer
        text = tokenizer.chat([{"role": "user", "content": prompt}]) if tokenizer.has_chat_template else prompt
        ids = tokenizer.encode(text, add_special=not tokenizer.has_chat_template)
        return "".join(stream(model.engine, tokenizer, ids, Sampling(), options.max_tokens))

    assert options.prompts is not None
    try:
        lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise fail("R301", where=options.prompts, why=str(error), fix="Give a UTF-8 file with one prompt per line") from None
    prompts = [line for line in lines if line.strip()]
    return [Answers(p, answer(student, p), None if teacher is None else answer(teacher, p)) for p in prompts]


def save(result: EvalResult, folder: Path) -> None:
    """eval.json: what --json prints."""
    import json
    from dataclasses import asdict

    from radlads.cli.render import SCHEMA
    from radlads.files import write_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise fail("R401", where=folder, why=str(error.strerror), fix="Give a folder that can be written") from None
    write_file(folder / "eval.json", json.dumps({"schema": SCHEMA, **asdict(result)}, indent=2) + "\n")
