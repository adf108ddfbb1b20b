"""`radlads verify`, `card` and `push`: what they notice, what they write, and what they refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from radlads import verify
from radlads.folder import open_folder
from radlads.tensors import read_raw
from radlads.weights_tools.standalone import model_files
from radlads.weights_tools.surgery import make_student, student_spec
from tests.models import rewrite, tiny_teacher


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A student with one softmax layer; never changed."""
    base = tmp_path_factory.mktemp("verify")
    teacher = tiny_teacher(base / "models--me--tiny" / "snapshots" / ("a" * 40))
    (teacher / "LICENSE").write_text("MIT License\n")
    source = open_folder(teacher)
    code, config = model_files(student_spec(source, "rwkv7", (0,), {}))
    return make_student(
        source, base / "student", arch="rwkv7", keep_softmax=(0,), options={}, extra_files=code, config_extra=config
    ).path


@pytest.fixture
def student(made, tmp_path) -> Path:
    """A copy of the student that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "student"))


def manifest(path: Path, **changes: object) -> None:
    """Change keys of the manifest; None removes one."""
    values = {**json.loads((path / "radlads.json").read_text()), **changes}
    (path / "radlads.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def verified(path: Path) -> None:
    """Leave the verdict that `radlads verify` would."""
    checks = [verify.check_files(path, json.loads((path / "radlads.json").read_text()))]
    verify.write_verdict(path, [*checks, verify.measured("torch against oracle", 3e-7, 1e-4, "logits")])


def checks_of(outcome) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(outcome.out)["checks"]}


def test_a_sound_folder_passes_on_every_backend(radlads, student, tmp_path):
    outcome = radlads("verify", student, "--json", "--junit", tmp_path / "v.xml")
    checks = checks_of(outcome)
    assert outcome.status == 0 and json.loads(outcome.out)["passed"] and outcome.err == ""
    assert {check["status"] for check in checks.values()} == {"passed"} and len(checks) == 12
    for backend in ("torch", "mlx"):
        for name in ("against oracle", "chunked against recurrent", "split prefill"):
            assert 0 < checks[f"{backend} {name}"]["value"] < 1e-5 < checks[f"{backend} {name}"]["limit"] == 1e-4
    assert 0 < checks["torch against mlx"]["value"] < 1e-5
    suite = ElementTree.parse(tmp_path / "v.xml").getroot()
    assert suite.get("tests") == "12" and suite.get("failures") == "0" and len(suite) == 12
    verdict = json.loads((student / "verify.json").read_text())
    assert verdict["passed"] and verdict["manifest"] == verify.sha256(student / "radlads.json")


def test_a_folder_with_which_nothing_was_computed_is_not_verified(radlads, student, monkeypatch):
    monkeypatch.setattr("radlads.backends.available_backends", list)
    outcome = radlads("verify", student)
    assert outcome.status == 3 and "no backend" in outcome.out and radlads("card", student).status == 0
    assert "its last verification failed" in radlads("push", student, "me/x", "--dry-run").err


def flip(name: str, place: int) -> Callable[[Path], object]:
    """Turn one bit of a file; `place` counts from the end if negative."""

    def change(path: Path) -> None:
        data = bytearray((path / name).read_bytes())
        data[place] ^= 1
        (path / name).write_bytes(data)

    return change


def nan_weight(path: Path) -> None:
    rewrite(path, lambda stored: stored["model.norm.weight"][1].fill(np.nan))


def to_link(path: Path) -> None:
    (path / "tokenizer.json").rename(path / ".hidden")
    (path / "tokenizer.json").symlink_to(".hidden")


def edited(path: Path, key: str, change: Callable[[Any], object]) -> None:
    values = json.loads((path / "radlads.json").read_text())
    change(values[key])
    manifest(path, **{key: values[key]})


def unnamed_code(path: Path) -> None:
    """The hashes are right, and yet no stock library would find the model's code."""
    config = json.loads((path / "config.json").read_text())
    del config["model_file"]
    (path / "config.json").write_text(json.dumps(config))
    edited(path, "files", lambda files: files.update({"config.json": verify.sha256(path / "config.json")}))


TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit in the first weight": (flip("model.safetensors", -1), "files"),
    "bit in a weight in the middle": (flip("model.safetensors", -300_000), "files"),
    "bit in the header": (flip("model.safetensors", 40), "files"),
    "weights cut": (lambda path: (path / "model.safetensors").write_bytes(b""), "files"),
    "weights gone": (lambda path: (path / "model.safetensors").unlink(), "files"),
    "weight not finite": (nan_weight, "weights"),
    "shard added": (lambda path: shutil.copy(path / "model.safetensors", path / "model-2.safetensors"), "files"),
    "config changed": (lambda path: (path / "config.json").write_text((path / "config.json").read_text() + " "), "files"),
    "config broken": (lambda path: (path / "config.json").write_text("{"), "files"),
    "config gone": (lambda path: (path / "config.json").unlink(), "files"),
    "rope base changed": (
        lambda path: (path / "config.json").write_text((path / "config.json").read_text().replace("54321", "10000")),
        "files",
    ),
    "model code changed": (flip("modeling_radlads.py", -1), "files"),
    "MLX code changed": (flip("radlads_mlx.py", 100), "files"),
    "code added": (lambda path: (path / "setup.py").write_text("import os"), "files"),
    "program added": (lambda path: (path / "run.sh").write_text("true"), "files"),
    "pickle added": (lambda path: (path / "pytorch_model.bin").write_bytes(b"\x80\x02."), "files"),
    "folder added": (lambda path: (path / "onnx").mkdir(), "files"),
    "tokenizer changed": (flip("tokenizer.json", -3), "files"),
    "tokenizer settings changed": (flip("tokenizer_config.json", 30), "files"),
    "chat template changed": (lambda path: (path / "chat_template.jinja").write_text("{{ 1 }}"), "files"),
    "chat template gone": (lambda path: (path / "chat_template.jinja").unlink(), "files"),
    "file is a link": (to_link, "files"),
    "licence gone": (lambda path: (path / "LICENSE").unlink(), "files"),
    "hash changed": (lambda path: edited(path, "files", lambda files: files.update({"config.json": "0" * 64})), "files"),
    "hash removed": (lambda path: edited(path, "files", lambda files: files.pop("config.json")), "files"),
    "hash of a file elsewhere": (lambda path: edited(path, "files", lambda files: files.update({"../x": "0" * 64})), "files"),
    "all hashes removed": (lambda path: manifest(path, files=None), "files"),
    "model code not named": (unnamed_code, "model code"),
    "history removed": (lambda path: manifest(path, history=None), "provenance"),
    "history of another stage": (lambda path: manifest(path, history=[{"stage": 2, "kind": "distill"}]), "provenance"),
    "stage raised": (lambda path: manifest(path, stage=3), "provenance"),
    "teacher removed": (lambda path: manifest(path, teacher=None), "provenance"),
    "teacher's hashes removed": (lambda path: edited(path, "teacher", lambda teacher: teacher.pop("files")), "provenance"),
    "tokenizer of another teacher": (
        lambda path: edited(path, "teacher", lambda teacher: teacher["files"].update({"tokenizer.json": "0" * 64})),
        "tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAMPERINGS)
def test_every_tampering_is_noticed(case, radlads, student):
    change, name = TAMPERINGS[case]
    change(student)
    outcome = radlads("verify", student, "--files-only", "--json")
    assert outcome.status == 3 and "Traceback" not in outcome.err
    assert checks_of(outcome)[name]["status"] == "failed", outcome.out


class Wrong:
    """An engine that errs in one way."""

    def __init__(self, engine, fault: str) -> None:
        self.engine, self.fault = engine, fault
        self.start, self.state_arrays, self.spec, self.name = engine.start, self.arrays, engine.spec, engine.name

    def feed(self, state, tokens):
        logits, after = self.engine.feed(state, tokens)
        wrong = (self.fault == "all", self.fault == "single" and len(tokens) == 1, self.fault == "later" and state.position > 0)
        return logits * (1 + 1e-3 * any(wrong)), after

    def arrays(self, state):
        arrays = self.engine.state_arrays(state)
        return {name: array * (1 + 1e-3 * (self.fault == "state")) for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        ("all", {"torch against oracle"}),
        ("single", {"torch against oracle", "torch chunked against recurrent", "torch split prefill"}),
        ("later", {"torch chunked against recurrent", "torch split prefill"}),
    ],
)
def test_an_engine_that_errs_is_noticed(fault, failing, made):
    from radlads.backends import open_engine

    folder = open_folder(made)
    tokens = verify.sample_tokens(folder, None)[:20]
    computed = {"torch": verify.compute(Wrong(open_engine(folder, "torch"), fault), tokens)}
    checks = verify.engine_checks(computed, verify.oracle_prefixes(folder, tokens), "", "float32")
    assert {check.name for check in checks if check.status == "failed"} == failing


