from dataclasses import MISSING, dataclass
from types import SimpleNamespace
from typing import Literal

import pytest
import typer

from radlads.cli import bind as bind_module
from radlads.cli.bind import bind, epilog
from radlads.cli.options import arg, opt
from radlads.cli.verbs import Verb
from radlads.errors import RadladsError


@dataclass(kw_only=True)
class Options:
    """One of each kind."""

    model: str = arg("The model.", metavar="MODEL", flag="--model")
    files: list[str] = arg("More.", metavar="FILE", default=[])
    must: str = opt(MISSING, "Needed.")
    count: int = opt(3, "How many.", "--count", "-c")
    kind: Literal["a", "b"] | None = opt(None, "Which.", panel="Other")
    fast: bool = opt(False, "Quick.", "--fast")
    word: list[str] = opt([], "Words.")
    json: bool = opt(False, "JSON.", "--json")


@dataclass
class Result:
    """What the toy verb returns."""

    value: int
    exit_status: int = 0


VERB = Verb("toy", "Panel", "toy_module", "Options", "work", "A toy.", ("radlads toy m --must x",))


@pytest.fixture
def run(monkeypatch):
    seen = {}

    def work(options, write=None):
        seen["options"], seen["write"] = options, write
        return Result(options.count, exit_status=3 if options.fast else 0)

    monkeypatch.setattr(bind_module, "import_module", lambda name: SimpleNamespace(Options=Options, work=work))

    def call(*words: str, verb: Verb = VERB):
        app = typer.Typer(rich_markup_mode="rich", epilog=epilog(["x [y]"]))
        app.command("toy")(bind(verb))
        return app(args=list(words), standalone_mode=False), seen

    return call


def test_flags_come_from_the_dataclass(run):
    status, seen = run("m", "f", "g", "--must", "x", "-c", "5", "--kind", "b", "--word", "p", "--word", "q")
    assert status == 0
    assert seen["options"] == Options(model="m", files=["f", "g"], must="x", count=5, kind="b", word=["p", "q"])


def test_defaults_are_those_of_the_dataclass(run):
    assert run("m", "--must", "x")[1]["options"] == Options(model="m", must="x")


def test_argument_has_a_second_spelling_but_is_given_once(run):
    assert run("--model", "m", "--must", "x")[1]["options"].model == "m"
    for words, said in ((("m", "--model", "n", "--must", "x"), "twice"), (("--must", "x"), "MODEL is missing")):
        with pytest.raises(RadladsError, match=f"R101.*{said}"):
            run(*words)


def test_result_is_printed_and_carries_the_exit_status(run, capsys):
    assert run("m", "--must", "x", "--fast")[0] == 3
    assert "value" in capsys.readouterr().out
    run("m", "--must", "x", "--json")
    assert capsys.readouterr().out == '{"schema": 1, "value": 3, "exit_status": 0}\n'


def test_verb_that_streams_gets_a_writer_unless_json_is_asked(run, capsys):
    verb = Verb("toy", "Panel", "toy_module", "Options", "work", "A toy.", ("radlads toy",), streams=True)
    assert run("m", "--must", "x", verb=verb)[1]["write"] is not None and capsys.readouterr().out == ""
    assert run("m", "--must", "x", "--json", verb=verb)[1]["write"] is None and '"value": 3' in capsys.readouterr().out


def test_help_page_shows_kinds_panels_and_examples_as_written(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    run("--help")
    page = capsys.readouterr().out
    assert "Other" in page and "a|b" in page and "[default: 3]" in page and "--no-fast" not in page
    assert "--model" not in page and r"\[" not in epilog(["plain"])
