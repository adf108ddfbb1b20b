"""A whole run of a recipe: prepare, measure, train stage after stage, and leave a model folder behind each."""

import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from radlads import costs
from radlads.backends.torch.difficulty import layer_difficulty
from radlads.backends.torch.engine import TorchEngine
from radlads.backends.torch.evaluate import evaluate, limited_context_loss
from radlads.backends.torch.head import retied
from radlads.backends.torch.load import new_model, stored_tensors
from radlads.backends.torch.memory import forget_models, keep_freed_memory, peak_gpu_bytes
from radlads.backends.torch.model import Model
from radlads.backends.torch.parallel import build_task, load_frozen, runnable, sharded
from radlads.backends.torch.seats import TorchState
from radlads.backends.torch.trainer import Progress, run_stage
from radlads.backends.torch.world import World
from radlads.data.corpus import open_corpus
from radlads.data.samples import Corpus
from radlads.demo import resolve
from radlads.difficulty import JSON, write_difficulty
from radlads.errors import fail
from radlads.folder import ModelFolder, open_folder, save_folder
from radlads.recipe import Recipe, Stage
from radlads.runs import Run
from radlads.sampling import Sampling
from radlads.session import stream
from radlads.spec import ModelSpec
from radlads.tokenizer import Tokenizer

# The teacher is also measured with only this many tokens of context: the gap shows what its attention does.
SHORT_CONTEXT = 8
SHORT_CONTEXT_TOKENS = 4096
# On which the layers are compared after step 1: half as many forward passes as the model has layers.
DIFFICULTY_TOKENS = 8192

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16"}

Report = Callable[[Progress], None]
Stopping = Callable[[], bool]


class Screen(Protocol):
    """Where a run says how far it is."""

    def reading(self, done: int, total: int | None) -> None:
        """Bytes of the data that are tokens by now, of all (None where that is not known)."""

    def step(self, progress: Progress) -> None:
        """After each optimiser step."""

    def say(self, text: str) -> None:
        """A line of text."""


