"""radlads finetune and fuse as a user runs them, on the torch backend; the arithmetic is tests/backends/test_finetune.py's."""

import json
import os
import signal
from pathlib import Path

import mlx.core as mx
import pytest

from radlads.demo import DEMO
from radlads.runs import read_metrics
from radlads.tuning.loop import Loss
from tests.students import tiny_student

SHARED = Path(os.environ.get("RADLADS_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
STORIES = SHARED / "text" / "tinystories_excerpt.txt"
TEXT = "Once upon a time there was an old man and his cat in a little house by the sea number {}."


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny_student(tmp_path_factory.mktemp("student")).path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    for split, count in (("train", 24), ("valid", 6), ("test", 6)):
        lines = [json.dumps({"text": TEXT.format(number) * (1 + number % 3)}) for number in range(count)]
        (path / f"{split}.jsonl").write_text("\n".join(lines))
    return path


def words(student, data, adapter, *more):
    flags = ["--backend", "torch", "--iters", 6, "--learning-rate", 1e-2, "--batch-size", 2, "--steps-per-report", 1]
    return ["finetune", student, "--data", data, "--adapter-path", adapter, *flags, *more]


def test_a_run_learns_and_what_it_made_is_used_and_fused(radlads, student, data, tmp_path):
    adapter = tmp_path / "a"
    done = radlads(*words(student, data, adapter, "--train", "--test", "--steps-per-eval", 3, "--save-every", 3, "--json"))
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert result["valid_loss"] < result["first_valid_loss"] - 0.3 and result["status"] == "done"
    # 8 (in + out) for each of seven matrices in three layers.
    assert result["trained_parameters"] == 3 * 8 * (2 * (64 + 128) + 2 * (64 + 64) + 3 * (64 + 64))
    records = read_metrics(adapter)
    assert [r["step"] for r in records if r["kind"] == "valid"] == [0, 3, 6]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert (adapter / "0000003_adapters.safetensors").exists() and (adapter / "plots" / "finetune.png").exists()
    assert "Fine-tuning loss" in (adapter / "report.html").read_text()
    alone = radlads("finetune", student, "--data", data, "--test", "--adapter-path", adapter, "--backend", "torch", "--json")
    assert json.loads(alone.out)["test_loss"] == pytest.approx(result["test_loss"], abs=1e-5)
    plain = radlads("finetune", student, "--data", data, "--test", "--adapter-path", "", "--backend", "torch", "--json")
    assert json.loads(plain.out)["test_loss"] > result["test_loss"] + 0.3
    fused = radlads("fuse", student, "--adapter-path", adapter, "--save-path", tmp_path / "fused", "--quiet")
    assert fused.status == 0 and f"radlads chat {tmp_path / 'fused'}" in fused.out
    ask = ["--backend", "torch", "-p", "Once", "-m", 8, "--ignore-chat-template", "--json"]
    one, two = radlads("generate", student, "--adapter-path", adapter, *ask), radlads("generate", tmp_path / "fused", *ask)
    assert json.loads(one.out)["token_ids"] == json.loads(two.out)["token_ids"]
    # A state of the model with the adapter is none of the model's without it.
    radlads("generate", student, "--adapter", adapter, *ask, "--save-state", tmp_path / "s")
    refused = radlads("generate", student, *ask, "--load-state", tmp_path / "s")
    assert refused.status == 2 and "made with another model" in refused.err
    again = radlads(*words(student, data, adapter, "--train", "--test", "--steps-per-eval", 3, "--save-every", 3, "--json"))
    assert json.loads(again.out)["valid_loss"] == result["valid_loss"]


@pytest.mark.parametrize(("backend", "kind"), [("torch", "dora"), ("torch", "state"), ("mlx", "lora")])
def test_a_stopped_run_goes_on_to_the_bit(radlads, student, data, tmp_path, monkeypatch, backend, kind):
    mx.disable_compile()
    more = ["--fine-tune-type", kind, "--dropout", 0.2, "--backend", backend, "--steps-per-report", 2, "--quiet"]
    whole = radlads(*words(student, data, tmp_path / "whole", *more))
    assert whole.status == 0, whole.err
    module = __import__(f"radlads.backends.{backend}.finetune", fromlist=["x"])
    tuner = module.TorchTuner if backend == "torch" else module.MlxTuner
    update, count = tuner.update, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments)

    monkeypatch.setattr(tuner, "update", interrupted)
    stopped = radlads(*words(student, data, tmp_path / "parts", *more))
    assert stopped.status == 75 and "stopped after iteration 3" in stopped.out
    resumed = radlads(*words(student, data, tmp_path / "parts", *more))
    assert resumed.status == 0 and len(count) == 6
    records = [[(r["kind"], r["step"], r["loss"]) for r in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert records[0] == records[1] and len(records[0]) == 5
    bits = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in ("whole", "parts")]
    assert bits[0] == bits[1]
    mx.enable_compile()


def test_more_iterations_go_on_and_other_settings_are_refused(radlads, student, data, tmp_path):
    assert radlads(*words(student, data, tmp_path / "a", "--iters", 2)).status == 0
    longer = radlads(*words(student, data, tmp_path / "a", "--iters", 4))
    assert longer.status == 0 and "going on after iteration 2" in longer.err
    straight = radlads(*words(student, data, tmp_path / "b", "--iters", 4))
    assert straight.status == 0
    bits = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in "ab"]
    assert bits[0] == bits[1]
    other = radlads(*words(student, data, tmp_path / "a", "--iters", 4, "--seed", 1))
    assert other.status == 2 and "seed was 0, now 1" in other.err and "--adapter-path" in other.err
    file = tmp_path / "b" / "adapters.safetensors"
    taken = radlads(*words(student, data, tmp_path / "c", "--iters", 2, "--resume-adapter-file", file, "--json"))
    assert json.loads(taken.out)["train_loss"] < read_metrics(tmp_path / "b")[1]["loss"] - 0.1


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--num-layers", 9], "--num-layers: 9 layers are to be trained, and the model has 3"),
        (["--keys", "self_attn.qproj"], "no layer that is trained has a linear module 'self_attn.qproj'"),
        (["--batch-size", 99], "fewer than a batch of 99"),
        (["--mask-prompt"], "no prompt to mask"),
        (["--iters", 0], "--iters: it should be greater than 0"),
        (["--fine-tune-type", "lokr"], "'lora', 'dora', 'full', 'state'"),
        (["--data", "nowhere"], "nowhere: there is no such folder"),
        (["--test", "--adapter-path", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_line(radlads, student, data, tmp_path, more, said):
    refused = radlads(*words(student, data, tmp_path / "a", *more))
    assert refused.status == 2 and said in refused.err and len(refused.err.strip().splitlines()) <= 2, refused.err
    assert not (tmp_path / "a").exists()


def test_a_run_that_diverged_before_a_checkpoint_may_begin_anew(radlads, student, data, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("radlads.backends.torch.finetune.TorchTuner.update", lambda *_: [Loss(float("nan"), 1)])
        diverged = radlads(*words(student, data, tmp_path / "a", "--seed", 3, "--quiet"))
    assert diverged.status == 1 and "R404" in diverged.err and "--learning-rate" in diverged.err
    again = radlads(*words(student, data, tmp_path / "a", "--iters", 2, "--json"))
    assert again.status == 0 and len(read_metrics(tmp_path / "a")) == 4


@pytest.mark.skipif(not STORIES.is_file(), reason="the shared data are absent")
def test_the_loss_falls_on_text_that_the_model_has_not_seen(radlads, tmp_path):
    text = STORIES.read_text()
    (tmp_path / "train.txt").write_text(text[:40_000])
    (tmp_path / "valid.txt").write_text(text[-10_000:])
    places = ["--data", tmp_path, "--adapter-path", tmp_path / "a", "--backend", "torch"]
    flags = ["--iters", 10, "--learning-rate", 5e-4, "--max-seq-length", 65, "--val-batches", 8, "--json"]
    done = radlads("finetune", DEMO / "tiny-teacher", *places, *flags)
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert result["valid_loss"] < result["first_valid_loss"] - 0.08


def test_a_teacher_has_no_state_to_train(radlads, teacher, data, tmp_path):
    refused = radlads(*words(teacher, data, tmp_path / "a", "--fine-tune-type", "state"))
    assert refused.status == 2 and "no recurrent layer" in refused.err and not (tmp_path / "a").exists()
    assert radlads(*words(teacher, data, tmp_path / "b", "--iters", 1)).status == 0


def test_convert_turns_an_adapter_into_the_other_format(radlads, student, data, tmp_path):
    assert radlads(*words(student, data, tmp_path / "a", "--iters", 1)).status == 0
    assert radlads("convert", tmp_path / "a", "--to", "hf", "--output-dir", tmp_path / "p").status == 0
    assert radlads("convert", tmp_path / "p", "--to", "mlx", "--config", student, "--output-dir", tmp_path / "m").status == 0
    bits = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in "am"]
    assert bits[0] == bits[1]
    assert (tmp_path / "p" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "a" / "peft" / "adapter_model.safetensors"
    ).read_bytes()
    refused = radlads("convert", tmp_path / "a", "--to", "gguf", "--output-dir", tmp_path / "x")
    assert refused.status == 2 and "radlads fuse" in refused.err
