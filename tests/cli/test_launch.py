"""What `radlads launch` starts, and what the trackers are told."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from radlads.cli.launch import NodeTask, minutes, run_here
from radlads.cli.trackers import follow
from radlads.errors import RadladsError
from tests.models import tiny_teacher

ROOT = Path(__file__).parents[2]


def test_print_gives_one_line_or_a_slurm_script(radlads) -> None:
    some = ("--gpus-per-node", "4", "--set", "seed=7", "--output-dir", "runs/x y")
    one = radlads("launch", "tiny", "--executor", "print", *some).out
    assert "--standalone --nproc-per-node=4" in one and "train tiny --output-dir 'runs/x y' --set=seed=7 --resume auto" in one
    many = radlads("launch", "tiny", "--executor", "print", "--nodes", "2", "--partition", "gpu", "--time", "01:30:00").out
    assert many.startswith("#!/bin/bash\n#SBATCH --nodes=2\n") and "#SBATCH --partition=gpu" in many and "--requeue" in many
    assert "--nproc-per-node=gpu" in many  # of the machines of the job, whatever this one has
    assert "--nnodes=2" in many and '"$SLURM_JOB_NODELIST"' in many and "--rdzv-endpoint=$HEAD:" in many
    assert subprocess.run(["bash", "-n"], input=many, text=True, check=False).returncode == 0


def test_bad_machines_and_bad_recipes_are_refused_before_anything_starts(radlads) -> None:
    for wrong, words in (
        (("--nodes", "0"), "--nodes"),
        (("--nodes", "2"), "local executor"),
        (("--time", "soon"), "HH:MM:SS"),
        (("--set", "seed=x"), "seed"),
        (("--teacher", "absent"), "absent"),
    ):
        refused = radlads("launch", "tiny", *wrong)
        assert refused.status == 2 and words in refused.err and len(refused.err.splitlines()) == 1
    assert minutes("24:00:00") == 1440 and minutes("00:00:10") == 1


def test_a_lost_process_is_started_again_and_a_stopped_run_is_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Ends with 1 the first time, is done the second.
    script = (
        "import json, pathlib, sys; p = pathlib.Path(sys.argv[1]); n = len(list(p.glob('start*'))); (p / f'start{n}').touch();"
        "(p / 'run.json').write_text(json.dumps({'status': 'done' if n else 'running'})); sys.exit(0 if n else 1)"
    )
    assert run_here([sys.executable, "-c", script, str(tmp_path)], tmp_path, restarts=3) == 0
    assert len(list(tmp_path.glob("start*"))) == 2 and "start 2 of 4" in capfd.readouterr().err
    (tmp_path / "run.json").write_text(json.dumps({"status": "stopped"}))
    assert run_here([sys.executable, "-c", "raise SystemExit(1)"], tmp_path, restarts=3) == 75
    (tmp_path / "run.json").write_text(json.dumps({"status": "running"}))
    assert run_here([sys.executable, "-c", "raise SystemExit(1)"], tmp_path, restarts=1) == 1


def test_a_preempted_node_stops_its_run_and_asks_again(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    script = (
        "import json, pathlib, signal, sys, time; p = pathlib.Path(sys.argv[1])\n"
        "def stop(*_): (p / 'run.json').write_text(json.dumps({'status': 'stopped'})); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop); (p / 'ready').touch(); time.sleep(60)"
    )
    task = NodeTask([sys.executable, "-c", script, str(tmp_path)], 1, str(tmp_path), True)
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(task()))
    thread.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    again = task.checkpoint()
    thread.join(20)
    assert isinstance(again, submitit.helpers.DelayedSubmission) and ended == [75]
    assert NodeTask([], 1, str(tmp_path), requeue=False).checkpoint() is None


def test_trackers_get_every_number_and_cannot_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    told: list[dict[str, float]] = []

    def log(values: dict[str, float]) -> None:
        if len(told) == 3:
            raise OSError("no network")
        told.append(values)

    settings: dict[str, object] = {}
    fake = SimpleNamespace(init=lambda **given: settings.update(given) or SimpleNamespace(log=log))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    listen = follow(["wandb"], tmp_path, "run", {"seed": 1})
    assert settings["mode"] == "offline"
    for step in (1, 2, 3):
        listen({"kind": "train", "stage": 2, "step": step, "loss": 0.5, "lr": 1e-3, "layer_error": [1.0]})
    assert told[0] == {"train/stage-2/loss": 0.5, "step": 1} and len(told) == 3
    assert capsys.readouterr().err.count("wandb is left out") == 1
    with pytest.raises(RadladsError, match="R101"):
        follow(["carrier-pigeon"], tmp_path, "run", {})
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(RadladsError, match="R104"):
        follow(["trackio"], tmp_path, "run", {})


@pytest.mark.slow
def test_torchrun_trains_on_two_processes_and_stops_at_a_signal(tmp_path: Path) -> None:
    tiny_teacher(tmp_path / "teacher", "qwen3", tie_embeddings=True)
    (tmp_path / "text.txt").write_text("Once upon a time there was a little house by the sea. " * 200)
    values = ["data.train=[text.txt]", "data.valid=[text.txt]", "eval.tokens=256", "eval.seq_len=32", "eval.new_tokens=2"]
    values += [f"stages.{i}.{v}" for i in range(3) for v in ("tokens=2560", "seq_len=32", "batch_size=2", "save_every=5")]
    line = [sys.executable, "-m", "radlads", "launch", "tiny", "--teacher", "teacher", "--output-dir", "run"]
    line += ["--gpus-per-node", "2", *(f"--set={value}" for value in values)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(line, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") > 12:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err[-3000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped"
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Student after stage 3" in done.stdout and done.stdout.count("radlads chat run/model") == 1
