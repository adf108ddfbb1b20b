"""`radlads train` in 2 processes: killed, stopped, hung and poisoned, and what it is when it goes on."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.walks.cluster_checks import STEPS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What cluster_checks did and saw."""
    out = tmp_path_factory.mktemp("cluster") / "found.pickle"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.processes", "tests.walks.cluster_checks", str(out)]
    done = subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=900, check=False)
    errors = "".join(path.read_text() for path in out.parent.glob("*.err*"))
    assert done.returncode == 0, done.stderr[-3000:] + errors[-3000:]
    return {**pickle.loads(out.read_bytes()), "errors": errors}


def test_two_processes_train_a_whole_recipe(found: dict[str, Any]) -> None:
    statuses, losses = found["whole"]
    assert statuses == [0, 0], found["errors"][-3000:]
    assert [(stage, step) for stage, step, _ in losses] == [(n, s) for n in (1, 2) for s in range(1, STEPS // 2 + 1)]


def test_a_killed_process_ends_the_run_and_it_resumes_identically(found: dict[str, Any]) -> None:
    kills, message, statuses, losses = found["killed"]
    for status, seconds in kills:
        assert status == 1 and seconds < 60
    assert "R406" in message and "goes on from the last checkpoint" in message and "Traceback" not in message
    assert statuses == [0, 0] and losses == found["whole"][1]


def test_a_stopped_run_goes_on_with_any_number_of_processes(found: dict[str, Any]) -> None:
    stops, statuses, losses, measured = found["stopped"]
    assert stops == [[75, 75], [75], [75, 75]] and statuses == [0, 0]
    assert [loss[:2] for loss in losses] == [loss[:2] for loss in found["whole"][1]]
    for one, other in zip(losses, found["whole"][1], strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-6)
    assert measured == [(2, 7)]  # by those that had whole weights


def test_a_hung_process_is_noticed_and_its_stack_saved(found: dict[str, Any]) -> None:
    statuses, stacks = found["hung"]
    assert statuses == [1, 1] and set(stacks) == {"rank-0.txt", "rank-1.txt"}
    assert "in stuck" in stacks["rank-1.txt"] and "in stuck" not in stacks["rank-0.txt"]


def test_a_frozen_process_ends_the_others_whatever_they_wait_for(found: dict[str, Any]) -> None:
    statuses, message = found["frozen"]
    assert statuses == [1, -9] and "R406" in message and "rank 1 has given no sign of life" in message


def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_all(found: dict[str, Any]) -> None:
    skipped = [r for r in found["poisoned"] if "skipped" in r]
    # step 4 of each stage, with the samples of its global batch
    assert [(r["stage"], r["step"], r["skipped"]) for r in skipped] == [(1, 4, [12, 16]), (2, 4, [12, 16])]
    assert all(r["loss"] is not None for r in found["poisoned"] if r["kind"] == "train")
