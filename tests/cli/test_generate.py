import io
import json
import sys

import pytest

from radlads.cli.generate import GenerateOptions, generate
from radlads.tokenizer import Tokenizer


def piped(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))


def write_next(engine, folder, text: str) -> None:
    engine.loud = [*Tokenizer(folder).encode(text), 2]


def test_prompt_becomes_a_user_message(radlads, teacher, engine):
    write_next(engine, teacher, "the sea")
    outcome = radlads("generate", teacher, "-p", "hi", "--system-prompt", "be kind", "--stats")
    assert outcome.status == 0 and outcome.out == "the sea\n"
    assert "tok/s" in outcome.err and "note" not in outcome.err
    said = Tokenizer(teacher).decode(engine.fed[0], skip_special=False)
    assert said == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_template_can_be_ignored(radlads, teacher, engine):
    outcome = radlads("generate", teacher, "-p", "hi", "-m", 1, "--ignore-chat-template")
    assert Tokenizer(teacher).decode(engine.fed[0]) == "hi" and outcome.err == ""


def test_plain_model_continues_and_says_so_once(radlads, plain_teacher, engine):
    outcome = radlads("generate", plain_teacher, "-p", "hi", "-m", 1)
    assert Tokenizer(plain_teacher).decode(engine.fed[0]) == "hi" and outcome.err.count("no chat template") == 1
    refused = radlads("generate", plain_teacher, "-p", "hi", "--system-prompt", "be kind")
    assert refused.status == 2 and "--system-prompt" in refused.err


def test_json_holds_what_scripts_rely_on(radlads, teacher, engine):
    write_next(engine, teacher, "grüße 🙂")
    outcome = radlads("generate", teacher, "-p", "hi", "--json", "--temp", 0)
    found = json.loads(outcome.out)
    assert found["schema"] == 1 and found["text"] == "grüße 🙂" and found["token_ids"] == Tokenizer(teacher).encode("grüße 🙂")
    assert found["generated_tokens"] == len(found["token_ids"]) == len(found["logprobs"]) and found["finish_reason"] == "stop"
    assert found["prompt_tokens"] == len(engine.fed[0]) and found["backend"] == "toy" and found["seed"] == 0
    assert found["peak_memory"] > 1e6 and found["prompt_tps"] > 0 and found["generation_tps"] > 0


def test_seed_is_told_and_repeats_the_text(radlads, teacher, engine):
    def run(*words: object) -> dict:
        return json.loads(radlads("generate", teacher, "-p", "hi", "-m", 9, "--temp", 1, "--json", *words).out)

    drawn = run()
    assert run("--seed", drawn["seed"])["token_ids"] == drawn["token_ids"] != run("--seed", drawn["seed"] + 1)["token_ids"]


@pytest.mark.parametrize("words", [("-p", "-"), ()])
def test_prompt_from_stdin(radlads, teacher, engine, monkeypatch, words):
    piped(monkeypatch, "grüße\n".encode())
    assert radlads("generate", teacher, *words, "-m", 1, "--ignore-chat-template").status == 0
    assert Tokenizer(teacher).decode(engine.fed[0]) == "grüße\n"


def test_stop_strings(radlads, teacher, engine):
    write_next(engine, teacher, "one. two. three")
    assert radlads("generate", teacher, "-p", "hi", "--stop", "three", "--stop", " two").out == "one.\n"


def test_bad_input_is_refused_before_anything_is_written(radlads, teacher, engine, monkeypatch):
    piped(monkeypatch, b"\xff\xfe")
    for words, code in (
        (("-p", "-"), "R301"),
        (("-p", "hi", "--temp", "-1"), "R101"),
        (("-p", "hi", "-m", "0"), "R101"),
        (("-p", "", "--ignore-chat-template"), "R101"),
    ):
        outcome = radlads("generate", teacher, *words)
        assert (outcome.status, outcome.out) == (2, "") and f"error: {code}" in outcome.err
    assert engine.fed == []


def test_no_prompt_on_a_terminal_is_an_error(radlads, teacher, engine, monkeypatch):
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert "there is no prompt" in radlads("generate", teacher).err


def test_function_alone_writes_nothing(teacher, engine, capsys):
    write_next(engine, teacher, "the sea")
    assert generate(GenerateOptions(model=str(teacher), prompt="hi")).text == "the sea"
    assert capsys.readouterr().out == ""
