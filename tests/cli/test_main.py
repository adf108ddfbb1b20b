import json
import os
import subprocess
import sys

import pytest

from radlads.cli import main as main_module
from radlads.cli.verbs import VERBS
from radlads.errors import CODES, fail

HEAVY = ("torch", "mlx", "mlx_lm", "transformers", "numpy", "pydantic", "tokenizers", "jinja2", "yaml")


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-m", "radlads", *arguments], capture_output=True, text=True, env=env, timeout=60)


def test_help_names_every_verb_in_its_panel_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['radlads', '--help']\n"
        "from radlads.cli.main import main; status = main()\n"
        f"sys.stderr.write(','.join(m for m in {HEAVY} if m in sys.modules)); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    for verb in VERBS:
        assert verb.panel in done.stdout and verb.name.split()[0] in done.stdout
    assert "\x1b[" not in done.stdout


def test_help_loads_only_what_draws_it():
    """What makes help quick, in a form that does not depend on the machine: the packages that it imports."""
    code = """
import sys
from radlads.cli.main import main
try:
    main(["--help"])
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    drawing = {"typer", "click", "rich", "pygments", "markdown_it", "mdurl", "shellingham", "annotated_doc", "attr", "attrs"}
    # Names of single modules that installed packages put beside themselves begin with an underscore.
    loaded = {name for name in done.stderr.split() if not name.startswith("_")} - drawing
    assert "radlads" in loaded and loaded <= {"radlads", "sitecustomize", "usercustomize", "typing_extensions", "colorama"}


def test_bare_command_and_version(radlads):
    assert radlads().out == radlads("--help").out
    assert radlads("--version").out.startswith("radlads ")


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_help_page_shows_its_examples(radlads, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    outcome = radlads(*verb.name.split(), "--help")
    assert outcome.status == 0 and all(example in outcome.out for example in verb.examples)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb.aliases], ids=lambda verb: verb.name)
def test_hidden_names_lead_to_the_same_page(radlads, verb):
    for alias in verb.aliases:
        page = radlads(alias, "--help").out
        assert page.replace(f"radlads {alias} ", f"radlads {verb.name} ").split() == radlads(verb.name, "--help").out.split()
        assert f" {alias} " not in radlads("--help").out


@pytest.mark.parametrize(
    "words, said",
    [
        (["genrate"], "Did you mean 'generate'?"),
        (["generate", "m", "--max-token", "3"], "no such option --max-token. Did you mean --max-tokens?"),
        (["recipes", "shw"], "Did you mean 'show'?"),
        (["generate", "m", "--temp", "warm"], "'--temp'"),
        (["generate", "m", "--backend", "jax"], "'torch'"),
        (["generate", "m", "n"], "n"),
        (["prepare", "a.txt"], "--output-dir"),
        (["--frob"], "--frob"),
    ],
)
def test_bad_usage_is_one_line_with_the_nearest_right_one(radlads, words, said):
    outcome = radlads(*words)
    assert outcome.status == 2 and outcome.out == ""
    assert outcome.err.startswith("error: R101 ") and outcome.err.count("\n") == 1 and said in outcome.err


def test_spellings_of_other_tools_are_understood(radlads, teacher, engine):
    outcome = radlads(
        "generate", "--model", teacher, "-p", "hi", "--max_new_tokens", "2", "--temperature", "0", "--top_p", "0.5", "--json"
    )
    assert json.loads(outcome.out)["generated_tokens"] == 2


def raising(error: BaseException):
    def build():
        def app(**_):
            raise error

        return app

    return build


@pytest.mark.parametrize(
    "error, status, said",
    [
        (fail("R203", where="w", why="y", fix="f"), 2, "error: R203"),
        (fail("R402", where="w", why="y", fix="f"), 1, "error: R402"),
        (fail("R501", where="w", why="y", fix="f"), 3, "error: R501"),
        (MemoryError(), 1, "error: R403"),
        (RuntimeError("CUDA out of memory. Tried\nmore"), 1, "error: R403"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: R201"),
        (OSError(28, "No space left on device", "/x"), 1, "error: R402"),
        (ZeroDivisionError("oops"), 1, "RADLADS_DEBUG=1"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_error_is_one_line_and_a_status(radlads, monkeypatch, error, status, said):
    monkeypatch.delenv("RADLADS_DEBUG", raising=False)
    monkeypatch.setattr(main_module, "build_app", raising(error))
    outcome = radlads()
    assert outcome.status == status and said in outcome.err and outcome.err.count("\n") == bool(said)


def test_debug_shows_the_traceback(radlads, monkeypatch):
    monkeypatch.setenv("RADLADS_DEBUG", "1")
    monkeypatch.setattr(main_module, "build_app", raising(ZeroDivisionError("oops")))
    assert "Traceback" in radlads().err


def test_every_code_has_an_exit_status():
    assert all(fail(code, where="w", why="y", fix="f").exit_status in (1, 2, 3) for code in CODES)


def test_reader_that_leaves_early_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "radlads", "recipes", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=60) == 0


def test_module_runs_as_the_command_does(tmp_path):
    done = command("inspect", str(tmp_path / "nowhere"))
    assert done.returncode == 2 and done.stderr.startswith("error: R201") and done.stderr.count("\n") == 1


def test_completion_offers_verbs():
    done = command(_RADLADS_COMPLETE="complete_bash", COMP_WORDS="radlads gen", COMP_CWORD="1")
    assert "generate" in done.stdout
