"""Training on a GPU: as CUDA graphs, compiled, in bfloat16, and with less memory than a micro-batch needs."""

from pathlib import Path

import pytest
import torch

from radlads.backends.torch.parallel import Task
from radlads.backends.torch.trainer import run_stage
from radlads.backends.torch.world import World
from radlads.data.samples import Corpus
from radlads.recipe import Recipe
from radlads.runs import begin_run
from tests.backends.test_torch_model import model_of, random_weights
from tests.backends.test_training import TEACHER, corpus  # noqa: F401

pytestmark = pytest.mark.gpu
EAGER = {"compile": "off", "cuda_graphs": "off"}
STEPS = 8


def trained(
    folder: Path, corpus: Corpus, kind: str, precision: str, how: dict[str, str], seq_len: int = 32, micro: int = 4  # noqa: F811
) -> tuple[list[float], list[str]]:
    """Losses and notes of a short stage of two micro-batches a step."""
    stage = {"kind": kind, "tokens": STEPS * seq_len * 2 * micro, "seq_len": seq_len, "batch_size": 2 * micro, "lr": 1e-3}
    stage |= {"micro_batch": micro, "warmup_steps": 0}
    of = {"train": ["a"], "valid": ["a"]}
    wanted = Recipe(name="t", teacher="t", data=of, precision=precision, stages=[stage], parallel=how)
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    models = [model_of(spec, random_weights(spec)).to("cuda", dtype) for spec in (TEACHER.as_student("rwkv7"), TEACHER)]
    with begin_run(folder, wanted) as run:
        first = wanted.stages[0]
        run_stage(first, Task(first, *models), corpus, run, lambda p: None, world=World(device=torch.device("cuda")))
        records = run.metrics()
    return [r["loss"] for r in records if r["kind"] == "train"], [r["text"] for r in records if r["kind"] == "note"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["align", "distill"])
def test_graphs_train_to_the_same_losses(kind: str, precision: str, corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    eager, _ = trained(tmp_path / "eager", corpus, kind, precision, EAGER)
    graphs, notes = trained(tmp_path / "graphs", corpus, kind, precision, {"compile": "off"})
    assert graphs == eager and len(eager) == STEPS and not notes


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_compiled_layers_train_to_the_same_losses(kind: str, corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    eager, _ = trained(tmp_path / "eager", corpus, kind, "bfloat16", EAGER)
    compiled, notes = trained(tmp_path / "compiled", corpus, kind, "bfloat16", {})
    assert compiled == pytest.approx(eager, rel=1e-2) and not notes


@pytest.mark.parametrize("how", [EAGER, {"compile": "off"}], ids=["eager", "graphs"])
def test_a_micro_batch_that_does_not_fit_is_halved(how: dict[str, str], corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    free, notes = trained(tmp_path / "free", corpus, "distill", "float32", how, seq_len=256, micro=32)
    peak = torch.cuda.max_memory_reserved()
    assert not notes
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.7 * peak / torch.cuda.get_device_properties(0).total_memory)
    try:
        limited, notes = trained(tmp_path / "limited", corpus, "distill", "float32", how, seq_len=256, micro=32)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert notes[:1] == ["out of memory: micro-batch 32 -> 16"]
    assert limited == pytest.approx(free, rel=1e-5)
