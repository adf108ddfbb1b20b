"""One loop for every stage: samples, loss, optimiser step, record, checkpoint. What is minimised stands in objectives."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from radlads.backends.torch.checkpoint import last_checkpoint, save_checkpoint
from radlads.backends.torch.model import Model
from radlads.backends.torch.objectives import objective, weight
from radlads.backends.torch.optim import Optimizer, trainable
from radlads.data.samples import Corpus
from radlads.errors import fail
from radlads.recipe import Stage
from radlads.runs import Run

# Steps in a row whose loss or gradient is not finite before the run is given up.
MAX_SKIPPED = 10


@dataclass(frozen=True)
class Progress:
    """What the screen shows after each step; `seconds_left` is for this stage."""

    stage: Stage
    step: int
    loss: float
    tokens_per_second: float
    seconds_left: float


def run_stage(
    stage: Stage,
    student: Model,
    teacher: Model | None,
    corpus: Corpus,
    run: Run,
    report: Callable[[Progress], None],
    stopping: Callable[[], bool] = lambda: False,
) -> bool:
    """Train `student` in place through `stage`, resuming from the run's last checkpoint of it.

    Returns False when `stopping()` asked to stop: everything is saved then. Raises R404 when the loss stays non-finite.
    """
    device = next(student.parameters()).device
    parameters = trainable(student, stage.train)
    optimizer = Optimizer(parameters, stage)
    first = resume(stage, student, optimizer, run)
    drawn = corpus.samples(stage.seq_len, run.recipe.seed + stage.number, stage.packing)
    student.train()
    began, skipped = time.perf_counter(), 0
    for step in range(first, stage.steps):
        if stopping():
            save(stage, step, optimizer, run)
            return False
        samples = torch.from_numpy(drawn.batch(step * stage.batch_size, stage.batch_size)).to(device)
        loss, layer_error = accumulate(stage, student, teacher, samples)
        rate, norm = optimizer.step(step)
        finite = norm == norm and abs(norm) != float("inf")
        skipped = 0 if finite else skipped + 1
        done = step + 1
        elapsed = max(time.perf_counter() - began, 1e-9)
        speed = (done - first) * stage.tokens_per_step / elapsed
        record: dict[str, Any] = {"kind": "train", "stage": stage.number, "step": done, "tokens": done * stage.tokens_per_step}
        record |= {"loss": loss, "lr": rate, "grad_norm": norm, "tok_s": round(speed)}
        if layer_error is not None:
            record["layer_error"] = [round(value, 6) for value in layer_error.tolist()]
        if not finite:
            record["skipped"] = [step * stage.batch_size, done * stage.batch_size]
        run.log(record)
        if skipped >= MAX_SKIPPED:
            why = f"{skipped} steps in a row had a loss or gradient that is not finite"
            raise fail("R404", where=f"stage {stage.number}, step {done}", why=why, fix="Lower the learning rate")
        report(Progress(stage, done, loss, speed, (stage.steps - done) * elapsed / (done - first)))
        if stage.save_every and done % stage.save_every == 0 and done < stage.steps:
            save(stage, done, optimizer, run)
    student.eval()
    return True


def accumulate(stage: Stage, student: Model, teacher: Model | None, samples: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """Forward and backward over `samples` in micro-batches; the mean loss and, in step 1, the error of each layer."""
    losses, errors = [], []
    total = max(1, weight(stage, samples))
    for part in samples.split(stage.micro_batch):
        found, share = objective(stage, student, teacher, part), weight(stage, part) / total
        (found.loss * share).backward()
        losses.append(found.loss.detach() * share)
        if found.layer_error is not None:
            errors.append(found.layer_error * share)
    return float(torch.stack(losses).sum()), torch.stack(errors).sum(0) if errors else None


def save(stage: Stage, step: int, optimizer: Optimizer, run: Run) -> None:
    """A checkpoint after `step` steps of `stage`."""
    record = {"stage": stage.number, "step": step, "updates": optimizer.updates, "recipe": run.recipe.fingerprint()}
    save_checkpoint(run.checkpoints, optimizer.tensors(), record)


def resume(stage: Stage, student: Model, optimizer: Optimizer, run: Run) -> int:
    """Take up the last good checkpoint of `stage`, forgetting later metrics; returns the step to go on from."""
    found = last_checkpoint(run.checkpoints, stage.number)
    step = 0
    if found is not None and found[1]["recipe"] == run.recipe.fingerprint():
        tensors, record = found
        optimizer.restore(tensors, record["updates"])
        step = int(record["step"])
    run.truncate_metrics(stage.number, step)
    return step
