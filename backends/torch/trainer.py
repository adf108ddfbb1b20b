"""One loop for every stage: samples, loss, optimiser step, record, checkpoint. What is minimised stands in objectives.

It is the same for one process and for many: each takes its part of the same global batch, and what is logged is global.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from radlads.backends.torch.checkpoint import Checkpoints
from radlads.backends.torch.compiled import compiled_layers
from radlads.backends.torch.graphed import Graphed
from radlads.backends.torch.kernels.kl import TopK
from radlads.backends.torch.load import DTYPES
from radlads.backends.torch.objectives import weight
from radlads.backends.torch.optim import Optimizer, Update, trainable
from radlads.backends.torch.parallel import Task, copies_of, local_batch, local_of, recomputed, sharded
from radlads.backends.torch.watchdog import Watchdog
from radlads.backends.torch.world import World, leave_at_once
from radlads.data.samples import Corpus
from radlads.data.targets import Targets
from radlads.demo import resolve
from radlads.errors import fail
from radlads.recipe import Parallel, Stage
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
        world.keep_copies(copies_of(how, world))
        self.stage, self.task, self.run, self.world = stage, task, run, world
        self.sequence = how.sharing(stage.kind) if world.size > 1 else 1
        self.count, micro = local_batch(stage, world, self.sequence)
        self.micro = min(micro, run.micro_batch(stage.number) or micro)
        self.drawn = corpus.samples(stage.seq_len, run.recipe.seed + stage.number, stage.packing)
        self.targets: Targets | None = None
        if stage.kind == "distill" and task.pair[1] is None:
            if self.sequence > 1:
                fix = "Leave out parallel.sequence.distill, or data.teacher_cache"
                raise fail("R102", where="data.teacher_cache", why="it has whole sequences, not parts of them", fix=fix)
            self.targets = Targets(self.drawn, [resolve(path) for path in run.recipe.data.teacher_cache], stage)
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
        gather = world.sum_of_shards if world.shards > 1 else None
        self.optimizer = Optimizer(self.shards, stage, how.moments, how.masters, gather)
        self.split_heads = how.vocab_heads and world.size > 1 and stage.kind != "align"
        self.checkpoints = Checkpoints(run.checkpoints, world)
        self.graphed: Graphed | None = None
        if can_be_graphed(task, how, world) and self.targets is None:
            self.graphed = Graphed(self.forward_backward, list(self.parameters.values()))

    def samples(self, step: int) -> Tensor:
        """This process's samples (n, T + 1) of step `step`, in the CPU's memory.

        The global batch is the same for any number of processes.
        """
        group = self.world.rank // self.sequence
        found = torch.from_numpy(self.drawn.batch(step * self.stage.batch_size + group * self.count, self.count))
        if self.chain is not None:
            from radlads.backends.torch.sequence import stretch

            found = stretch(found, self.chain)
        return found.pin_memory() if self.world.device.type == "cuda" else found

    def predicted(self, step: int) -> TopK | None:
        """What the teacher predicts on this process's samples of step `step`, where that is kept; in the CPU's memory."""
        if self.targets is None:
            return None
        first = step * self.stage.batch_size + self.world.rank * self.count
        return TopK(*map(torch.from_numpy, self.targets.batch(first, self.count)))

    def accumulate(self, samples: Tensor, targets: TopK | None = None) -> Tensor:
        """Forward and backward over `samples` in micro-batches: global mean loss and, in step 1, each layer's error (1 + L').

        On the device, and nobody waits for it: what must be counted is counted on the CPU.
        """
        # Every token that counts weighs the same, wherever it is. FSDP takes the mean over processes; whole gradients are added.
        averaged = self.world.size if self.task.units else 1
        total = max(1, self.world.sum(weight(self.stage, samples))) / averaged
        parts, found = samples.split(self.micro), []
        for index, part in enumerate(parts):
            self.task.before_micro_batch(index == len(parts) - 1)
            share = weight(self.stage, part) / total
            if self.split_heads:  # the loss is that of all processes already
                share = self.world.sum(weight(self.stage, part)) / (total * self.world.size)
            rows = slice(index * self.micro, (index + 1) * self.micro)
            some = None if targets is None else targets.part(rows, self.world.device)
            found.append(self.micro_batch(part, share, index == 0, some))
        if self.chain is not None:
            self.chain.finish()
        of_all = torch.stack(found).sum(0)
        grads = [] if self.task.units else [p.grad for p in self.parameters.values() if p.grad is not None]
        self.world.add([of_all, *grads])
        return of_all / averaged

    def micro_batch(self, sample: Tensor, share: float, first: bool, targets: TopK | None = None) -> Tensor:
        """Forward and backward of one micro-batch with a `share` in the step: what `accumulate` returns, of this part."""
        if self.graphed is not None:
            try:
                return self.graphed(sample, share, first)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if self.graphed.graphs:
                    raise
                note = f"not recorded as a CUDA graph: {str(error).splitlines()[0]}"
                self.run.log({"kind": "note", "stage": self.stage.number, "text": note})
                self.graphed = None
                self.forget_gradients()
        return self.forward_backward(sample.to(self.world.device, non_blocking=True), share, targets)

    def forward_backward(self, sample: Tensor, share: Tensor | float, targets: TopK | None = None) -> Tensor:
        """Gradients of one micro-batch times its share, and its loss and errors times it."""
        loss, layer_error = self.task(sample, targets)
        (loss * share).backward()
        found = loss.detach().float()[None]
        return (found if layer_error is None else torch.cat([found, layer_error.float()])) * share

    def gradients(self, samples: Tensor, targets: TopK | None = None) -> Tensor:
        """`accumulate`, with half the micro-batch as often as memory runs out."""
        while True:
            try:
                return self.accumulate(samples, targets)
            except torch.OutOfMemoryError as error:
                self.halve(error)

    def forget_gradients(self) -> None:
        """Leave nothing of a micro-batch that was not finished."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def halve(self, error: Exception) -> None:
        """Half the micro-batch for the rest of the run; R403 where there is nothing to halve or other processes wait."""
        if self.micro == 1:
            raise fail("R403", where=f"stage {self.stage.number}", why=str(error).split("\n")[0], fix="See `radlads plan --fit`")
        smaller = next(size for size in range(self.micro // 2, 0, -1) if self.count % size == 0)
        self.run.set_micro_batch(self.stage.number, smaller)
        if self.world.size > 1:
            # The others are in the middle of a collective: a new start is the only safe way back.
            why = f"a micro-batch of {self.micro} does not fit; {smaller} is noted for the next start"
            leave_at_once()
            raise fail("R403", where=f"rank {self.world.rank}", why=why, fix="Run the same command again")
        note = f"out of memory: micro-batch {self.micro} -> {smaller}"
        self.run.log({"kind": "note", "stage": self.stage.number, "text": note})
        self.micro = smaller
        self.forget_gradients()
        if self.graphed is not None:
            self.graphed = Graphed(self.forward_backward, list(self.parameters.values()))
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def update(self, step: int) -> Update:
        """The optimiser's step from the gradients there are."""
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
        with compiled_layers(*models, wanted=wanted, by_part=bool(task.units) or again), recomputed(task.student, again):
            return steps(parts, parts.resume(), report, stopping, watchdog, measure)
    except RuntimeError as error:
        world.lost(error)
    finally:
        watchdog.stop()
        for handle in parts.links:
            handle.remove()


def can_be_graphed(task: Task, how: Parallel, world: World) -> bool:
    """Whether micro-batches do the same operations whatever their samples are, in memory that stays where it is.

    Other processes must have no part in them: all weights are here, and no states come from elsewhere.
    """
    models = [model for model in task.pair if model is not None]
    whole = not any(sharded(parameter) for model in models for parameter in model.parameters())
    alone = whole and (world.size == 1 or how.sharing(task.stage.kind) == 1)
    fixed = task.stage.packing == "stream" and not task.recomputes
    return how.cuda_graphs == "auto" and world.device.type == "cuda" and alone and fixed


def steps(
    parts: StageRun,
    first: int,
    report: Callable[[Progress], None],
    stopping: Callable[[], bool],
    watchdog: Watchdog,
    measure: Callable[[int], None],
) -> bool:
    """The loop itself, from step `first`."""
    stage, world = parts.stage, parts.world
    log = StepLog(parts, first, report, watchdog)
    for step in range(first, stage.steps):
        if world.any(stopping()):
            log.finish()
            parts.save(step)
            parts.checkpoints.finish()
            return False
        found = parts.gradients(parts.samples(step), parts.predicted(step))
        log.add(step, found, parts.update(step))
        done = step + 1
        if stage.measured_after(done):
            log.finish()
            measure(done)
            log.before = time.perf_counter()  # is no part of the next step
        if stage.save_every and done % stage.save_every == 0 and done < stage.steps:
            log.finish()
            parts.save(done)
    log.finish()
    parts.checkpoints.finish()
    parts.task.release()
    parts.task.eval()
    return True


class StepLog:
    """Records of steps. On a GPU that of a step is written while the next one runs: nobody waits for its numbers."""

    def __init__(self, parts: StageRun, first: int, report: Callable[[Progress], None], watchdog: Watchdog) -> None:
        self.parts, self.first, self.report, self.watchdog = parts, first, report, watchdog
        self.began = self.before = time.perf_counter()
        self.skipped = 0
        self.pending: deque[tuple[int, float, Tensor, bool, Any]] = deque()

    def add(self, step: int, found: Tensor, update: Update) -> None:
        """The numbers of step `step` are on their way from the device; those of the step before are written."""
        counted = [] if update.lost is None else [update.lost.double()[None]]
        numbers = torch.cat([update.norm.double()[None], *counted, found.double()]).to("cpu", non_blocking=True)
        event = None
        if found.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self.pending.append((step, update.rate, numbers, bool(counted), event))
        self.finish(leaving=1 if found.is_cuda else 0)

    def finish(self, leaving: int = 0) -> None:
        """Write the records of all steps but the last `leaving`. Raises R404 after too many that were not finite."""
        while len(self.pending) > leaving:
            step, rate, numbers, counted, event = self.pending.popleft()
            if event is not None:
                event.synchronize()
            norm, *rest = numbers.tolist()
            self.write(step, rate, norm, int(rest.pop(0)) if counted else None, rest)

    def write(self, step: int, rate: float, norm: float, lost: int | None, found: list[float]) -> None:
        """The record of one step: `found` is its loss and, in step 1, the error of each layer."""
        parts, stage, done = self.parts, self.parts.stage, step + 1
        finite = math.isfinite(norm)
        self.skipped = 0 if finite else self.skipped + 1
        now = time.perf_counter()
        elapsed, took = max(now - self.began, 1e-9), now - self.before
        self.before = now
        speed = (done - self.first) * stage.tokens_per_step / elapsed
        record: dict[str, Any] = {"kind": "train", "stage": stage.number, "step": done, "tokens": done * stage.tokens_per_step}
        record |= {"loss": found[0], "lr": rate, "grad_norm": norm, "tok_s": round(speed), "step_s": round(took, 5)}
        if lost is not None:
            record["lost_updates"] = lost
        if len(found) > 1:
            record["layer_error"] = [round(value, 6) for value in found[1:]]
        if not finite:
            record["skipped"] = [step * stage.batch_size, done * stage.batch_size]
        parts.run.log(record)
        self.watchdog.beat()
        if self.skipped >= MAX_SKIPPED:
            why = f"{self.skipped} steps in a row had a loss or gradient that is not finite"
            raise fail("R404", where=f"stage {stage.number}, step {done}", why=why, fix="Lower the learning rate")
        self.report(Progress(stage, done, found[0], speed, (stage.steps - done) * elapsed / (done - self.first)))
