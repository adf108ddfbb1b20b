import io
import sys

import pytest

from radlads.cli import screen as screen_module
from radlads.cli.screen import Screen
from radlads.errors import RadladsError


class Terminal(io.StringIO):
    """Text that takes itself for a terminal."""

    def isatty(self) -> bool:
        return True


def test_pipe_gets_answers_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO('  hi \n"""two\nlines"""\n\n'))
    screen = Screen()
    screen.welcome("title", "details")
    assert [screen.read() for _ in range(4)] == ["hi", "two\nlines", "", None]
    screen.piece("answer")
    screen.end()
    screen.say("aside")
    captured = capsys.readouterr()
    assert captured.out == "answer\n" and captured.err == "aside\n"


def test_message_left_open_ends_with_the_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('"""one\ntwo\n'))
    assert Screen().read() == "one\ntwo"


def test_stdin_that_is_no_text_is_one_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
    with pytest.raises(RadladsError, match="R301"):
        Screen().read()


def test_terminal_is_welcomed_and_prompted(monkeypatch):
    out, err, asked = Terminal(), Terminal(), []
    for name, stream in (("stdin", Terminal()), ("stdout", out), ("stderr", err)):
        monkeypatch.setattr(sys, name, stream)
    lines = iter(["hi"])

    def answer(prompt: str) -> str:
        asked.append(prompt)
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(screen_module, "input", answer, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen()
    screen.welcome("title", "details")
    assert screen.read() == "hi" and screen.read() is None
    assert asked == [">>> ", ">>> "] and "title" in out.getvalue() and "/help" in err.getvalue() and "\x1b" not in out.getvalue()
