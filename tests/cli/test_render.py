import json
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pytest

from radlads.cli import render
from radlads.cli.render import Table, note, print_blocks, print_result, size, styled, write_text


class Terminal(StringIO):
    """Text that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass
class Result:
    """A result with values that JSON lacks."""

    path: Path
    value: float
    table: dict[int, tuple[float, ...]]


def test_json_is_one_document_with_its_schema(capsys):
    print_result(Result(Path("a"), float("nan"), {1: (2.0, float("inf"))}), as_json=True)
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "path": "a", "value": None, "table": {"1": [2.0, None]}}


def test_piped_tables_are_aligned_plain_text(capsys):
    titled = Table(("name", "size"), [("a", 1), ("long", 22)], title="T", right=("size",))
    print_blocks([titled, "end", Table(("", ""), [("k", "v")])])
    assert capsys.readouterr().out == "T\nname  size\na        1\nlong    22\nend\nk  v\n"


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert styled(Terminal()) and not styled(StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not styled(Terminal())


def test_terminal_gets_a_rich_table_and_dim_notes(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(render.sys, "stdout", out)
    monkeypatch.setattr(render.sys, "stderr", err)
    print_blocks([Table(("[name]",), [("[red]x",)])])
    note("hello")
    assert "[red]x" in out.getvalue() and "─" in out.getvalue() and "\x1b[2mhello" in err.getvalue()


def test_control_characters_of_a_model_do_not_reach_a_terminal(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(render.sys, "stdout", out)
    write_text("a\x1b[2J\n\té")
    assert out.getvalue() == "a\\x1b[2J\n\té"
    pipe = StringIO()
    monkeypatch.setattr(render.sys, "stdout", pipe)
    write_text("a\x1b")
    assert pipe.getvalue() == "a\x1b"


@pytest.mark.parametrize("count, text", [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 KB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")])
def test_sizes(count, text):
    assert size(count) == text


def test_without_a_terminal_progress_is_a_line_now_and_then(capsys, monkeypatch):
    with render.progress("reading") as report:
        report(1, 4)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(render, "LINE_SECONDS", 0.0)
        report(2, 4)
    assert capsys.readouterr().err == "reading: 50%, 0 s left\n"
