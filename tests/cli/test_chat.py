import io
import os
import signal
import subprocess
import sys
import time

import pytest

from radlads.cli.chat import HELP, Chat
from radlads.cli.screen import Screen
from radlads.sampling import Sampling
from radlads.session import Session
from radlads.tokenizer import Tokenizer


@pytest.fixture
def talk(radlads, teacher, engine, monkeypatch):
    """Run a chat over a pipe; the engine writes `answers` one after the other."""

    def run(lines: list[str], answers: list[str], *words: object, model=teacher):
        encode = Tokenizer(model).encode
        engine.loud = [token for text in answers for token in [*encode(text), 2]]
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return radlads("chat", model, *words)

    return run


def test_turns_follow_each_other(talk, engine, teacher):
    outcome = talk(["hi", "", "and then?"], ["one", "two"], "--system-prompt", "be kind")
    assert outcome.status == 0 and outcome.out == "one\ntwo\n" and outcome.err == ""
    fed = Tokenizer(teacher).decode([t for tokens in engine.fed for t in tokens], skip_special=False)
    assert fed.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi") and "user\nand then?" in fed


def test_plain_model_says_once_that_it_continues(talk, plain_teacher):
    outcome = talk(["Once", "The"], [" upon", " end"], model=plain_teacher)
    assert outcome.out == " upon\n end\n" and outcome.err.count("no chat template") == 1


@pytest.mark.parametrize("word", ["/exit", "/bye", "q"])
def test_leaving(talk, word):
    assert talk(["hi", word, "never"], ["one", "two"]).out == "one\n"


@pytest.mark.parametrize("word", ["/help", "h", "/?"])
def test_help_lists_every_command(talk, word):
    said = talk([word], []).err
    assert said == HELP + "\n"
    for name in "/help /reset /system /set /undo /retry /fork /save /load /tokens /stats /exit /clear /bye".split():
        assert name in said


def test_undo_retry_reset_and_tokens(talk):
    outcome = talk(["hi", "/retry", "/undo", "/undo", "/tokens", "r", "/system be brief", "yes"], ["one", "two", "three"])
    # Retrying reads nothing again, so the first letter comes from the logits that were kept.
    assert outcome.out == "one\notwo\nthree\n"
    lines = outcome.err.splitlines()
    assert lines[0] == "took back: hi" and "nothing was said yet" in lines[1]
    assert lines[2].startswith("tokens 0, messages 0") and lines[3:] == ["forgotten", "system prompt set"]


def test_fork_goes_back_to_a_kept_point(talk):
    outcome = talk(["hi", "/fork", "more", "/tokens", "/fork 1", "/tokens", "/fork 2"], ["one", "two"])
    notes = outcome.err.splitlines()
    assert "messages 2" in notes[1] and notes[2] == "back at point 1, messages 1" and "messages 1" in notes[3]
    assert "no such point" in notes[4] and outcome.status == 0


def test_set_shows_and_changes_settings(talk):
    words = ["/set", "/set temp 0", "/set max_tokens 2", "/set tmp 1", "/set temp warm", "/set temp 1000", "/set max-tokens 0"]
    outcome = talk([*words, "hi"], ["one two three"])
    lines = outcome.err.splitlines()
    assert "temp 0.7" in lines[0] and lines[1] == "temp 0.0" and lines[2] == "max-tokens 2"
    assert "The nearest is temp" in lines[3] and all("R101" in line for line in lines[3:7])
    assert 0 < len(outcome.out) < len("one two three")


def test_unknown_command_names_the_nearest_and_goes_on(talk):
    outcome = talk(["/retri", "hi"], ["one"])
    assert "The nearest is /retry" in outcome.err and outcome.out == "one\n"


def test_stats_follow_each_answer_once_asked(talk):
    assert talk(["hi"], ["one"], "--stats").err.count("tok/s") == 2
    assert talk(["hi", "/stats", "hi"], ["one", "two"]).err.count("tok/s") == 4


class Interrupting(Screen):
    """A screen on which Ctrl-C is pressed where the script says so."""

    def __init__(self, script: list[str | None]) -> None:
        super().__init__()
        self.script, self.during = script, False

    def read(self) -> str | None:
        line = self.script.pop(0)
        if line == "^C":
            raise KeyboardInterrupt
        self.during = line == "long"
        return line

    def piece(self, text: str) -> None:
        super().piece(text)
        if self.during:
            raise KeyboardInterrupt


def test_ctrl_c_stops_the_answer_and_twice_in_a_row_leaves(teacher, engine, capsys):
    session = Session(engine, Tokenizer(teacher), Sampling(temp=1, seed=1), max_tokens=40)
    assert Chat(session, Interrupting(["long", "hi", "^C", "hi", None])).run().turns == 2
    assert len(session.turns) == 3 and len(session.turns[0].answer) < len(session.turns[1].answer)
    with pytest.raises(KeyboardInterrupt):
        Chat(session, Interrupting(["long", "^C", "never"])).run()
    assert capsys.readouterr().err.count("Ctrl-C again") == 3


def test_real_ctrl_c_twice_exits_with_130(teacher):
    code = "import sys; from radlads.cli.main import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "chat", str(teacher)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Where this runs as a background job, SIGINT is ignored, and a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    process.stdin.write("/tokens\n")
    process.stdin.flush()
    assert process.stderr.readline().startswith("tokens 0")  # the chat is up
    process.send_signal(signal.SIGINT)
    assert "Ctrl-C again" in process.stderr.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130 and "Traceback" not in process.stderr.read()


def test_a_conversation_is_taken_up_from_its_file(talk, engine, teacher, tmp_path):
    file = tmp_path / "talk.state"
    first = talk(["hi", f"/save {file}"], ["one"], "--system-prompt", "be kind")
    assert "kept 1 message in" in first.err
    engine.fed.clear()
    second = talk([f"/load {file}", "and then?", "/undo", "/undo", "/tokens"], ["two"])
    assert second.out == "two\n" and "taken up: 1 message, " in second.err
    assert "took back: and then?" in second.err and "took back: hi" in second.err
    # Nothing of the first exchange is read again.
    assert Tokenizer(teacher).decode(engine.fed[0], skip_special=False).startswith("<|im_end|>\n<|im_start|>user\nand then?")
    engine.fed.clear()
    assert talk(["more"], ["three"], "--load-state", file).out == "three\n"


def test_a_file_that_is_no_conversation_changes_nothing(talk, radlads, teacher, tmp_path):
    radlads("cache", teacher, "-p", "hi", "-o", tmp_path / "bare.state")
    (tmp_path / "text").write_text("no state")
    lines = ["hi", f"/load {tmp_path / 'bare.state'}", f"/load {tmp_path / 'text'}", "/load", "/save", "/tokens"]
    said = talk(lines, ["one"]).err
    assert "it is a bare state" in said and "it is no state file" in said
    assert said.count("it needs a file") == 2 and "messages 1" in said
