"""`radlads eval` as a user meets it."""

import json
from pathlib import Path

import pytest

from tests.models import tiny_teacher

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("eval")
    tiny_teacher(path / "teacher")
    tiny_teacher(path / "other", seed=1)
    (path / "lambada.jsonl").write_text('{"text": "the cat sat on the mat"}\n{"text": "a house by the sea"}\n')
    (path / "blimp.jsonl").write_text('{"good": "a cat sits", "bad": "a cat sit"}\n')
    (path / "text.txt").write_text("Once upon a time there was a cat. " * 20)
    (path / "prompts.txt").write_text("Hello there\n\n")
    return path


def test_a_model_beside_its_teacher(radlads, place: Path) -> None:
    done = radlads(
        "eval", place / "other", "--backend", "torch", "--against", place / "teacher",
        "--data", place, "--text", place / "text.txt", "--tasks", "lambada,blimp,bits,recall,kl",
        "--lengths", "200", "--recall-items", 2, "--window", 64, "--draws", 200,
        "--prompts", place / "prompts.txt", "-m", 4, "--output-dir", place / "out", "--json",
    )  # fmt: skip
    assert done.status == 0, done.err
    record = json.loads(done.out)
    assert record == json.loads((place / "out" / "eval.json").read_text()) and record["schema"] == 1
    figures = {(f["task"], f["metric"]): f for f in record["figures"]}
    assert {task for task, _ in figures} == {"lambada", "blimp", "bits", "passkey 200", "key-value 200", "kl"}
    bits = figures["bits", "bits per byte"]
    assert bits["low"] <= bits["value"] <= bits["high"] and bits["relative"] == pytest.approx(bits["value"] / bits["teacher"])
    assert figures["kl", "KL to teacher"]["low"] > 0
    for metric, by_position in (("KL to teacher", "kl_by_position"), ("agreement", "agreement_by_position")):
        found, means = figures["kl", metric], record[by_position]
        assert 0 <= found["low"] <= found["value"] <= found["high"] and len(means) == 64
        assert found["value"] == pytest.approx(sum(means) / 64, rel=1e-6)
    assert record["answers"][0]["prompt"] == "Hello there" and record["answers"][0]["against"]


def test_a_model_beside_itself_keeps_everything(radlads, place: Path) -> None:
    arguments = ["eval", place / "teacher", "--backend", "torch", "--against", place / "teacher", "--text", place / "text.txt"]
    done = radlads(*arguments, "--tasks", "bits", "--window", 64, "--draws", 100)
    assert done.status == 0 and "1.0000  1.0000 – 1.0000" in done.out


def test_prompts_alone(radlads, place: Path) -> None:
    prompts = ["--tasks", "", "--prompts", place / "prompts.txt", "-m", 2]
    done = radlads("eval", place / "other", "--backend", "torch", *prompts)
    assert done.status == 0 and done.out.strip().startswith("> Hello there"), done.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--tasks", "bits"], "--text"),
        (["--tasks", "kl", "--text", __file__], "--against"),
        (["--tasks", "bits", "--text", "nowhere.txt"], "no such file"),
        (["--tasks", "recall", "--lengths", "12,x"], "no list of lengths"),
        (["--tasks", "lambada"], "no files named lambada"),
        (["--tasks", ""], "nothing to measure"),
        (["--tasks", "recall", "--draws", "3"], "below 100"),
    ],
)
def test_what_cannot_work_is_said(radlads, place: Path, arguments: list[str], why: str) -> None:
    done = radlads("eval", place / "teacher", "--backend", "torch", *arguments)
    assert done.status == 2 and why in done.err and "Traceback" not in done.err
