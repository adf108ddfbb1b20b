"""The loop of fine-tuning: updates, reports, validation, checkpoints; the same on both backends, and exact when resumed."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from radlads.adapters import Settings, write_adapter, write_peft
from radlads.engine import Engine
from radlads.errors import fail
from radlads.folder import ModelFolder
from radlads.runs import Run
from radlads.tensors import read_header, read_raw, write_weights
from radlads.tuning.examples import Batch, Batches
from radlads.tuning.settings import Tuning

# Adapter, optimiser, place of the run and losses not yet reported in one file, so that no kill can leave parts of two.
CHECKPOINT = "training.safetensors"
PLACE, SEEN, WINDOW = "iteration", "tokens", "window"
STORED = {"float32": "F32", "float64": "F64", "int32": "I32", "int64": "I64", "uint32": "U32", "uint64": "U64"}

Arrays = dict[str, npt.NDArray[Any]]


class Loss(NamedTuple):
    """Mean cross-entropy in nats over the tokens that count, and how many they are."""

    mean: float
    tokens: int


class Tuner(Protocol):
    """A model on a backend with the tensors that are trained; names and orientation are those of the adapter's file."""

    @property
    def device(self) -> str:
        """Where it computes."""

    def update(self, batches: list[Batch], rate: float, seed: int) -> list[Loss]:
        """One update from the mean gradient of the batches; `seed` is of the dropout. Returns the losses before it."""

    def loss(self, batch: Batch) -> Loss:
        """The loss of a batch, without dropout."""

    def gradients(self, batch: Batch) -> Arrays:
        """The gradient of a batch's mean loss in every tensor that is trained."""

    def tensors(self) -> Arrays:
        """What is trained, float32."""

    def load(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over tensors, all or some."""

    def moments(self) -> Arrays:
        """What the optimiser remembers."""

    def restore(self, moments: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over what an optimiser remembered."""


@dataclass(frozen=True)
class Phase:
    """What the screen calls the work and how long it is."""

    kind: str
    steps: int


@dataclass(frozen=True)
class Progress:
    """What the screen shows after each update."""

    stage: Phase
    step: int
    loss: float
    tokens_per_second: float
    seconds_left: float


@dataclass
class Course:
    """One run: a tuner, what it is fed, and where its records and files go."""

    tuner: Tuner
    tuning: Tuning
    settings: Settings
    folder: ModelFolder
    fingerprint: str
    run: Run
    train: Batches
    valid: Batches | None
    show: Callable[[Progress], None] = lambda progress: None
    say: Callable[[str], None] = lambda text: None
    seen: int = 0  # tokens trained on
    window: list[tuple[float, int, float]] = field(default_factory=list)  # loss, tokens, seconds since the last report

    def go(self, stopping: Callable[[], bool]) -> bool:
        """Train to the last iteration, from where a checkpoint left it; False when it was stopped, and saved, before."""
        done, each, total = self.resume(), self.tuning.grad_accumulation_steps, self.tuning.iters
        if done == 0:
            self.validate(0)
        began, start = time.monotonic(), done
        while done < total:
            clock = time.perf_counter()
            batches = [self.train.at(place) for place in range(done, done + each)]
            rate = self.tuning.rate(done // each)
            losses = self.tuner.update(batches, rate, self.tuning.seed + done)
            done += each
            if not all(math.isfinite(loss.mean) for loss in losses):
                why = f"the loss of iteration {done} is {losses[-1].mean}"
                fix = "Lower --learning-rate; the last checkpoint is kept, and the same command goes on from it"
                raise fail("R404", where=self.run.path, why=why, fix=fix)
            seconds = time.perf_counter() - clock
            self.window += [(loss.mean, loss.tokens, seconds / each) for loss in losses]
            if self.due(done, self.tuning.steps_per_report):
                self.report(done, rate)
            speed = sum(loss.tokens for loss in losses) / seconds
            left = (time.monotonic() - began) / (done - start) * (total - done)
            self.show(Progress(Phase("finetune", total), done, losses[-1].mean, speed, left))
            if self.due(done, self.tuning.steps_per_eval):
                self.validate(done)
            stop = stopping() and done < total
            if stop or self.due(done, self.tuning.save_every):
                self.save(done)
            if stop:
                return False
        return True

    def due(self, done: int, every: int) -> bool:
        """Whether something done every so many iterations falls into the last update; at the end everything does."""
        return done == self.tuning.iters or done // every > (done - self.tuning.grad_accumulation_steps) // every

    def report(self, done: int, rate: float) -> None:
        """Record the mean loss and the speed since the last report."""
        losses, tokens, seconds = zip(*self.window, strict=True)
        self.seen += sum(tokens)
        record = {"kind": "train", "step": done, "loss": sum(losses) / len(losses), "lr": rate, "tokens": self.seen}
        self.run.log({**record, "tok_s": sum(tokens) / sum(seconds), "it_s": len(losses) / sum(seconds)})
        self.window = []

    def validate(self, done: int) -> None:
        """Measure and record the loss of the validation examples."""
        if self.valid is not None and self.tuning.val_batches:
            loss = mean_loss(self.tuner, self.valid.spread(self.tuning.val_batches))
            self.run.log({"kind": "valid", "step": done, "loss": loss.mean, "tokens": loss.tokens})
            self.say(f"iteration {done}: validation loss {loss.mean:.4f}")

    def resume(self) -> int:
        """Iterations done before, with the tensors and moments after them; 0 for a new run."""
        path = self.run.path / CHECKPOINT
        if not path.exists():
            return 0
        arrays = {name: np.array(read_raw(entry)) for name, entry in read_header(path).items()}
        tensors = {name.removeprefix("adapter."): x for name, x in arrays.items() if name.startswith("adapter.")}
        known = self.tuner.tensors()
        if {name: x.shape for name, x in tensors.items()} != {name: x.shape for name, x in known.items()}:
            why = "its tensors are not those that are trained here"
            raise fail("R304", where=path, why=why, fix="Remove the file to start anew, or give another --adapter-path")
        self.tuner.load(tensors)
        self.tuner.restore({name.removeprefix("optimizer."): x for name, x in arrays.items() if name.startswith("optimizer.")})
        done, self.seen = int(arrays[PLACE]), int(arrays[SEEN])
        self.window = [(float(loss), int(tokens), float(seconds)) for loss, tokens, seconds in arrays[WINDOW]]
        self.run.truncate_metrics(-1, done)
        self.say(f"going on after iteration {done}")
        return done

    def save(self, done: int) -> None:
        """Write the checkpoint, then the adapter and, every `save_every` iterations, a numbered copy as mlx-lm has them."""
        tensors = self.tuner.tensors()
        window = np.array(self.window, np.float64).reshape(-1, 3)
        arrays: Arrays = {PLACE: np.array(done, np.int64), SEEN: np.array(self.seen, np.int64), WINDOW: window}
        arrays |= {f"adapter.{name}": x for name, x in tensors.items()}
        arrays |= {f"optimizer.{name}": x for name, x in self.tuner.moments().items()}
        plan = {name: (STORED[x.dtype.name], x.shape) for name, x in arrays.items()}
        write_weights(self.run.path / CHECKPOINT, ((name, plan[name][0], x) for name, x in arrays.items()), plan)
        every, each = self.tuning.save_every, self.tuning.grad_accumulation_steps
        self.write(tensors, f"{done:07d}_" if done // every > (done - each) // every else None)

    def write(self, tensors: Arrays, number: str | None = None) -> None:
        """The adapter in mlx-lm's format and, from torch, in peft's."""
        told = {"model": self.tuning.model, "num_layers": self.settings.layers, "data": self.tuning.data}
        dtype = self.folder.dtype if self.settings.kind == "full" else "F32"
        path, spec = self.run.path, self.folder.spec
        write_adapter(
            path, tensors, self.settings, spec, fingerprint=self.fingerprint, dtype=dtype, number=number, **told
        )  # fmt: skip
        if self.tuning.backend == "torch" and self.settings.kind in ("lora", "dora"):
            write_peft(path / "peft", tensors, self.settings, self.tuning.model)


def mean_loss(tuner: Tuner, batches: Iterable[Batch]) -> Loss:
    """The loss over all tokens of several batches."""
    losses = [tuner.loss(batch) for batch in batches]
    tokens = sum(loss.tokens for loss in losses)
    return Loss(sum(loss.mean * loss.tokens for loss in losses) / max(1, tokens), tokens)


def scored_loss(engine: Engine, batches: Iterable[Batch]) -> Loss:
    """The same of an engine, which scores each example by itself."""
    total, tokens = 0.0, 0
    for batch in batches:
        lengths = [int(np.flatnonzero(row)[-1]) + 1 for row in batch.counted]
        rows = zip(batch.inputs, batch.targets, lengths, strict=True)
        scores = engine.score([[int(first[0]), *map(int, rest[:length])] for first, rest, length in rows])
        for score, counted in zip(scores, batch.counted, strict=True):
            total -= float(score.logprobs[counted[: len(score.logprobs)]].astype(np.float64).sum())
            tokens += int(counted.sum())
    return Loss(total / max(1, tokens), tokens)


def checkpoint_of(path: Path) -> int:
    """Iterations that the checkpoint in an adapter's folder stands after, 0 without one."""
    file = path / CHECKPOINT
    return int(read_raw(read_header(file)[PLACE])) if file.exists() else 0
