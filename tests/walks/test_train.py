"""`radlads train` from teacher to talking student, interrupted on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from radlads.backends import open_engine
from radlads.folder import open_folder
from radlads.tensors import read_raw
from radlads.tokenizer import Tokenizer
from tests.models import tiny_teacher

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("RADLADS_SHARED_DATA", ROOT.parent / "shared" / "data"))
SMALL = [
    "--set=data.train=[text.txt]",
    "--set=data.valid=[text.txt]",
    *("--set=eval.tokens=512", "--set=eval.seq_len=64", "--set=eval.new_tokens=8"),
    *(f"--set=stages.{i}.{key}" for i in range(3) for key in ("tokens=2560", "seq_len=32", "batch_size=2", "save_every=7")),
    "--set=stages.1.measure_every=15",
]


def radlads(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "radlads", *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random teacher and a text."""
    path = tmp_path_factory.mktemp("walk")
    tiny_teacher(path / "teacher", "qwen3", tie_embeddings=True)
    (path / "text.txt").write_text("Once upon a time there was a little house by the sea. The cat said: the sea is high. " * 300)
    return path


def losses(run: Path) -> list[tuple[int, int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["stage"], r["step"], r["loss"]) for r in records if r["kind"] == "train"]


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    process = radlads("train", "tiny", "--teacher", "teacher", "--output-dir", "run", *SMALL, cwd=place)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Student after stage 3" in out and "radlads chat run/model" in out and "the teacher's loss rises by" in out
    return place / "run"


def test_the_run_leaves_what_it_promises(finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    assert record["schema"] == 1 and record["model"] == "model" and [s["stage"] for s in record["stages"]] == [1, 2, 3]
    assert record["final"].keys() == {"teacher_ppl", "student_ppl", "ppl_ratio", "kl", "agreement"}
    assert [open_folder(finished / f"stage-{n}").stage for n in range(4)] == [0, 1, 2, 3]
    assert sorted(p.name for p in (finished / "plots").iterdir()) == ["layers.png", "loss.png", "positions.png"]
    assert (finished / "report.html").stat().st_size > 10_000
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (finished / "model" / file).read_bytes() == (finished.parent / "teacher" / file).read_bytes()
    steps = losses(finished)
    for stage in (1, 2, 3):
        assert [step for n, step, _ in steps if n == stage] == list(range(1, 41))
    middle = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    middle = [record for record in middle if record["kind"] == "curve"]
    assert [(r["stage"], r["step"], r["tokens_seen"]) for r in middle] == [(2, 15, 960), (2, 30, 1920)]
    assert all(0 < r["kl"] < 1 and 0 < r["agreement"] < 1 for r in middle)
    first = [loss for n, _, loss in steps if n == 1]
    assert sum(first[-5:]) < 0.8 * sum(first[:5])


@pytest.mark.parametrize("ways", [(signal.SIGTERM, signal.SIGINT), (signal.SIGKILL, signal.SIGKILL)])
def test_stopped_and_resumed_gives_the_identical_losses(place: Path, finished: Path, ways: tuple[signal.Signals, ...]) -> None:
    run = place / f"stopped-{ways[0].name}"
    arguments = ("train", "tiny", "--teacher", "teacher", "--output-dir", run.name, *SMALL)
    for how, lines in zip(ways, (12, 60), strict=True):
        process = radlads(*arguments, cwd=place)
        until = time.monotonic() + 120
        while time.monotonic() < until and process.poll() is None:
            if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_bytes().splitlines()) >= lines:
                break
            time.sleep(0.01)
        process.send_signal(how)
        process.communicate(timeout=120)
        assert process.returncode in {signal.SIGTERM: (75, 0), signal.SIGINT: (130, 0), signal.SIGKILL: (-9, 0)}[how]
    process = radlads(*arguments, cwd=place)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert losses(run) == losses(finished)
    a, b = (path / "model" / "model.safetensors" for path in (run, finished))
    assert a.read_bytes() == b.read_bytes()


