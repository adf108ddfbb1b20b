"""What test_parallel.py looks at: short trainings by one process, and the same ones spread over 2 and 4 in every way there is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# Imported before the fork, once for all processes.
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

from radlads.backends.torch import trainer
from radlads.backends.torch.compiled import compiled_layers
from radlads.backends.torch.load import stored_tensors
from radlads.backends.torch.parallel import build_task, load_frozen
from radlads.backends.torch.trainer import StageRun, run_stage
from radlads.backends.torch.world import join_world
from radlads.cli.train import open_run
from radlads.data.prepare import prepare
from radlads.data.samples import Corpus
from radlads.data.store import TokenStore
from radlads.folder import open_folder
from radlads.recipe import Recipe
from radlads.weights_tools.surgery import make_student
from tests.backends.test_training import Letters
from tests.models import tiny_teacher
from tests.processes import together

STEPS = 3
# What is trained: student and stage; layer 1 keeps its softmax attention.
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "align": ("rwkv7", {"kind": "align", "lr": 1e-3}),
    "distill": ("rwkv7", {"kind": "distill", "lr": 1e-4, "micro_batch": 1, "ce_weight": 0.2, "temperature": 1.5}),
    "lm": ("rwkv6", {"kind": "lm", "lr": 1e-4}),
}
# How it is spread: training, number of processes, the recipe's `parallel` table.
SPREAD: dict[str, tuple[str, int, dict[str, Any]]] = {
    "step 1, everything on each": ("align", 2, {"layout": "replicated"}),
    "step 1, weights gathered once": ("align", 2, {}),
    "step 1, weights and teacher sharded": ("align", 4, {"layout": "full", "teacher": "sharded"}),
    "step 2, everything on each, compiled": ("distill", 2, {"layout": "replicated", "compile": "auto"}),
    "step 2, weights gathered once": ("distill", 2, {}),
    "step 2, all sharded, teacher offloaded, recomputing": (
        "distill", 4, {"layout": "full", "teacher": "offloaded", "recompute": "always"}),
    "step 2, compiled in parts, recomputing": ("distill", 2, {"recompute": "always", "compile": "auto"}),
    "step 2, two copies of two shards": (
        "distill", 4, {"copies": 2, "layout": "full", "teacher": "sharded"}),
    "step 2, heads split": ("distill", 4, {"vocab_heads": True}),
    "step 2, sequences split": ("distill", 4, {"sequence": {"distill": 2}}),
    "step 3, sequences split, weights sharded": ("lm", 2, {"sequence": {"lm": 2}, "layout": "full"}),
    "step 3, heads split, sequences too": ("lm", 4, {"vocab_heads": True, "sequence": {"lm": 4}}),
}  # fmt: skip


def recipe(training: str, how: dict[str, Any], precision: str) -> Recipe:
    """The recipe of one training, spread as `how` says."""
    stage = {"tokens": STEPS * 8 * 32, "seq_len": 32, "batch_size": 8, "warmup_steps": 1, **TRAININGS[training][1]}
    return Recipe(name="test", teacher="t", data={"train": ["a"], "valid": ["a"]}, stages=[stage], parallel=how,
                  precision=precision)  # fmt: skip


@contextmanager
def compiled_on_cpu(*models: torch.nn.Module, by_part: bool, **_: Any) -> Iterator[None]:
    """compiled_layers, whatever the device: one graph for all layers, or parts of them, of one kind."""
    graphs: list[Any] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    with compiled_layers(*models, by_part=by_part, backend=keep):
        yield
    assert 0 < len(graphs) <= 9, f"{len(graphs)} graphs"


def train(folder: Path, training: str, how: dict[str, Any], out: Path, precision: str = "float32") -> dict[str, Any]:
    """Gradients of the first step, then losses and gradient norms of `STEPS` steps and the weights after them.

    The other processes return their weights alone.
    """
    world = join_world("cpu")
    wanted = recipe(training, how, precision)
    stage, corpus = wanted.stages[0], Corpus.of(TokenStore(folder / "store"))
    teacher = None if stage.kind == "lm" else load_frozen(open_folder(folder / "teacher"), wanted.parallel, world, precision)
    gradients: dict[str, torch.Tensor] = {}
    update = StageRun.update

    def look(parts: StageRun, step: int) -> tuple[float, float]:
        for name, parameter in parts.parameters.items() if step == 0 else ():
            grad: Any = parameter.grad
            if grad is not None:
                gradients[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
        return update(parts, step)

    StageRun.update = look  # type: ignore[method-assign]
    if "compile" in how:  # as on a GPU, but by a compiler that takes no time
        trainer.compiled_layers = compiled_on_cpu  # type: ignore[assignment]
    with open_run(out, wanted, "auto", world) as run:
        task = build_task(stage, open_folder(folder / TRAININGS[training][0]), teacher, wanted.parallel, world, precision)
        run_stage(stage, task, corpus, run, lambda progress: None, world=world)
        weights = {name: torch.from_numpy(raw.copy()) for name, _, raw in stored_tensors(task.student, "F32")}
        records = run.metrics()
    world.leave()
    return {"records": records, "weights": weights, "gradients": gradients} if world.first else {"weights": weights}


def checks(folder: Path) -> dict[str, Any]:
    """Results by the names of `TRAININGS` (one process) and of `SPREAD`."""
    tiny_teacher(folder / "teacher", "qwen2", num_layers=3)
    for arch in ("rwkv6", "rwkv7"):
        make_student(open_folder(folder / "teacher"), folder / arch, arch=arch, keep_softmax=(1,), options={}, seed=1)
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    prepare([folder / "a.txt"], Letters(), folder / "store", eos_id=None)
    asked = {**{name: (name, 1, {}) for name in TRAININGS}, **SPREAD}
    found: dict[str, Any] = {}
    for number, (name, (training, size, how)) in enumerate(asked.items()):
        began = time.perf_counter()
        try:
            found[name] = together(size, train, folder, training, how, folder / f"run-{number}", results=folder / "result")[0]
        except RuntimeError as error:
            found[name] = error
        print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    for size in (1, 2):
        how, out = {"layout": "replicated", "masters": "none"}, folder / f"run-rounded-{size}"
        found[f"rounded, {size}"] = together(size, train, folder, "distill", how, out, "bfloat16", results=folder / "result")
    return found
