import json

import pytest

from radlads.adapters import Settings, first_values, write_adapter
from radlads.folder import open_folder
from radlads.spec import ModelSpec
from radlads.weights_tools.surgery import make_student


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "student"
    make_student(open_folder(teacher), path, arch="rwkv7", keep_softmax=(0,), options={})
    return path


def test_json_of_a_student_agrees_with_its_spec(radlads, student):
    found = json.loads(radlads("inspect", student, "--json", "--tensors").out)
    spec: ModelSpec = open_folder(student).spec
    assert found["schema"] == 1 and found["mixers"] == ["softmax", "rwkv7"] and found["stage"] == 0
    assert found["parameters"] == spec.parameters() and found["state_bytes"] == spec.state_bytes() > 0
    assert found["weight_bytes"] == 4 * spec.parameters() and found["dtype"] == "float32"
    assert found["cache_bytes_per_token"] == 2 * 4 * spec.Ckv and found["teacher"] == "teacher"
    assert {row["name"]: tuple(row["shape"]) for row in found["tensors"]} == {n: r.shape for n, r in spec.tensors().items()}
    assert found["files"]["model.safetensors"] > found["weight_bytes"] and found["history"][0]["kind"] == "init"


def test_overview_for_people(radlads, student, teacher):
    page = radlads("inspect", student).out
    assert all(text in page for text in ("stage 0 (untrained)", "layers 0 ", "rwkv7", "at any length")) and "embed" not in page
    assert "variant C, low-rank gate, RoPE, no GroupNorm, softmax layers with RoPE" in page and "decay 32, iclr 32" in page
    page = radlads("inspect", teacher, "--tensors").out
    assert "softmax attention" in page and "model.embed_tokens.weight" in page


def test_no_code_of_the_folder_runs_and_its_names_cannot_write_to_the_terminal(radlads, student, tmp_path):
    for file in student.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "modeling_radlads.py").write_text("raise SystemExit(99)")
    (tmp_path / "evil\x1b[2J").write_text("")
    manifest = json.loads((tmp_path / "radlads.json").read_text())
    (tmp_path / "radlads.json").write_text(json.dumps({**manifest, "history": [{"kind": "a\x1b[2J"}, "text"]}))
    outcome = radlads("inspect", tmp_path)
    assert outcome.status == 0 and "\x1b" not in outcome.out


def test_broken_folder_is_one_line(radlads, tmp_path):
    (tmp_path / "config.json").write_text("{")
    outcome = radlads("inspect", tmp_path)
    assert outcome.status == 2 and outcome.err.startswith("error: R204") and outcome.err.count("\n") == 1


def test_every_format_is_inspected_and_compared(radlads, student, tmp_path):
    assert radlads("convert", student, "--to", "pth", "--output-dir", tmp_path / "pth").status == 0
    assert radlads("convert", student, "--to", "mlx", "-q", "--output-dir", tmp_path / "mlx").status == 0
    found = json.loads(radlads("inspect", tmp_path / "pth", "--diff", student, "--json").out)
    count = len(open_folder(student).spec.tensors())
    assert found["format"] == "pth" and found["stage"] == 0 and found["diff"]["same"] and found["diff"]["equal"] == count
    found = json.loads(radlads("inspect", student, "--diff", tmp_path / "mlx", "--json").out)
    rows = {row["name"]: row for row in found["diff"]["tensors"]}
    assert not found["diff"]["same"] and found["diff"]["settings"] == [] and found["diff"]["equal"] == count - len(rows)
    up = rows["model.layers.0.mlp.up_proj.weight"]
    assert up["what"] == "values" and 0.01 < up["relative"] < 0.2 and up["largest"] > 0
    page = radlads("inspect", student, "--diff", tmp_path / "mlx").out
    assert "largest gap" in page and "up_proj" in page and "4-bit" in radlads("inspect", tmp_path / "mlx").out
    other = radlads("inspect", student, "--diff", tmp_path / "nothing")
    assert other.status == 2 and other.err.startswith("error: R201")


