"""The verb as a user meets it: formats, JSON, notices, one-line errors."""

import json

import pytest

from radlads.errors import RadladsError
from radlads.files import sha256
from radlads.folder import open_folder
from radlads.weights_tools import inputs


def test_to_mlx_and_back_prints_one_document(radlads, teacher, tmp_path):
    wish = ("--to", "mlx", "-q", "--q-group-size", 32)
    found = json.loads(radlads("convert", teacher, *wish, "--output-dir", tmp_path / "q", "--json").out)
    assert found["schema"] == 1 and found["written"] and found["format"] == "mlx" and found["source_format"] == "hf: qwen3"
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    outcome = radlads("convert", tmp_path / "q", "--to", "hf", "--dtype", "bfloat16", "--output-dir", tmp_path / "back")
    assert outcome.status == 0 and "4-bit, groups of 32" in outcome.out and open_folder(tmp_path / "back").dtype == "BF16"
    again = radlads("convert", tmp_path / "q", "--to", "hf", "--dtype", "bfloat16", "--output-dir", tmp_path / "back")
    assert again.status == 0 and "nothing was done" in again.out
    other = radlads("convert", tmp_path / "q", "--to", "hf", "--output-dir", tmp_path / "back")
    assert other.status == 2 and "R401" in other.err
    assert radlads("convert", tmp_path / "q", "--to", "hf", "--output-dir", tmp_path / "back", "--overwrite").status == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--to", "hf", "-q"), "R101"),
        (("--to", "mlx", "-q", "--q-bits", 7), "R101"),
        (("--to", "onnx"), "R101"),
        (("--to", "mlx", "--layout", "rwkv7qwen2"), "R101"),
        (("--to", "hf", "--layout", "rwkv7qwen3"), "R205"),
        (("--to", "hf", "--config", "nowhere.json"), "R201"),
    ],
)
def test_wrong_wishes_are_one_line(radlads, teacher, tmp_path, arguments, code):
    outcome = radlads("convert", teacher, *arguments, "--output-dir", tmp_path / "out")
    assert outcome.status == 2 and outcome.err.startswith(f"error: {code}") and outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_missing_source_is_one_line(radlads, tmp_path):
    outcome = radlads("convert", tmp_path / "nothing", "--to", "hf", "--output-dir", tmp_path / "out")
    assert outcome.status == 2 and outcome.err.startswith("error: R201") and outcome.err.count("\n") == 1


