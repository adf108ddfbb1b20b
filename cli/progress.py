"""The live view of a training run: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any, Protocol

from radlads.cli.render import duration, styled

TITLES = {
    "align": "stage 1 alignment",
    "distill": "stage 2 distillation",
    "lm": "stage 3 language model",
    "finetune": "fine-tuning",
}
# Seconds between lines where there is no terminal.
INTERVAL = 10.0


class Phase(Protocol):
    """A stage of a run, or the whole of a fine-tuning: its kind, a key of TITLES, and its length."""

    @property
    def kind(self) -> str: ...

    @property
    def steps(self) -> int: ...


class Progress(Protocol):
    """What is known after an optimiser step; `seconds_left` is for this phase."""

    @property
    def stage(self) -> Phase: ...

    @property
    def step(self) -> int: ...

    @property
    def loss(self) -> float: ...

    @property
    def tokens_per_second(self) -> float: ...

    @property
    def seconds_left(self) -> float: ...


class TrainingScreen:
    """Shows stage, step, loss, speed and time left on stderr; `quiet` shows nothing. Use it in a `with` statement."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.bar: Any = None
        self.task: Any = None
        self.kind = ""
        self.last_line = 0.0

    def __enter__(self) -> "TrainingScreen":
        if not self.quiet and styled(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = [TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn()]
            columns += [TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tok/s"), TimeRemainingColumn()]
            self.bar = Progress(*columns, console=Console(stderr=True))
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """A line beside the bar."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        elif not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def due(self) -> bool:
        """Whether the last line was long enough ago."""
        return time.monotonic() - self.last_line >= INTERVAL

    def reading(self, done: int, total: int | None) -> None:
        """While the data become tokens; small data are done before the first line is due."""
        if self.kind != "reading":
            self.kind, self.last_line = "reading", time.monotonic()
        elif self.due():
            self.last_line = time.monotonic()
            self.say(f"reading the data: {done / total:.0%}" if total else f"reading the data: {done:,} rows")

    def step(self, progress: Progress) -> None:
        """After each optimiser step."""
        stage = progress.stage
        loss, speed = f"{progress.loss:.4f}", f"{progress.tokens_per_second:,.0f}"
        if self.bar is not None:
            if self.kind != stage.kind:
                self.task = self.bar.add_task(TITLES[stage.kind], total=stage.steps, loss=loss, speed=speed)
            self.bar.update(self.task, completed=progress.step, loss=loss, speed=speed)
        elif not self.quiet and (self.kind != stage.kind or progress.step == stage.steps or self.due()):
            self.last_line = time.monotonic()
            left = duration(progress.seconds_left)
            self.say(f"{TITLES[stage.kind]}: step {progress.step}/{stage.steps}, loss {loss}, {speed} tok/s, {left} left")
        self.kind = stage.kind
