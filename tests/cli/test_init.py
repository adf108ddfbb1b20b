import json
import re

import pytest

from radlads.cli.init import layers
from radlads.folder import open_folder
from radlads.tensors import read_raw


@pytest.fixture
def quick(monkeypatch):
    """No PyTorch and no shipped model files: they have tests of their own."""
    monkeypatch.setattr("radlads.backends.available_backends", lambda: [])
    monkeypatch.setattr("radlads.weights_tools.standalone.model_files", lambda spec: ({"x.py": b"x"}, {"model_file": "x.py"}))


def test_student_is_written_with_its_files_and_said(radlads, quick, teacher, tmp_path):
    out = tmp_path / "student"
    outcome = radlads("init", teacher, "--keep-softmax", "1", "--set", "student.gate=none", "--output-dir", out, "--json")
    found = json.loads(outcome.out)
    assert outcome.status == 0 and found["recurrent_layers"] == [0] and found["softmax_layers"] == [1] and found["step0"] == {}
    assert "PyTorch is not installed" in outcome.err
    student, source = open_folder(out), open_folder(teacher)
    assert student.spec.mixer.gate == "none" and student.stage == 0 and (out / "x.py").read_bytes() == b"x"
    assert student.config["model_file"] == "x.py" and found["copied_tensors"] + found["new_tensors"] == len(student.weights)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert (read_raw(student.weights[name]) == read_raw(source.weights[name])).all()


def test_variant_and_arch(radlads, quick, teacher, tmp_path):
    assert radlads("init", teacher, "--variant", "B", "--output-dir", tmp_path / "b").status == 0
    assert open_folder(tmp_path / "b").spec.mixer.variant == "B"
    assert radlads("init", "--teacher", teacher, "--student-arch", "rwkv6", "--output-dir", tmp_path / "six").status == 0
    assert open_folder(tmp_path / "six").spec.mixers == ("rwkv6", "rwkv6")


def test_distance_to_the_teacher_is_measured(radlads, teacher, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr("radlads.weights_tools.standalone.model_files", lambda spec: ({}, {}))
    (tmp_path / "text.txt").write_text("Once upon a time there was a house.")
    outcome = radlads("init", teacher, "--text", tmp_path / "text.txt", "--output-dir", tmp_path / "s", "--json")
    step0 = json.loads(outcome.out)["step0"]
    assert step0["kl"] > 0 and step0["teacher_loss"] > 0
    assert "step-0 kl" in radlads("init", teacher, "--output-dir", tmp_path / "t").out


@pytest.mark.parametrize(
    "words, code",
    [
        (["--keep-softmax", "9"], "R101"),
        (["--keep-softmax", "0,x"], "R101"),
        (["--keep-softmax", "1-0"], "R101"),
        (["--keep-softmax", "0,1"], "R101"),
        (["--set", "student.gat=full"], "R101 .*nearest is student.gate"),
        (["--set", "gate=5"], "R101 .*not a word"),
        (["--set", "rope=5"], "R101 .*true or false"),
        (["--set", "gate=purple"], "R101 .*purple"),
        (["--student-arch", "rwkv6", "--variant", "A"], "R101"),
        (["--text", "nowhere.txt"], "R301"),
    ],
)
def test_bad_choice_writes_nothing(radlads, quick, teacher, tmp_path, words, code):
    outcome = radlads("init", teacher, *words, "--output-dir", tmp_path / "out")
    assert outcome.status == 2 and outcome.out == "" and list(tmp_path.iterdir()) == []
    assert re.search(f"error: {code}", outcome.err) and outcome.err.count("\n") == 1


def test_existing_output_is_replaced_only_when_asked(radlads, quick, teacher, tmp_path):
    out = tmp_path / "student"
    assert radlads("init", teacher, "--output-dir", out).status == 0
    assert radlads("init", teacher, "--output-dir", out).status == 2
    assert radlads("init", teacher, "--output-dir", out, "--overwrite").status == 0
    assert radlads("init", out, "--output-dir", tmp_path / "again").status == 2  # a student is no teacher


def test_layers_are_numbers_and_ranges():
    assert layers("") == () and layers("3, 7,11") == (3, 7, 11) and layers("0-2,2") == (0, 1, 2)
