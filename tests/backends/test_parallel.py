"""A training spread over 2 or 4 processes is the training of one: losses, gradients and weights, for every way to spread it."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backends.parallel_checks import SPREAD, STEPS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What parallel_checks computed, in processes of its own."""
    out = tmp_path_factory.mktemp("parallel") / "found.pickle"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.processes", "tests.backends.parallel_checks", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {**pickle.loads(out.read_bytes()), "stderr": done.stderr}


@pytest.mark.parametrize("name", SPREAD)
def test_spread_training_equals_one_process(found: dict[str, Any], name: str) -> None:
    spread, alone = found[name], found[SPREAD[name][0]]
    assert not isinstance(spread, Exception), f"{spread}\n{found['stderr'][-4000:]}"
    assert len(spread["records"]) == len(alone["records"]) == STEPS
    for one, many in zip(alone["records"], spread["records"], strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-6)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-6)
        assert many.get("layer_error") == pytest.approx(one.get("layer_error"), abs=2e-6)
    assert spread["gradients"].keys() == alone["gradients"].keys() != set()
    for tensor, wanted in alone["gradients"].items():
        error = (spread["gradients"][tensor] - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert error <= 2e-6, tensor
    for tensor, wanted in alone["weights"].items():
        # AdamW moves a weight whose gradient is rounding noise by a full step, whichever way the noise points.
        assert (spread["weights"][tensor] - wanted).abs().max() <= STEPS * 2e-4, tensor
        assert (spread["weights"][tensor] - wanted).norm() <= 1e-5 * wanted.norm().clamp(min=1e-3), tensor


def test_weights_without_masters_are_rounded_alike_in_all_processes(found: dict[str, Any]) -> None:
    (alone,), (first, second) = found["rounded, 1"], found["rounded, 2"]
    for tensor, wanted in first["weights"].items():
        assert torch.equal(second["weights"][tensor], wanted), tensor
        assert torch.equal(wanted.bfloat16().float(), wanted), tensor
        # One update of 1e-4 each at most, and the spacing of bfloat16.
        gap = (alone["weights"][tensor] - wanted).abs()
        assert (gap <= STEPS * 2e-4 + 2**-7 * wanted.abs()).all(), tensor
    for one, many in zip(alone["records"], first["records"], strict=True):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.slow
def test_gpus_train_as_one(tmp_path: Path) -> None:
    """SmolLM2's shape in float32 on two GPUs over NCCL, or in two processes on one over gloo, against one process."""
    ways = ["--layouts", "replicated,optimizer"] if torch.cuda.device_count() > 1 else ["--share", "--layouts", "replicated"]
    found = equal_on_two(tmp_path, *ways)
    assert len([r for r in found if "loss_difference" in r]) == (8 if torch.cuda.device_count() > 1 else 4)
    for result in found:
        assert "failed" not in result, result
        assert result.get("loss_difference", 0) <= 1e-6 and result.get("norm_difference", 0) <= 2e-6, result
        assert "graphs" not in result or (result["graphs"] > 0) == (result["layout"] == "replicated" or result["processes"] == 1)


def equal_on_two(folder: Path, *ways: str) -> list[dict[str, Any]]:
    """What bench/scale.py finds for steps 1 and 2, whole and four layers of it."""
    out = folder / "found.jsonl"
    asked = ["--only", "equal", "--shape", "smollm2-135m", "--kinds", "align,distill", "--out", str(out), *ways]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "bench/scale.py", *asked], cwd=ROOT, env=environment, check=True, timeout=600)
    return [json.loads(line) for line in out.read_text().splitlines()]