class RecipeRun:
    """The parts of a run that every stage needs: teacher, data, tokenizer, device."""

    def __init__(
        self, run: Run, teacher: ModelFolder | None, student: ModelSpec, tokenizer: Tokenizer, screen: Screen, world: World
    ) -> None:
        self.screen = screen
        self.run, self.recipe, self.tokenizer, self.world = run, run.recipe, tokenizer, world
        self.gpu = costs.gpu_called(torch.cuda.get_device_name()) if world.device.type == "cuda" else None
        self.specs = (None if teacher is None else teacher.spec, student)
        self.ways = costs.ways_of(self.recipe, *self.specs, world.size, self.gpu)
        if world.device.type == "cpu":
            keep_freed_memory()
        torch.set_float32_matmul_precision("high")
        self.folder = teacher
        self._teacher: Model | None = None
        self.train, self.valid = (self.corpus(part) for part in ("train", "valid"))

    def corpus(self, part: str) -> Corpus:
        """The samples of one part of the data, which the first process prepares."""
        data = self.recipe.data
        made: list[Corpus] = []

        def make() -> None:
            made.append(open_corpus(getattr(data, part), data, self.tokenizer, self.run.data / part, self.screen.reading))

        self.world.once(make)
        if not made:
            make()
        return made[0]

    @property
    def teacher(self) -> Model | None:
        """The teacher, in memory from the first time it is asked for until a stage can do without it."""
        if self._teacher is None and self.folder is not None:
            self._teacher = self.frozen(self.folder)
        return self._teacher

    @property
    def samples(self) -> torch.Tensor:
        """Held-out samples (n, T + 1), the same for every measurement."""
        wanted = self.recipe.eval
        samples = self.valid.samples(wanted.seq_len, self.recipe.seed)
        count = max(1, min(len(samples), wanted.tokens // wanted.seq_len))
        return torch.from_numpy(samples.batch(0, count))

    def frozen(self, folder: ModelFolder) -> Model:
        """The model of a folder, to run forward only."""
        forget_models()
        return load_frozen(folder, next(iter(self.ways.values())), self.world, self.recipe.precision)

    def measured(self, model: ModelFolder | Model, stage: int | str) -> dict[str, Any]:
        """The measurement of a model, made now or by an earlier start, in every process."""
        records = self.run.metrics() if self.world.first else []
        done = (record for record in records if record.get("kind") == "eval" and record.get("stage") == stage)
        found = self.world.share(next(done, None))
        if found is None:
            made = model if isinstance(model, Model) else self.frozen(model)
            # Where weights are whole, one process measures; shards need all of them.
            mine = self.world.first or any(sharded(p) for p in made.parameters())
            found = self.world.share(self.measure(made, stage) if mine else {})
        return found

    def measure(self, model: Model, stage: int | str) -> dict[str, Any]:
        """Measure a model and log it with a text it writes."""
        is_teacher = stage == "teacher"
        result = evaluate(model, self.samples, None if is_teacher else self.teacher)
        record = {"kind": "eval", "stage": stage, **result}
        if is_teacher:
            samples = self.samples[: max(1, SHORT_CONTEXT_TOKENS // self.recipe.eval.seq_len)].to(self.world.device)
            full, short = limited_context_loss(model, samples, SHORT_CONTEXT)
            record |= {"short_context": SHORT_CONTEXT, "short_context_loss": short, "full_context_loss": full}
        if self.recipe.eval.new_tokens:
            prompt = self.recipe.eval.prompt
            ids, sampling = self.tokenizer.encode(prompt), Sampling(temp=0.8, seed=self.recipe.seed)
            written = stream(Together(model, self.world), self.tokenizer, ids, sampling, self.recipe.eval.new_tokens, [])
            self.run.log({"kind": "sample", "stage": stage, "prompt": prompt, "text": "".join(written)})
        # Last: a measurement that is found again is whole, its text included.
        self.run.log(record)
        return record

    def measure_difficulty(self, folder: ModelFolder) -> None:
        """How hard each layer was to convert, to files of the run folder, unless they are there."""
        if self.world.share((self.run.path / JSON).exists()):
            return
        assert self.teacher is not None
        student = self.frozen(folder)
        if self.world.first or any(sharded(p) for p in student.parameters()):
            samples = self.samples[: max(1, DIFFICULTY_TOKENS // self.recipe.eval.seq_len)]
            rows = layer_difficulty(student, self.teacher, samples)
            if self.world.first:
                write_difficulty(self.run.path, [row._asdict() for row in rows])
        self.world.barrier()

    def stage(self, stage: Stage, source: ModelFolder | Model, report: Report, stopping: Stopping) -> Path | None:
        """Train one stage from `source` unless its folder is there already; None when it was asked to stop."""
        folder, world = self.run.stage_folder(stage.number), self.world
        if world.share(folder.exists()):
            return folder
        needed = stage.kind == "align" or (stage.kind == "distill" and not self.recipe.data.teacher_cache)
        if not needed:
            self._teacher = None
        teacher = self.teacher if needed else None
        own_head = self.recipe.unties(stage) and source.spec.tie_embeddings
        forget_models()
        task = build_task(stage, source, teacher, self.ways[stage.kind], world, self.recipe.precision, own_head)
        began = time.perf_counter()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        def measure(step: int) -> None:
            """How good the model is in the middle of the stage, as records of their own."""
            models = [model for model in task.pair if model is not None]
            if self.folder is None or any(sharded(p) for model in models for p in model.parameters()):
                return
            with torch.compiler.set_stance("force_eager"):  # other shapes are not worth their graphs
                found = evaluate(runnable(task), self.samples, self.teacher)
            at = {"stage": stage.number, "step": step, "tokens_seen": step * stage.tokens_per_step}
            self.run.log({"kind": "curve", **at, **{key: found[key] for key in ("loss", "ppl", "kl", "agreement")}})

        if not run_stage(stage, task, self.train, self.run, report, stopping, world, measure):
            return None
        self.log_resources(stage)
        before = source if isinstance(source, ModelFolder) else None
        trained = retied(task.student) if own_head else task.student
        if world.first:
            self.save(trained, folder, stage, before, time.perf_counter() - began)
        else:
            deque(stored_tensors(trained, DTYPE_NAMES[self.recipe.precision]), maxlen=0)  # its part of each gather
        world.barrier()
        return folder

    def log_resources(self, stage: Stage) -> None:
        """What the stage took, for the report to set beside the plan."""
        peak = peak_gpu_bytes() if self.world.device.type == "cuda" else 0
        seconds = [r["step_s"] for r in self.run.metrics() if r.get("stage") == stage.number and r.get("step_s")]
        record: dict[str, Any] = {"kind": "resources", "stage": stage.number, "processes": self.world.size}
        record |= {"seconds": round(sum(seconds), 3), "steps": len(seconds)}
        record |= {"device": torch.cuda.get_device_name() if peak else "cpu", "peak_gib": round(peak / 2**30, 3)}
        if self.gpu is not None:
            way, precision = self.ways[stage.kind], self.recipe.precision
            teacher, student = self.specs
            student = costs.as_trained(self.recipe, stage, student)
            plan = costs.plan_stage(stage, teacher, student, way, self.world.size, self.gpu, precision)
            record |= {"planned_seconds": round(plan.seconds, 3), "planned_peak_gib": round(plan.peak_gib, 3)}
        self.run.log(record)

    def save(self, model: Model, folder: Path, stage: Stage, source: ModelFolder | None, seconds: float) -> None:
        """The model folder of a finished stage: its tensors, and every other file of the folder before it."""
        dtype = DTYPE_NAMES[self.recipe.precision]
        before: dict[str, Any] = dict(source.manifest or {}) if source else {}
        step: dict[str, Any] = {"stage": stage.number, "kind": stage.kind, "tokens": stage.steps * stage.tokens_per_step}
        step |= {"seconds": round(seconds, 1), "recipe": self.recipe.name, "recipe_sha256": self.recipe.fingerprint()}
        step["data"] = [{"tokens": len(part.store), "sha256": part.store.header.get("sha256")} for part in self.train.parts]
        record = {key: value for key, value in before.items() if key in ("teacher", "student")}
        record |= {"stage": stage.number, "recipe": self.recipe.values(), "history": [*before.get("history", []), step]}
        save_folder(
            folder,
            spec=model.spec,
            tensors=stored_tensors(model, dtype),
            source=source,
            dtype=dtype,
            manifest=record,
            extra_files=None if source else tokenizer_files(self.recipe),
            config_extra=None if source else {"eos_token_id": self.tokenizer.eos_id, "bos_token_id": None},
        )


class Together(TorchEngine):
    """A torch engine in every process, all with the logits of rank 0, so that sampling takes the same token everywhere."""

    def __init__(self, model: Model, world: World) -> None:
        super().__init__(model)
        self.shared = world if any(sharded(p) for p in model.parameters()) else World()

    @property
    def device(self) -> str:
        """Where it computes."""
        return str(self.model.model.norm.weight.device)

    def feed(self, state: TorchState, tokens: Sequence[int]) -> tuple[npt.NDArray[np.float32], TorchState]:
        """Logits (V,) after the last of `tokens`, and the new state."""
        logits, state = super().feed(state, tokens)
        return self.shared.share(logits), state


def tokenizer_files(recipe: Recipe) -> Mapping[str, bytes]:
    """Files of the tokenizer that a new teacher gets."""
    path = resolve(recipe.tokenizer or "")
    folder = path if path.is_dir() else path.parent
    names = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    found = {name: (folder / name).read_bytes() for name in names if path.is_dir() and (folder / name).is_file()}
    return {"tokenizer.json": (path / "tokenizer.json" if path.is_dir() else path).read_bytes(), **found}


def train_teacher(run: Run, tokenizer: Tokenizer, screen: Screen, stopping: Stopping, world: World) -> bool:
    """A new teacher from random weights; False when it was asked to stop."""
    parts = RecipeRun(run, None, run.recipe.init_spec(), tokenizer, screen, world)
    (stage,) = run.recipe.stages
    folder = parts.stage(stage, new_model(run.recipe.init_spec(), run.recipe.seed), screen.step, stopping)
    if folder is None:
        return False
    found = parts.measured(open_folder(folder), "teacher")
    world.once(lambda: publish(folder, run.model))
    run.finish(
        {"teacher_ppl": found["ppl"], "student_ppl": found["ppl"], "ppl_ratio": 1.0, "kl": 0.0, "agreement": 1.0},
        [{"stage": stage.number, "kind": stage.kind, "tokens": stage.steps * stage.tokens_per_step}],
    )
    return True


def convert(
    run: Run,
    teacher: ModelFolder,
    step0: ModelFolder,
    tokenizer: Tokenizer,
    screen: Screen,
    stopping: Stopping,
    world: World,
) -> bool:
    """All stages of a conversion from the student folder `step0`; False when it was asked to stop."""
    recipe = run.recipe
    parts = RecipeRun(run, teacher, step0.spec, tokenizer, screen, world)
    assert parts.teacher is not None
    measured = parts.measured(parts.teacher, "teacher")
    found = parts.measured(step0, step0.stage or 0)
    screen.say(f"teacher: {losses(measured)}; student before training: {losses(found)}")
    folder, stages = step0, []
    for stage in recipe.stages:
        path = parts.stage(stage, folder, screen.step, stopping)
        if path is None:
            return False
        folder = open_folder(path)
        found = parts.measured(folder, stage.number)
        if stage.kind == "align":
            parts.measure_difficulty(folder)
        screen.say(f"after stage {stage.number}: {losses(found)}, KL {found['kl']:.4f}, agreement {found['agreement']:.1%}")
        stages.append(
            {"stage": stage.number, "kind": stage.kind, "tokens": stage.steps * stage.tokens_per_step, "folder": path.name}
        )
        stages[-1] |= {key: found[key] for key in ("loss", "ppl", "kl", "agreement")}
    world.once(lambda: publish(folder.path, run.model))
    final = {"teacher_ppl": measured["ppl"], "student_ppl": found["ppl"], "ppl_ratio": math.exp(found["loss"] - measured["loss"])}
    run.finish({**final, "kl": found["kl"], "agreement": found["agreement"]}, stages)
    return True


def losses(record: dict[str, Any]) -> str:
    """Loss and perplexity of a measurement for people."""
    return f"loss {record['loss']:.4f} (perplexity {record['ppl']:.2f})"


def publish(stage_folder: Path, model: Path) -> None:
    """Make `model` the same folder as the last stage's, by hard links where the file system has them."""
    if model.exists():
        return
    partial = model.with_name(f".{model.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(stage_folder, partial, copy_function=os.link)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(stage_folder, partial)
    partial.rename(model)


def check_order(student: ModelFolder, first: Stage) -> None:
    """R103 unless `student` has been through the stage before `first`, or through that stage: then it goes on with more of it."""
    done = student.stage
    if done is None or done > first.number or (first.number >= 2 and done == 0):
        why = f"it has been through stage {done}, and the recipe begins with stage {first.number} ({first.kind})"
        raise fail(
            "R103",
            where=student.path,
            why=why,
            fix=f"Begin with a folder of stage {first.number - 1} or {first.number}, or with stages that follow",
        )
