"""One loop for every stage: samples, loss, optimiser step, record, checkpoint. What is minimised stands in objectives.

It is the same for one process and for many: each takes its part of the same global batch, and what is logged is global.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from radlads.backends.torch.checkpoint import Checkpoints
from radlads.backends.torch.compiled import compiled_layers
from radlads.backends.torch.load import DTYPES
from radlads.backends.torch.objectives import weight
from radlads.backends.torch.optim import Optimizer, trainable
from radlads.backends.torch.parallel import Task, local_batch, local_of, recomputed, sharded
from radlads.backends.torch.watchdog import Watchdog
from radlads.backends.torch.world import World
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


class StageRun:
    """The parts of one stage: its task, its optimiser, and which samples of every step are this process's."""

    def __init__(self, stage: Stage, task: Task, corpus: Corpus, run: Run, world: World) -> None:
        how = run.recipe.parallel
        self.stage, self.task, self.run, self.world = stage, task, run, world
        self.sequence = how.sharing(stage.kind) if world.size > 1 else 1
        self.count, micro = local_batch(stage, world, self.sequence)
        self.micro = min(micro, run.micro_batch(stage.number) or micro)
        self.drawn = corpus.samples(stage.seq_len, run.recipe.seed + stage.number, stage.packing)
        self.chain: Any = None
        self.links: list[Any] = []
        if self.sequence > 1:
            from radlads.backends.torch.sequence import Chain, link

            self.chain = Chain(world, self.sequence)
            for model in task.pair:
                if model is not None:
                    self.links += link(model, self.chain, DTYPES[run.recipe.precision])
        self.parameters = trainable(task.student, stage.train)
        # The optimiser sees plain tensors: the shards of this process, in the memory that FSDP gathers from.
        self.shards = {name: nn.Parameter(local_of(p)) if sharded(p) else p for name, p in self.parameters.items()}
        self.optimizer = Optimizer(self.shards, stage, how.moments, *([self.total_norm] if world.size > 1 else []))
        self.split_heads = how.vocab_heads and world.size > 1 and stage.kind != "align"
        self.checkpoints = Checkpoints(run.checkpoints, world)

    def samples(self, step: int) -> Tensor:
        """This process's samples (n, T + 1) of step `step`; the global batch is the same for any number of processes."""
        group = self.world.rank // self.sequence
        found = torch.from_numpy(self.drawn.batch(step * self.stage.batch_size + group * self.count, self.count))
        if self.chain is not None:
            from radlads.backends.torch.sequence import stretch

            found = stretch(found, self.chain)
        return found.to(self.world.device)

    def accumulate(self, samples: Tensor) -> tuple[float, Tensor | None]:
        """Forward and backward over `samples` in micro-batches; global mean loss and, in step 1, the error of each layer."""
        losses, errors = [], []
        # Every token that counts weighs the same, wherever it is; FSDP then takes the mean over processes.
        total = max(1, self.world.sum(weight(self.stage, samples))) / self.world.size
        parts = samples.split(self.micro)
        for index, part in enumerate(parts):
            self.task.before_micro_batch(index == len(parts) - 1)
            loss, layer_error = self.task(part)
            share = weight(self.stage, part) / total
            if self.split_heads:  # the loss is that of all processes already
                share = self.world.sum(weight(self.stage, part)) / (total * self.world.size)
            (loss * share).backward()
            losses.append(loss.detach().float() * share)
            if layer_error is not None:
                errors.append(layer_error * share)
        if self.chain is not None:
            self.chain.finish()
        found = [torch.stack(losses).sum()[None], *([torch.stack(errors).sum(0)] if errors else [])]
        loss, *layers = self.world.mean(torch.cat(found)).split([1, *map(len, found[1:])])
        return float(loss), layers[0] if layers else None

    def gradients(self, samples: Tensor) -> tuple[float, Tensor | None]:
        """`accumulate`, with half the micro-batch as often as memory runs out."""
        while True:
            try:
                return self.accumulate(samples)
            except torch.OutOfMemoryError as error:
                self.halve(error)

    def halve(self, error: Exception) -> None:
        """Half the micro-batch for the rest of the run; R403 where there is nothing to halve or other processes wait."""
        if self.micro == 1:
            raise fail("R403", where=f"stage {self.stage.number}", why=str(error).split("\n")[0], fix="See `radlads plan --fit`")
        smaller = next(size for size in range(self.micro // 2, 0, -1) if self.count % size == 0)
        self.run.set_micro_batch(self.stage.number, smaller)
        if self.world.size > 1:
            # The others are in the middle of a collective: a new start is the only safe way back.
            why = f"a micro-batch of {self.micro} does not fit; {smaller} is noted for the next start"
            raise fail("R403", where=f"rank {self.world.rank}", why=why, fix="Run the same command again")
        note = f"out of memory: micro-batch {self.micro} -> {smaller}"
        self.run.log({"kind": "note", "stage": self.stage.number, "text": note})
        self.micro = smaller
        for parameter in self.parameters.values():
            parameter.grad = None
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def total_norm(self, grads: list[Tensor]) -> Tensor:
        """Norm of the gradients whose shards are given."""
        import torch.distributed as dist

        square = torch.nn.utils.get_total_norm(grads).float() ** 2
        dist.all_reduce(square)
        return square.sqrt()

    def update(self, step: int) -> tuple[float, float]:
        """The optimiser's step from the gradients there are: (learning rate, gradient norm)."""
        for name, parameter in self.parameters.items():
            shard: Any = self.shards[name]
            if shard is not parameter:
                grad: Any = parameter.grad
                shard.grad = None if grad is None else grad.to_local()
                parameter.grad = None
        return self.optimizer.step(step)

    def save(self, step: int) -> None:
        """Begin a checkpoint after `step` steps."""
        stage, updates = self.stage.number, self.optimizer.updates
        rows = self.task.student.spec.tensors()
        tensors = self.optimizer.tensors()
        shapes = {name: rows[name.partition(".")[2]].shape for name in tensors}
        record = {"stage": stage, "step": step, "updates": updates, "recipe": self.run.recipe.fingerprint()}
        record |= {"processes": self.world.size, "samples": step * self.stage.batch_size}
        self.checkpoints.save(tensors, shapes, record)

    def resume(self) -> int:
        """Take up the last good checkpoint of the stage, forgetting later metrics; returns the step to go on from."""
        found = self.checkpoints.last(self.stage.number)
        step = 0
        if found is not None and found[1]["recipe"] == self.run.recipe.fingerprint():
            tensors, record = found
            self.optimizer.restore(tensors, record["updates"])
            step = int(record["step"])
        self.run.truncate_metrics(self.stage.number, step)
        return step


def run_stage(
    stage: Stage,
    task: Task,
    corpus: Corpus,
    run: Run,
    report: Callable[[Progress], None],
    stopping: Callable[[], bool] = lambda: False,
    world: World | None = None,
    measure: Callable[[int], None] = lambda step: None,
) -> bool:
    """Train the student of `task` in place through `stage`, resuming from the run's last checkpoint of it.

    `measure` is called with the number of steps done, as often as the stage says.

    Returns False when `stopping()` asked any process to stop: everything is saved then. Raises R403 when one sequence does
    not fit the memory, R404 when the loss stays non-finite, R406 when another process is gone.
    """
    world = world or World()
    parts = StageRun(stage, task, corpus, run, world)
    watchdog = Watchdog(run.stacks, world.rank, run.recipe.parallel.hang_timeout)
    task.train()
    models = [model for model in task.pair if model is not None]
    wanted, again = run.recipe.parallel.compile == "auto" and world.device.type == "cuda", task.recomputes
    try:
        with compiled_layers(*models, wanted=wanted, by_part=world.size > 1 or again), recomputed(task.student, again):
            return steps(parts, parts.resume(), report, stopping, watchdog, measure)
    except RuntimeError as error:
        world.lost(error)
    finally:
        watchdog.stop()
        for handle in parts.links:
            handle.remove()


def steps(
    parts: StageRun,
    first: int,
    report: Callable[[Progress], None],
    stopping: Callable[[], bool],
    watchdog: Watchdog,
    measure: Callable[[int], None],
) -> bool:
    """The loop itself, from step `first`."""
    stage, run, world = parts.stage, parts.run, parts.world
    began, skipped = time.perf_counter(), 0
    before = began
    for step in range(first, stage.steps):
        if world.any(stopping()):
            parts.save(step)
            parts.checkpoints.finish()
            return False
        loss, layer_error = parts.gradients(parts.samples(step))
        rate, norm = parts.update(step)
        finite = math.isfinite(norm)
        skipped = 0 if finite else skipped + 1
        done, now = step + 1, time.perf_counter()
        elapsed = max(now - began, 1e-9)
        speed = (done - first) * stage.tokens_per_step / elapsed
        record: dict[str, Any] = {"kind": "train", "stage": stage.number, "step": done, "tokens": done * stage.tokens_per_step}
        record |= {"loss": loss, "lr": rate, "grad_norm": norm, "tok_s": round(speed), "step_s": round(now - before, 5)}
        before = now
        if layer_error is not None:
            record["layer_error"] = [round(value, 6) for value in layer_error.tolist()]
        if not finite:
            record["skipped"] = [step * stage.batch_size, done * stage.batch_size]
        run.log(record)
        watchdog.beat()
        if skipped >= MAX_SKIPPED:
            why = f"{skipped} steps in a row had a loss or gradient that is not finite"
            raise fail("R404", where=f"stage {stage.number}, step {done}", why=why, fix="Lower the learning rate")
        report(Progress(stage, done, loss, speed, (stage.steps - done) * elapsed / (done - first)))
        if stage.measure_every and done % stage.measure_every == 0 and done < stage.steps:
            measure(done)
            before = time.perf_counter()  # is no part of the next step
        if stage.save_every and done % stage.save_every == 0 and done < stage.steps:
            parts.save(done)
    parts.checkpoints.finish()
    parts.task.release()
    parts.task.eval()
    return True