def test_relative_error_is_never_fooled():
    one = np.ones(4, np.float32)
    assert verify.relative(one, one) == 0 and verify.relative(one * 1.01, one) == pytest.approx(0.01, rel=1e-3)
    assert verify.relative(one[:3], one) == float("inf") and verify.states_apart({}, {"a": one}) == float("inf")
    assert verify.measured("x", float("nan"), 1.0, "").status == "failed"
    assert verify.relative(one, one * 0) == 1


def test_loss_against_another_model_is_the_divergence_by_hand():
    rng = np.random.default_rng(0)
    ours, theirs = rng.standard_normal((2, 5, 7))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (theirs, ours))
    check = verify.loss_check(ours, theirs, [0, 1, 2, 3, 4], 10.0)
    assert check.value == pytest.approx((p * np.log(p / q)).sum(-1).mean()) and check.status == "passed"
    assert verify.loss_check(ours, theirs, [0, 1, 2, 3, 4], 1e-3).status == "failed"
    assert verify.loss_check(ours, ours, [0, 1, 2, 3, 4], 1e-9).status == "passed"


def test_against_the_teacher_is_a_gate(radlads, student, made):
    teacher = next(made.parent.glob("models--*/snapshots/*"))
    outcome = radlads("verify", student, "--backend", "torch", "--against", teacher, "--max-kl", "1e-6")
    assert outcome.status == 3 and "NOT VERIFIED: loss" in outcome.out
    outcome = radlads("verify", teacher, "--files-only", "--json")
    assert outcome.status == 0 and checks_of(outcome)["files"]["status"] == "skipped"
    assert not (teacher / "verify.json").exists()  # it is no folder of ours


def test_what_quantisation_costs_is_measured(radlads, made, tmp_path):
    assert radlads("convert", made, "--to", "mlx", "-q", "--q-bits", "8", "--output-dir", tmp_path / "q8").status == 0
    outcome = radlads("verify", tmp_path / "q8", "--against", made, "--json")
    loss = checks_of(outcome)["loss"]
    assert outcome.status == 0 and loss["limit"] == 0.1 and 0 < loss["value"] < 1e-3, outcome.out
    for name in ("mlx against oracle", "mlx split prefill"):
        assert checks_of(outcome)[name]["status"] == "passed" and 0 < checks_of(outcome)[name]["value"] < 1e-5, name
    outcome = radlads("verify", tmp_path / "q8", "--against", made, "--max-kl", loss["value"] / 2, "--json")
    assert outcome.status == 3 and checks_of(outcome)["loss"]["status"] == "failed"
    flip("model.safetensors", -1)(tmp_path / "q8")
    assert radlads("verify", tmp_path / "q8", "--files-only").status == 3


