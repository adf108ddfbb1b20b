"""The verb as a user meets it: formats, JSON, notices, one-line errors."""

import json

import pytest

from radlads.folder import open_folder


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
    assert other.status == 1 and "R401" in other.err
    assert radlads("convert", tmp_path / "q", "--to", "hf", "--output-dir", tmp_path / "back", "--overwrite").status == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--to", "hf", "-q"), "R101"),
        (("--to", "mlx", "-q", "--q-bits", 3), "R101"),
        (("--to", "onnx"), "R101"),
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
