"""A whole run of a recipe: prepare, measure, train stage after stage, and leave a model folder behind each."""

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from radlads.backends.torch.engine import TorchEngine
from radlads.backends.torch.evaluate import evaluate, limited_context_loss
from radlads.backends.torch.head import retied, untied
from radlads.backends.torch.load import load_model, new_model, stored_tensors
from radlads.backends.torch.memory import keep_freed_memory
from radlads.backends.torch.model import Model
from radlads.backends.torch.trainer import Progress, run_stage
from radlads.data.corpus import open_corpus
from radlads.demo import resolve
from radlads.errors import fail
from radlads.folder import ModelFolder, open_folder, save_folder
from radlads.recipe import Recipe, Stage
from radlads.runs import Run
from radlads.sampling import Sampling
from radlads.session import stream
from radlads.tokenizer import Tokenizer

# The teacher is also measured with only this many tokens of context: the gap shows what its attention does.
SHORT_CONTEXT = 8
SHORT_CONTEXT_TOKENS = 4096

Report = Callable[[Progress], None]
Stopping = Callable[[], bool]


class RecipeRun:
    """The parts of a run that every stage needs: teacher, data, tokenizer, device."""

    def __init__(self, run: Run, teacher: ModelFolder | None, tokenizer: Tokenizer) -> None:
        self.run, self.recipe, self.tokenizer = run, run.recipe, tokenizer
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cpu":
            keep_freed_memory()
        torch.set_float32_matmul_precision("high")
        self.teacher_folder = teacher
        self.teacher = None if teacher is None else load_model(teacher, device=self.device, dtype=self.recipe.precision)
        data = self.recipe.data
        self.train = open_corpus(data.train, data, tokenizer, run.data / "train")
        self.valid = open_corpus(data.valid, data, tokenizer, run.data / "valid")

    @property
    def retied(self) -> bool:
        """Whether a tied model gets a head of its own for step 2, which is dropped at the end."""
        return self.recipe.student is not None and self.recipe.student.head == "retied"

    @property
    def samples(self) -> torch.Tensor:
        """Held-out samples (n, T + 1), the same for every measurement."""
        wanted = self.recipe.eval
        samples = self.valid.samples(wanted.seq_len, self.recipe.seed)
        count = max(1, min(len(samples), wanted.tokens // wanted.seq_len))
        return torch.from_numpy(samples.batch(0, count))

    def measure(self, model: Model, stage: int | str) -> dict[str, Any]:
        """Measure a model once and log it with a text it writes; a measurement of an earlier start is used again."""
        for record in self.run.metrics():
            if record.get("kind") == "eval" and record.get("stage") == stage:
                return record
        is_teacher = stage == "teacher"
        result = evaluate(model, self.samples, None if is_teacher else self.teacher)
        record = {"kind": "eval", "stage": stage, **result}
        if is_teacher:
            samples = self.samples[: max(1, SHORT_CONTEXT_TOKENS // self.recipe.eval.seq_len)].to(self.device)
            full, short = limited_context_loss(model, samples, SHORT_CONTEXT)
            record |= {"short_context": SHORT_CONTEXT, "short_context_loss": short, "full_context_loss": full}
        if self.recipe.eval.new_tokens:
            prompt = self.recipe.eval.prompt
            ids, sampling = self.tokenizer.encode(prompt), Sampling(temp=0.8, seed=self.recipe.seed)
            written = stream(TorchEngine(model), self.tokenizer, ids, sampling, self.recipe.eval.new_tokens, [])
            self.run.log({"kind": "sample", "stage": stage, "prompt": prompt, "text": "".join(written)})
        # Last: a measurement that is found again is whole, its text included.
        self.run.log(record)
        return record

    def stage(self, stage: Stage, source: ModelFolder | Model, report: Report, stopping: Stopping) -> Path | None:
        """Train one stage from `source` unless its folder is there already; None when it was asked to stop."""
        folder = self.run.stage_folder(stage.number)
        if not folder.exists():
            model = source if isinstance(source, Model) else load_model(source, dtype=self.recipe.precision)
            own_head = stage.kind == "distill" and self.retied and model.spec.tie_embeddings
            model = (untied(model) if own_head else model).to(self.device)
            began = time.perf_counter()
            teacher = self.teacher if stage.kind != "lm" else None
            if not run_stage(stage, model, teacher, self.train, self.run, report, stopping):
                return None
            origin, seconds = source if isinstance(source, ModelFolder) else None, time.perf_counter() - began
            self.save(retied(model) if own_head else model, folder, stage, origin, seconds)
        return folder

    def save(self, model: Model, folder: Path, stage: Stage, source: ModelFolder | None, seconds: float) -> None:
        """The model folder of a finished stage: its tensors, and every other file of the folder before it."""
        dtype = {"float32": "F32", "bfloat16": "BF16"}[self.recipe.precision]
        before: dict[str, Any] = dict(source.manifest or {}) if source else {}
        step: dict[str, Any] = {"stage": stage.number, "kind": stage.kind, "tokens": stage.steps * stage.tokens_per_step}
        step |= {"seconds": round(seconds, 1), "recipe": self.recipe.name}
        record = {key: value for key, value in before.items() if key in ("teacher", "student")}
        record |= {"stage": stage.number, "history": [*before.get("history", []), step]}
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


def tokenizer_files(recipe: Recipe) -> Mapping[str, bytes]:
    """Files of the tokenizer that a new teacher gets."""
    path = resolve(recipe.tokenizer or "")
    folder = path if path.is_dir() else path.parent
    names = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    found = {name: (folder / name).read_bytes() for name in names if path.is_dir() and (folder / name).is_file()}
    return {"tokenizer.json": (path / "tokenizer.json" if path.is_dir() else path).read_bytes(), **found}


def train_teacher(run: Run, tokenizer: Tokenizer, report: Report, stopping: Stopping) -> bool:
    """A new teacher from random weights; False when it was asked to stop."""
    parts = RecipeRun(run, None, tokenizer)
    (stage,) = run.recipe.stages
    folder = parts.stage(stage, new_model(run.recipe.init_spec(), run.recipe.seed), report, stopping)
    if folder is None:
        return False
    model = load_model(open_folder(folder), device=parts.device)
    found = parts.measure(model, "teacher")
    publish(folder, run.model)
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
    report: Report,
    say: Callable[[str], None],
    stopping: Stopping,
) -> bool:
    """All stages of a conversion from the student folder `step0`; False when it was asked to stop."""
    recipe = run.recipe
    parts = RecipeRun(run, teacher, tokenizer)
    assert parts.teacher is not None
    measured = parts.measure(parts.teacher, "teacher")
    found = parts.measure(load_model(step0, device=parts.device, dtype=recipe.precision), step0.stage or 0)
    say(f"teacher: {losses(measured)}; student before training: {losses(found)}")
    folder, stages = step0, []
    for stage in recipe.stages:
        path = parts.stage(stage, folder, report, stopping)
        if path is None:
            return False
        folder = open_folder(path)
        found = parts.measure(load_model(folder, device=parts.device, dtype=recipe.precision), stage.number)
        say(f"after stage {stage.number}: {losses(found)}, KL {found['kl']:.4f}, agreement {found['agreement']:.1%}")
        stages.append(
            {"stage": stage.number, "kind": stage.kind, "tokens": stage.steps * stage.tokens_per_step, "folder": path.name}
        )
        stages[-1] |= {key: found[key] for key in ("loss", "ppl", "kl", "agreement")}
    publish(folder.path, run.model)
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
    """R103 unless `student` has been through the stage before `first` (or a later start is plainly wrong)."""
    done = student.stage
    if done is None or done >= first.number or (first.number >= 2 and done == 0):
        why = f"it has been through stage {done}, and the recipe begins with stage {first.number} ({first.kind})"
        raise fail(
            "R103",
            where=student.path,
            why=why,
            fix=f"Begin with a folder of stage {first.number - 1}, or with stages that follow",
        )
