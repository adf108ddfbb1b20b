"""Run folders: whose they are, what survives a kill, and what a resumed run forgets."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from radlads.errors import RadladsError
from radlads.recipe import Recipe, load_recipe
from radlads.runs import begin_run, environment, read_metrics

FINAL = {"teacher_ppl": 10.0, "student_ppl": 11.0, "ppl_ratio": 1.1, "kl": 0.1, "agreement": 0.9}


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("tiny")


def train_line(stage: int, step: int, loss: float = 1.0) -> dict[str, object]:
    return {"kind": "train", "stage": stage, "step": step, "tokens": 10 * step, "loss": loss}


def test_a_new_run_keeps_its_resolved_recipe(tmp_path: Path, recipe: Recipe) -> None:
    with begin_run(tmp_path / "a" / "run", recipe) as run:
        assert not run.resumed
        assert run.record()["status"] == "running"
        assert run.stage_folder(2).name == "stage-2"
    assert load_recipe(tmp_path / "a" / "run" / "recipe.yaml") == recipe


def test_the_same_recipe_resumes_and_another_is_refused(tmp_path: Path, recipe: Recipe) -> None:
    begin_run(tmp_path, recipe).close()
    with begin_run(tmp_path, recipe) as run:
        assert run.resumed
    with pytest.raises(RadladsError, match="resuming is off"):
        begin_run(tmp_path, recipe, resume="never")
    other = load_recipe("tiny", ["seed=7", "stages.1.lr=0.5"])
    with pytest.raises(RadladsError) as caught:
        begin_run(tmp_path, other)
    assert caught.value.code == "R303"
    assert "seed was 1337, now 7" in caught.value.why
    assert "stages.1.lr was" in caught.value.why


def test_a_folder_with_other_files_is_refused_untouched(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RadladsError, match=r"R303.*thesis\.txt"):
        begin_run(tmp_path, recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path, recipe: Recipe) -> None:
    with begin_run(tmp_path, recipe), pytest.raises(RadladsError, match="another process"):
        begin_run(tmp_path, recipe)
    begin_run(tmp_path, recipe).close()


def test_a_file_in_the_way_is_one_clear_error(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RadladsError, match="R401"):
        begin_run(tmp_path / "file", recipe)


def test_log_writes_strict_json(tmp_path: Path, recipe: Recipe) -> None:
    with begin_run(tmp_path, recipe) as run:
        run.log(
            {"kind": "eval", "loss": math.nan, "kl": np.float32(0.5), "kl_by_position": np.array([1.0, np.inf]), "n": np.int64(3)}
        )
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "kind": "eval",
        "loss": None,
        "kl": 0.5,
        "kl_by_position": [1.0, None],
        "n": 3,
    }


def test_a_torn_last_line_is_dropped_on_resume(tmp_path: Path, recipe: Recipe) -> None:
    with begin_run(tmp_path, recipe) as run:
        run.log(train_line(1, 1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "sta')
    assert len(read_metrics(tmp_path)) == 1
    with begin_run(tmp_path, recipe) as run:
        run.log(train_line(1, 2))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_damage_inside_the_metrics_is_reported(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\nrubbish\n{"a": 2}\n')
    with pytest.raises(RadladsError, match=r"R304.*metrics\.jsonl:2"):
        read_metrics(tmp_path)


def test_truncation_keeps_what_came_before(tmp_path: Path, recipe: Recipe) -> None:
    with begin_run(tmp_path, recipe) as run:
        run.log({"kind": "eval", "stage": "teacher", "loss": 1.0})
        run.log({"kind": "eval", "stage": 0, "loss": 2.0})
        for step in (1, 2):
            run.log(train_line(1, step))
        run.log({"kind": "eval", "stage": 1, "loss": 1.5})
        for step in (1, 2, 3):
            run.log(train_line(2, step, 1 / 3))
        run.log({"kind": "eval", "stage": 2, "loss": 1.2})
        run.truncate_metrics(2, 2)
        run.log(train_line(2, 3, 0.1))
    kept = [(record["kind"], record["stage"], record.get("step")) for record in read_metrics(tmp_path)]
    assert kept == [
        ("eval", "teacher", None),
        ("eval", 0, None),
        ("train", 1, 1),
        ("train", 1, 2),
        ("eval", 1, None),
        ("train", 2, 1),
        ("train", 2, 2),
        ("train", 2, 3),
    ]
    assert read_metrics(tmp_path)[-2]["loss"] == 1 / 3


def test_finish_writes_the_record(tmp_path: Path, recipe: Recipe) -> None:
    with begin_run(tmp_path, recipe) as run:
        run.finish(FINAL, [{"stage": 1, "tokens": 5}], seconds=3.5)
        with pytest.raises(ValueError, match="agreement"):
            run.finish({key: FINAL[key] for key in list(FINAL)[:-1]}, [])
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["schema"], record["model"], record["final"], record["stages"]) == (
        1,
        "model",
        FINAL,
        [{"stage": 1, "tokens": 5}],
    )
    assert (record["seconds"], record["recipe_sha256"]) == (3.5, recipe.fingerprint())
    with begin_run(tmp_path, recipe) as run:
        assert run.record()["status"] == "done"


def test_environment_names_versions_and_no_person() -> None:
    found = environment()
    assert {"radlads", "python", "numpy", "platform"} <= set(found)
    assert not {"user", "hostname", "cwd"} & set(found)
