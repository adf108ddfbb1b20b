"""A prompt read once by `radlads cache`, and what `generate` makes of its state."""

import io
import json
import sys

from radlads.tensors import read_header
from radlads.tokenizer import Tokenizer
from tests.models import tiny_teacher


def test_a_question_goes_on_from_a_document_as_if_both_were_one_message(radlads, teacher, engine, tmp_path):
    file = tmp_path / "report.state"
    done = radlads("cache", teacher, "-p", "a long report. ", "-o", file)
    assert done.status == 0 and "--load-state" in done.out and file.stat().st_size > 0
    engine.fed.clear()
    assert radlads("generate", teacher, "--load-state", file, "-p", "sum it up", "-m", 3, "--json").status == 0
    rest = Tokenizer(teacher).decode(engine.fed[0], skip_special=False)
    assert rest == "sum it up<|im_end|>\n<|im_start|>assistant\n"


def test_an_answer_can_be_asked_further(radlads, teacher, engine, tmp_path):
    file = tmp_path / "s"
    whole = json.loads(radlads("generate", teacher, "-p", "hi", "-m", 4, "--save-state", file, "--json").out)
    engine.fed.clear()
    radlads("generate", teacher, "--load-state", file, "-p", "and then?", "-m", 1)
    again = Tokenizer(teacher).decode(engine.fed[0], skip_special=False)
    assert again == "<|im_end|>\n<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n"
    assert len(whole["token_ids"]) == 4


def test_a_file_says_what_it_is(radlads, teacher, engine, tmp_path):
    radlads("generate", teacher, "-p", "hi", "-m", 4, "--save-state", tmp_path / "s")
    page = radlads("inspect", tmp_path / "s", "--tensors").out
    assert "the end of an answer" in page and "toy" in page and "logits" in page
    found = json.loads(radlads("inspect", tmp_path / "s", "--config", teacher, "--json").out)
    assert (found["kind"], found["fits"]) == ("state", True) and found["bytes"] == (tmp_path / "s").stat().st_size
    other = tiny_teacher(tmp_path / "other", seed=1)
    assert "not the one named" in radlads("inspect", tmp_path / "s", "--config", other).out
    spoilt = bytearray((tmp_path / "s").read_bytes())
    spoilt[read_header(tmp_path / "s")["logits"].start] ^= 1
    (tmp_path / "s").write_bytes(spoilt)
    damaged = radlads("inspect", tmp_path / "s")
    assert damaged.status == 2 and "damaged" in damaged.err


def test_text_goes_on_exactly_where_it_stopped(radlads, plain_teacher, engine, tmp_path):
    file = tmp_path / "s"
    whole = json.loads(radlads("generate", plain_teacher, "-p", "Once", "-m", 8, "--json").out)["token_ids"]
    first = json.loads(radlads("generate", plain_teacher, "-p", "Once", "-m", 3, "--save-state", file, "--json").out)["token_ids"]
    rest = json.loads(radlads("generate", plain_teacher, "--load-state", file, "-p", "", "-m", 5, "--json").out)["token_ids"]
    assert first + rest == whole


def test_what_cannot_work_is_said_before_anything_is_written(radlads, teacher, engine, tmp_path, monkeypatch):
    assert radlads("generate", teacher, "-p", "x", "--load-state", tmp_path / "nothing").status == 2
    (tmp_path / "text").write_text("no state")
    refused = radlads("generate", teacher, "-p", "x", "--load-state", tmp_path / "text")
    assert refused.status == 2 and "Traceback" not in refused.err
    radlads("cache", teacher, "-p", "hi", "-o", tmp_path / "s")
    late = radlads("generate", teacher, "-p", "x", "--load-state", tmp_path / "s", "--system-prompt", "be kind")
    assert late.status == 2 and "too late" in late.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8"))
    assert radlads("cache", teacher, "-o", tmp_path / "t").status == 2 and not (tmp_path / "t").exists()