@pytest.mark.parametrize("arguments", [("nowhere",), (".", "--max-kl", "1")])
def test_bad_usage_is_one_line(arguments, radlads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = radlads("verify", *arguments)
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and outcome.out == ""


def test_the_verdict_does_not_go_on_to_the_next_folder(student):
    (student / "verify.json").write_text("{}")
    from radlads.folder import inherited

    assert "verify.json" not in {path.name for path in inherited(open_folder(student))}


def test_the_card_says_where_the_model_comes_from(radlads, student):
    record = {
        "final": {"teacher_ppl": 10.5},
        "stages": [{"stage": 1, "tokens": 1000, "ppl": 12.25, "kl": 0.125, "agreement": 0.5}],
    }
    (student.parent / "run.json").write_text(json.dumps(record))
    verified(student)
    assert radlads("card", student).status == 0
    text = (student / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "mit" and head["base_model"] == "me/tiny" and head["pipeline_tag"] == "text-generation"
    assert "rwkv7" in head["tags"]
    assert "revision " + "a" * 40 in text and "| teacher |  | 10.5 |" in text and "| after stage 1 | 1,000 | 12.25 |" in text
    assert "| torch against oracle | passed |" in text
    outcome = radlads("card", student, "--license", "apache-2.0", "--stdout")
    assert "license: apache-2.0" in outcome.out and (student / "README.md").read_text() == text
    for chosen in (("--license", "apache-2.0"), ()):  # what was chosen once is kept
        assert radlads("card", student, *chosen).status == 0
        assert "license: apache-2.0" in (student / "README.md").read_text()


def test_the_card_of_somebody_else_is_not_lost(radlads, student):
    (student / "README.md").write_text("# Mine\n")
    assert radlads("card", student).status == 2 and (student / "README.md").read_text() == "# Mine\n"
    assert radlads("card", student, "--overwrite").status == 0 and radlads("card", student).status == 0


def test_names_from_a_manifest_are_no_markup_of_the_card(radlads, student):
    edited(student, "teacher", lambda teacher: teacher.update({"repository": "a|b](http://x)<script>\n# x"}))
    text = radlads("card", student, "--stdout").out
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body.replace("\\<", "").replace("\\>", "") and "\n# x" not in body


class FakeHub:
    """Takes the place of huggingface_hub.HfApi."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, **_: Any) -> None:
        pass

    def create_repo(self, repo: str, **more: Any) -> None:
        self.calls.append(("create", repo, more))

    def upload_folder(self, **more: Any) -> SimpleNamespace:
        self.calls.append(("upload", more))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def hub(monkeypatch) -> type[FakeHub]:
    """The fake Hub, with no calls yet."""
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    return FakeHub


def test_push_sends_a_verified_folder_and_nothing_else(radlads, student, hub):
    (student / ".env").write_text("SECRET")
    verified(student)
    radlads("card", student)
    assert radlads("push", student, "model", "--dry-run").status == 2
    outcome = radlads("push", student, "me/model", "--dry-run", "--json")
    assert outcome.status == 0 and hub.calls == []
    outcome = radlads("push", student, "me/model", "--private", "--json")
    assert outcome.status == 0 and json.loads(outcome.out)["commit"] == "https://hub/commit/1"
    (_, repo, more), (_, upload) = hub.calls
    assert repo == "me/model" and more == {"private": True, "exist_ok": True}
    listed = json.loads((student / "radlads.json").read_text())["files"]
    assert set(upload["allow_patterns"]) == {*listed, "radlads.json", "verify.json", "README.md"}


@pytest.mark.parametrize(
    "fault", ["never verified", "failed", "changed", "manifest changed", "file added", "no card", "no licence"]
)
def test_push_refuses_what_is_not_verified(fault, radlads, student, hub):
    if fault != "never verified":
        verified(student)
    if fault != "no card":
        radlads("card", student)
    if fault == "failed":
        verdict = json.loads((student / "verify.json").read_text())
        (student / "verify.json").write_text(json.dumps({**verdict, "passed": False}))
    elif fault == "changed":
        flip("model.safetensors", -1)(student)
    elif fault == "manifest changed":
        manifest(student, seed=1)
    elif fault == "no licence":
        radlads("card", student, "--license", "unknown")
    elif fault == "file added":
        (student / "notes.txt").write_text("x")
    outcome = radlads("push", student, "me/model")
    assert outcome.status == 3 and outcome.err.startswith("error: R501") and outcome.err.count("\n") == 1 and hub.calls == []
    assert ("licence is not known" in outcome.err) == (fault == "no licence")


def test_push_says_what_the_hub_says(radlads, student, hub, monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError

    def refuse(self: Any, repo: str, **_: Any) -> None:
        raise HfHubHTTPError("401 Unauthorized\nRequest ID: 1", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(FakeHub, "create_repo", refuse)
    verified(student)
    radlads("card", student)
    outcome = radlads("push", student, "me/model")
    *told, error = outcome.err.splitlines()
    assert outcome.status == 1 and "R407" in error and "401" in error
    assert all(line.startswith("uploading") for line in told)


def test_weights_of_the_checked_folder_are_untouched(made):
    assert all(np.isfinite(read_raw(entry)).all() for entry in open_folder(made).weights.values())
