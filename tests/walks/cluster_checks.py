"""What test_cluster.py looks at: runs of 2 processes that are killed, stopped and hung, and go on with 1 and 2 in other ways."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Imported before the fork, once for all processes.
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor  # noqa: F401

import radlads.backends.torch.convert_run
import radlads.report  # noqa: F401
from radlads.backends.torch.trainer import StageRun
from radlads.backends.torch.world import join_world
from radlads.cli.main import main
from radlads.runs import read_metrics
from tests.models import tiny_teacher
from tests.processes import start, wait

RECIPE = """
name: cluster
teacher: teacher
student: {arch: rwkv7}
data: {train: [text.txt], valid: [text.txt]}
eval: {tokens: 64, seq_len: 32, new_tokens: 2}
stages:
  - {kind: align, tokens: 1024, seq_len: 32, batch_size: 4, lr: 3e-4, warmup_steps: 2, save_every: 3}
  - {kind: distill, tokens: 1024, seq_len: 32, batch_size: 4, micro_batch: 1, lr: 3e-5, warmup_steps: 2, save_every: 3,
     measure_every: 7}
"""
STEPS = 16  # of both stages


def run(*arguments: str) -> int:
    """One `radlads train`; the status is what the process ends with."""
    return main(["train", "cluster.yaml", "--quiet", *arguments])


def begin(name: str, size: int, folder: Path, *more: str) -> list[int]:
    """Start `size` processes of the run `name`."""
    return start(size, run, "--output-dir", name, *more, results=folder / name, quiet=True)


def losses(name: str) -> list[tuple[int, int, float]]:
    """(stage, step, loss) of every step of a run."""
    return [(r["stage"], r["step"], r["loss"]) for r in read_metrics(name) if r["kind"] == "train"]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for a condition, as closely as the machine allows."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)


def steps_of(name: str) -> int:
    """Lines of a run's metrics."""
    path = Path(name, "metrics.jsonl")
    return path.read_bytes().count(b"\n") if path.exists() else 0


def saving(name: str) -> bool:
    """Whether a checkpoint is being written, and it is not the first."""
    names = [path.name for path in Path(name, "checkpoints").glob("*")] + [
        path.name for path in Path(name, "checkpoints").glob(".*.partial")
    ]
    return any(n.endswith(".partial") for n in names) and any(n.startswith("stage-") for n in names)


def hang(rank: int, step: int, *arguments: str) -> int:
    """A run in which one process stops moving."""
    samples = StageRun.samples

    def stuck(parts: StageRun, at: int) -> Any:
        if parts.world.rank == rank and at == step:
            time.sleep(600)
        return samples(parts, at)

    StageRun.samples = stuck  # type: ignore[method-assign]
    return run(*arguments)


def poisoned(step: int, *arguments: str) -> int:
    """A run in which the gradient of one step is NaN in one process."""
    accumulate = StageRun.accumulate

    def spoiled(parts: StageRun, *given: Any) -> Any:
        found = accumulate(parts, *given)
        parts.seen = getattr(parts, "seen", 0) + 1  # type: ignore[attr-defined]
        if parts.world.rank == 1 and parts.seen == step:  # type: ignore[attr-defined]
            for parameter in parts.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(float("nan"))
        return found

    StageRun.accumulate = spoiled  # type: ignore[method-assign]
    return run(*arguments)


def stopped_for_good() -> None:
    """One process is frozen, while the other waits for it in a call that nothing ends."""
    world = join_world("cpu")
    world.look_out(gone=4)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def checks(folder: Path) -> dict[str, Any]:
    """Exit statuses and losses by what was done to a run."""
    os.chdir(folder)
    tiny_teacher(folder / "teacher", "qwen3", tie_embeddings=True)
    (folder / "text.txt").write_text("Once upon a time there was a little house by the sea. The cat said: it is high. " * 100)
    (folder / "cluster.yaml").write_text(RECIPE)
    found: dict[str, Any] = {}
    found["whole"] = (wait(begin("whole", 2, folder)), losses("whole"))
    # One process is killed, at a step and in the middle of a save; the other must notice.
    kills: list[tuple[int, float]] = []
    for attempt, ready in enumerate((lambda: steps_of("killed") >= 9, lambda: saving("killed"))):
        pids = begin("killed", 2, folder)
        until(ready)
        os.kill(pids[1 - attempt % 2], signal.SIGKILL)
        began = time.monotonic()
        statuses = wait(pids)
        kills.append((statuses[attempt % 2], time.monotonic() - began))
    message = (folder / "killed.err0").read_text() + (folder / "killed.err1").read_text()
    found["killed"] = (kills, message, wait(begin("killed", 2, folder)), losses("killed"))
    # Stopped on 2, taken up by 1, stopped again, taken up by 2, and by 2 with whole weights; the signal reaches one process.
    stops = []
    for size, lines in ((2, 9), (1, 16), (2, 19)):
        pids = begin("stopped", size, folder)
        until(lambda: steps_of("stopped") >= lines)  # noqa: B023
        os.kill(pids[-1], signal.SIGTERM)
        stops.append(wait(pids))
    statuses = wait(begin("stopped", 2, folder, "--set=parallel.layout=replicated"))
    measured = [(r["stage"], r["step"]) for r in read_metrics("stopped") if r["kind"] == "curve"]
    found["stopped"] = (stops, statuses, losses("stopped"), measured)
    limited = ("--output-dir", "hung", "--set=parallel.hang_timeout=10")
    pids = start(2, hang, 1, 5, *limited, results=folder / "hung", quiet=True)
    statuses = wait(pids)
    stacks = {path.name: path.read_text() for path in Path("hung", "stacks").glob("*.txt")}
    found["hung"] = (statuses, stacks)
    pids = start(2, stopped_for_good, results=folder / "frozen", quiet=True)
    frozen = wait(pids[:1])
    os.kill(pids[1], signal.SIGKILL)
    found["frozen"] = (frozen + wait(pids[1:]), (folder / "frozen.err0").read_text())
    wait(start(2, poisoned, 4, "--output-dir", "poisoned", results=folder / "poisoned", quiet=True))
    found["poisoned"] = read_metrics("poisoned")
    return found
