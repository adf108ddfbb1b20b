"""A tiny teacher, an engine without a model, and a way to run one command line."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from radlads.cli.main import main
from tests.models import tiny_teacher
from tests.toy import ToyEngine


class Outcome(NamedTuple):
    """Exit status, stdout and stderr of a command."""

    status: int
    out: str
    err: str


@pytest.fixture
def radlads(capsys) -> Callable[..., Outcome]:
    """Run `radlads ARGUMENTS` in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A tiny random teacher with a chat template."""
    return tiny_teacher(tmp_path_factory.mktemp("cli") / "teacher")


@pytest.fixture(scope="session")
def plain_teacher(tmp_path_factory) -> Path:
    """A tiny random teacher without a chat template."""
    path = tiny_teacher(tmp_path_factory.mktemp("cli") / "plain")
    (path / "chat_template.jinja").unlink()
    return path


@pytest.fixture
def engine(monkeypatch) -> ToyEngine:
    """The engine that every verb opens in this test."""
    made = ToyEngine()
    monkeypatch.setattr("radlads.backends.open_engine", lambda folder, backend="auto", dtype=None: made)
    return made