def test_settings_and_tensors_that_only_one_has_are_told(radlads, student, teacher):
    found = json.loads(radlads("inspect", teacher, "--diff", student, "--json").out)["diff"]
    assert "model.layers.1.self_attn.w0" in found["only_right"] and found["only_left"] == []
    assert ["mixers", ["softmax", "softmax"], ["softmax", "rwkv7"]] in found["settings"]


@pytest.mark.parametrize("arch", ["rwkv7", "hxa07a", "softmax"])
def test_a_file_of_weights_alone_shows_what_its_tensors_tell(radlads, teacher, tmp_path, arch):
    place = tmp_path / "L2-D64-qwen3-rwkv7-2.pth"
    model = teacher
    if arch != "softmax":
        model = tmp_path / "student"
        make_student(open_folder(teacher), model, arch=arch, keep_softmax=(0,), options={})
    assert radlads("convert", model, "--to", "pth", "--output-dir", place).status == 0
    whole = json.loads(radlads("inspect", place, "--config", model, "--json", "--tensors").out)
    found = json.loads(radlads("inspect", place, "--json", "--tensors").out)
    for same in ("format", "layout", "architecture", "stage", "dtype", "parameters", "weight_bytes", "mixers", "tensors"):
        assert found[same] == whole[same], same
    assert found["dimensions"].items() <= whole["dimensions"].items()
    assert {"hidden_size", "vocab_size", "num_layers"} <= found["dimensions"].keys()
    page = radlads("inspect", place).out
    assert "--config names the teacher's folder" in page and ("1 (aligned)" in page) == (arch != "softmax")
    for needs_more in (("--diff", model), ("--stage", "1")):
        refused = radlads("inspect", place, *needs_more)
        assert refused.status == 2 and refused.err.startswith("error: R204") and "Pass --config" in refused.err


@pytest.mark.parametrize("to", ["mlx", "hf"])
def test_an_adapter_is_shown_and_held_against_its_model(radlads, student, teacher, tmp_path, to):
    folder, lora = open_folder(student), Settings(layers=1, rank=4, keys=("self_attn.q_proj", "mlp.up_proj"))
    (tmp_path / "new").mkdir()
    about = {"fingerprint": None, "dtype": "F32", "model": str(student), "num_layers": 1}
    write_adapter(tmp_path / "new", first_values(folder.spec, lora, 0), lora, folder.spec, **about)
    assert radlads("convert", tmp_path / "new", "--to", to, "--output-dir", tmp_path / "a").status == 0
    without_meaning = radlads("convert", tmp_path / "new", "--to", to, "--dtype", "float32", "--output-dir", tmp_path / "b")
    assert without_meaning.status == 2 and "no meaning for an adapter" in without_meaning.err
    page = radlads("inspect", tmp_path / "a").out
    told = ("4, scale 20, dropout 0", "1 layer ", "self_attn.q_proj, mlp.up_proj", "which it fits", "lora")
    assert all(text in page for text in told)
    found = json.loads(radlads("inspect", tmp_path / "a", "--json", "--tensors").out)
    assert found["format"] == {"mlx": "mlx-lm", "hf": "peft"}[to] and found["fits"] is True and len(found["tensors"]) == 4
    assert found["parameters"] == sum(shape[0] * shape[1] for shape in (row["shape"] for row in found["tensors"]))
    other = json.loads(radlads("inspect", tmp_path / "a", "--config", tmp_path / "gone", "--json").out)
    assert other["fits"] is None and "was not checked" in other["notices"][0]
    make_student(open_folder(teacher), tmp_path / "hxa", arch="hxa07a", options={})
    other = json.loads(radlads("inspect", tmp_path / "a", "--config", tmp_path / "hxa", "--json").out)
    assert other["fits"] is False and "q_proj.lora_a is unknown to the model" in other["notices"][0]
    for command in (["verify"], ["chat"], ["generate", "-p", "x"]):
        outcome = radlads(command[0], tmp_path / "a", *command[1:])
        assert outcome.status == 2 and "it holds an adapter, no model. Give the folder of its model" in outcome.err