def test_student_says_the_same_on_both_backends(finished: Path) -> None:
    folder = open_folder(finished / "model")
    ids = Tokenizer(folder.path, vocab_size=folder.spec.vocab_size).encode("Once upon a time")
    engines = [open_engine(folder, name, "float32") for name in ("torch", "mlx")]
    fed = [engine.feed(engine.start(), ids) for engine in engines]
    for _ in range(512):
        logits = [f[0] for f in fed]
        assert np.abs(logits[0] - logits[1]).max() <= 1e-4
        token = int(logits[0].argmax())
        assert token == int(logits[1].argmax())
        fed = [engine.feed(state, [token]) for engine, (_, state) in zip(engines, fed, strict=True)]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["train", "tiny", "--set", "stages.0.lrr=1"], 2, ("R101", "lrr", "nearest")),
        (["train", "nothing"], 2, ("R101", "nothing")),
        (["train", "tiny", "--teacher", "absent"], 2, ("R201", "absent")),
        (["train", "tiny", "--set=data.train=[absent.txt]"], 2, ("R301", "absent.txt")),
        (["train", "tiny", "--student", "run/stage-2", "--teacher", "teacher", *SMALL], 2, ("R103", "stage 2")),
        (["train", "tiny", "--teacher", "teacher", "--output-dir", "run", *SMALL, "--set=seed=7"], 2, ("R303", "seed")),
    ],
)
def test_bad_input_is_one_line(place: Path, finished: Path, arguments: list[str], status: int, words: tuple[str, ...]) -> None:
    extra = [] if "--output-dir" in arguments else ["--output-dir", "fresh"]
    process = radlads(*arguments, *extra, cwd=place)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert not (place / "fresh").exists(), "bad input has left something"
    assert out == "" and len(err.strip().splitlines()) == 1 and all(word in err for word in words), err


def test_every_stage_loads_in_stock_transformers_and_mlx_lm(finished: Path) -> None:
    """The folders that training leaves need no more than their own files; logits equal those of the engine."""
    transformers, mlx_lm = pytest.importorskip("transformers"), pytest.importorskip("mlx_lm")
    import mlx.core as mx
    import torch

    ids = list(range(5, 25))
    for name in ("stage-1", "model"):
        folder = finished / name
        wanted = open_engine(open_folder(folder), "torch").feed(open_engine(open_folder(folder), "torch").start(), ids)[0]
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            assert np.abs(model(torch.tensor([ids])).logits[0, -1].numpy() - wanted).max() <= 1e-4
        stock, _ = mlx_lm.load(str(folder), trust_remote_code=True, tokenizer_config={"trust_remote_code": True})
        assert np.abs(np.array(stock(mx.array([ids]))[0, -1]) - wanted).max() <= 1e-4


def test_a_tied_teacher_lends_its_student_a_head_for_step_2(place: Path) -> None:
    """`student.head: retied`, the default: the student is tied before and after, with a head of its own in between."""
    few = [*(f"--set=stages.{i}.tokens=320" for i in range(3)), "--json"]
    process = radlads("train", "tiny", "--teacher", "teacher", "--output-dir", "retied", *SMALL, *few, cwd=place)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out)["status"] == "done"
    folders = [open_folder(place / "retied" / f"stage-{stage}") for stage in (0, 1, 2, 3)]
    assert all(folder.spec.tie_embeddings and "lm_head.weight" not in folder.weights for folder in folders)
    embeddings = [np.array(read_raw(folder.weights["model.embed_tokens.weight"])) for folder in folders]
    assert np.array_equal(embeddings[0], embeddings[1]) and not np.array_equal(embeddings[1], embeddings[2])


@pytest.mark.slow
def test_a_real_teacher_of_others_converts(tmp_path: Path) -> None:
    """stories260K (heads of 8), on text sampled from it: perplexity within 1.3 times the teacher's, in minutes."""
    teacher = SHARED / "stories260K" / "hf"
    if not teacher.exists():
        pytest.skip("the shared data are not here (RADLADS_SHARED_DATA)")
    for name, tokens, seed in (("train", 120_000, 1), ("valid", 16_000, 2)):
        sampled = ("prepare", "--sample-from", str(teacher), "--tokens", str(tokens), "--seed", str(seed), "--batch-size", "256")
        process = radlads(*sampled, "--output-dir", name, cwd=tmp_path)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    values = ["data.train=[train/sampled.txt]", "data.valid=[valid/sampled.txt]", "eval.tokens=8192", "eval.seq_len=128"]
    values += ["stages.0.tokens=150000", "stages.0.seq_len=128", "stages.0.batch_size=8"]
    values += ["stages.1.tokens=100000", "stages.1.seq_len=128", "stages.1.batch_size=8", "stages.2.tokens=10000"]
    began = time.monotonic()
    process = radlads(
        "train", "tiny", "--teacher", str(teacher), "--output-dir", "run", *(f"--set={v}" for v in values), cwd=tmp_path
    )
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    final = json.loads((tmp_path / "run" / "run.json").read_text())["final"]
    print("ratio", final["ppl_ratio"], "seconds", time.monotonic() - began)
    assert final["ppl_ratio"] <= 1.3