@pytest.mark.parametrize("target", ["model.gguf", "model.pth", "folder"])
def test_what_runs_no_other_format_gives_the_line_that_converts_it(radlads, teacher, tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    kind = "gguf" if target.endswith(".gguf") else "pth"
    assert radlads("convert", teacher, "--to", kind, "--output-dir", target).status == 0
    for verb in (("generate", target, "-p", "x"), ("chat", target), ("verify", target), ("card", target)):
        outcome = radlads(*verb)
        line = f"radlads convert {target} --to hf --output-dir {target.partition('.')[0]}-hf"
        assert outcome.status == 2 and outcome.err.count("\n") == 1 and f"`{line}`" in outcome.err, outcome
    wish = [*line.split()[1:], *(("--config", str(teacher)) if target == "model.pth" else ())]
    assert radlads(*wish).status == 0 and radlads("verify", f"{target.partition('.')[0]}-hf", "--files-only").status == 0
    assert radlads("inspect", target, *wish[6:]).status == 0


def test_a_quantised_teacher_talks_on_mlx_and_is_no_teacher_of_a_student(radlads, teacher, tmp_path):
    wish = ("--to", "mlx", "-q", "--q-bits", 6, "--q-group-size", 32)
    assert radlads("convert", teacher, *wish, "--output-dir", tmp_path / "q").status == 0
    assert radlads("convert", tmp_path / "q", "--to", "hf", "--output-dir", tmp_path / "floats").status == 0
    said = [
        json.loads(radlads("generate", tmp_path / name, "-p", "one two", "-m", 6, "--backend", "mlx", "--json").out)["token_ids"]
        for name in ("q", "floats")
    ]
    assert said[0] == said[1] and len(said[0]) == 6
    assert "--backend mlx" in radlads("generate", tmp_path / "q", "-p", "x", "--backend", "torch").err
    outcome = radlads("init", tmp_path / "q", "--student-arch", "rwkv7", "--output-dir", tmp_path / "student")
    assert outcome.status == 2 and "R205" in outcome.err and "quantised" in outcome.err


@pytest.mark.parametrize(
    ("name", "stage", "words"),
    [
        ("L2-D32-qwen2-rwkv7-2.pth", 1, "runs since then mean stage 2"),
        ("L2-D32-qwen2-rwkv7-3.pth", 2, "until May 2025 (--stage overrides)"),
        ("L2-D32-qwerky7_qwen2-1/rwkv-final.pth", 1, "until May 2025 (--stage overrides)"),
        ("rwkv-final.pth", None, "it counts as finished, stage 3 (--stage overrides)"),
    ],
)
def test_the_stage_of_upstreams_checkpoints_is_read_from_their_names(radlads, teacher, tmp_path, name, stage, words):
    assert radlads("init", teacher, "--student-arch", "rwkv7", "--output-dir", tmp_path / "student").status == 0
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    assert radlads("convert", tmp_path / "student", "--to", "pth", "--output-dir", path).status == 0
    given = ("--config", str(teacher))
    found = json.loads(radlads("inspect", path, *given, "--json").out)
    assert found["stage"] == stage and any(notice.endswith(words) or words in notice for notice in found["notices"])
    out = ("--output-dir", tmp_path / "out")
    outcome = radlads("convert", path, *given, *out)
    assert words in outcome.err and open_folder(tmp_path / "out").stage == (stage or 3)
    assert radlads("convert", path, *given, "--stage", 2, "--output-dir", tmp_path / "other").status == 0
    assert open_folder(tmp_path / "other").stage == 2
    outcome = radlads("inspect", tmp_path / "other", "--stage", 1)
    assert outcome.status == 2 and "R101" in outcome.err and "own record" in outcome.err


def test_a_model_of_others_keeps_its_origin_licence_and_hashes(radlads, teacher, tmp_path):
    assert radlads("init", teacher, "--student-arch", "rwkv7", "--output-dir", tmp_path / "student").status == 0
    theirs = tmp_path / "models--them--QRWKV7-tiny" / "snapshots" / ("b" * 40)
    wish = ("--layout", "rwkv7qwen3", "--output-dir", theirs)
    assert radlads("convert", tmp_path / "student", *wish).status == 0
    text = radlads("card", theirs, "--stdout").out
    assert "The layout is rwkv7qwen3" in text and "its own model files" not in text and "mlx_lm" not in text
    (theirs / "radlads.json").unlink()
    (theirs / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    for target, place in (("mlx", "q"), ("hf", "back")):
        source = theirs if target == "mlx" else tmp_path / "q"
        wish = (*(("-q", "--q-group-size", 32) if target == "mlx" else ()), "--output-dir", tmp_path / place)
        assert radlads("convert", source, "--to", target, *wish).status == 0
        record = json.loads((tmp_path / place / "radlads.json").read_text())
        events = record["history"]
        assert events[-1]["source"]["sha256"] == {"model.safetensors": sha256(source / "model.safetensors")}
        origin = {"name": "QRWKV7-tiny", "repository": "them/QRWKV7-tiny", "revision": "b" * 40}
        assert {key: events[0]["source"][key] for key in origin} == origin
        assert record["license"] == {"license": "apache-2.0"} and record["stage"] == 3
        assert radlads("verify", tmp_path / place, "--files-only").status == 0
        text = radlads("card", tmp_path / place, "--stdout").out
        assert "base_model: them/QRWKV7-tiny" in text and "license: apache-2.0" in text
        assert ("AutoModelForCausalLM" in text) == (target == "hf") and "--trust-remote-code" in text


def test_hashes_of_the_input_wait_for_the_conversion_and_tell_what_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "PIECE", 10)
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.write_bytes(path.name.encode() * 100)
    with inputs.InputHashes(paths) as hashes:
        hashes.reached(0.75)
        hashes.thread.join(0.5)
        assert hashes.thread.is_alive() and list(hashes.hashes) == ["a"]
        assert hashes.result() == {path.name: sha256(path) for path in paths}
    with inputs.InputHashes(paths) as hashes:
        pass  # the conversion failed: nothing waits for the rest
    assert not hashes.thread.is_alive() and hashes.hashes == {}
    waiting = inputs.InputHashes(paths)
    paths[1].unlink()
    with waiting, pytest.raises(RadladsError, match="R201"):
        waiting.result()
