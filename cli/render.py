"""Results as people read them (tables, notes) or as scripts do (`--json`); colour only on a terminal."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from radlads.files import plain

SCHEMA = 1  # version of every JSON document printed
LINE_SECONDS = 10.0  # between lines of progress where there is no terminal


@dataclass
class Table:
    """Rows under column names; numbers are formatted by whoever fills them in."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    right: Sequence[str] = field(default=())  # columns aligned to the right


def print_result(result: Any, *, as_json: bool) -> None:
    """Print a verb's result dataclass: one JSON document, or the blocks of its `blocks()` method."""
    if as_json:
        print(json.dumps({"schema": SCHEMA, **plain(asdict(result))}, ensure_ascii=False))
        return
    blocks = result.blocks() if hasattr(result, "blocks") else _pairs(result)
    print_blocks(blocks)


def print_blocks(blocks: Iterable[Table | str]) -> None:
    """Print texts and tables, one below the other."""
    for block in blocks:
        if isinstance(block, str):
            print(block)
        elif styled(sys.stdout):
            _print_rich(block)
        else:
            print("\n".join(_aligned(block)))


def styled(stream: Any) -> bool:
    """Whether colour codes may be written to `stream`."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def note(text: str) -> None:
    """Say something beside the result, on stderr."""
    print(f"\x1b[2m{text}\x1b[0m" if styled(sys.stderr) else text, file=sys.stderr, flush=True)


def write_text(text: str) -> None:
    """Write a piece of a model's text; on a terminal its control characters are shown, not obeyed."""
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c in "\n\t " else c.encode("unicode_escape").decode() for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def forget_output() -> int:
    """Exit status 0 when whoever read our output has enough of it; the interpreter must not try to flush the rest."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """A function that draws a bar on stderr from (done, total or None); without a terminal a line now and then."""
    if not styled(sys.stderr):
        yield progress_lines(label)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def progress_lines(label: str) -> Callable[[int, int | None], None]:
    """The same in lines: how much is done, and the time left, every ten seconds."""
    began = last = time.monotonic()

    def report(done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS or not done:
            return
        last = now
        if total:
            note(f"{label}: {done / total:.0%}, {duration((now - began) * (total - done) / done)} left")
        else:
            note(f"{label}: {done:,}, {duration(now - began)} so far")

    return report


def duration(seconds: float) -> str:
    """A time for people: 45 s, 3 min 20 s, 5 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """A number of bytes for people: 1.2 GB."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def counted(number: int, thing: str) -> str:
    """How many of a thing there are: 1 message, 2 messages."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _pairs(result: Any) -> Iterable[Table | str]:
    values = asdict(result)
    width = max((len(name) for name in values), default=0)
    return [f"{name.replace('_', ' '):<{width}}  {value}" for name, value in values.items()]


def _aligned(table: Table) -> Iterable[str]:
    if table.title:
        yield table.title
    head = [[str(name) for name in table.columns]] if any(table.columns) else []
    cells = [*head, *([str(value) for value in row] for row in table.rows)]
    widths = [max((len(row[i]) for row in cells), default=0) for i in range(len(table.columns))]
    for row in cells:
        padded = [
            cell.rjust(width) if name in table.right else cell.ljust(width)
            for cell, width, name in zip(row, widths, table.columns, strict=True)
        ]
        yield "  ".join(padded).rstrip()


def _print_rich(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    head = any(table.columns)
    drawn = RichTable(title=table.title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=head)
    for name in table.columns:
        drawn.add_column(name, justify="right" if name in table.right else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(str(value)) for value in row))
    Console().print(drawn)
