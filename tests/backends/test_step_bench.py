"""What bench/step.py compares: the published form's loss with either recurrence, and ours, are one loss."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from radlads.backends.torch.kernels.wkv7_plain import wkv7_plain
from radlads.backends.torch.objectives import objective
from radlads.recipe import Stage

BENCH = Path(__file__).resolve().parents[2] / "bench" / "step.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, beside a flash-linear-attention whose recurrence is the plain one."""

    def chunk_rwkv7(
        r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, **options: Any
    ) -> tuple[Tensor, None]:
        assert options == {"safe_gate": True, "lower_bound": pytest.approx(-math.exp(-0.5)), "chunk_size": 64}
        return wkv7_plain(r, w, k, v, a, b, None, scale=scale, min_log_w=None, cu_seqlens=None)[0], None

    for name in ("fla", "fla.ops", "fla.ops.rwkv7"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["fla.ops.rwkv7"].chunk_rwkv7 = chunk_rwkv7  # type: ignore[attr-defined]
    found = importlib.util.spec_from_file_location("step_bench", BENCH)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["align", "distill"])
def test_all_forms_have_one_loss(kind: str, bench: Any) -> None:
    spec = replace(bench.TINY, num_layers=2, vocab_size=200, mixers=())
    teacher = bench.random_model(spec, "cpu").float()
    student = bench.random_model(spec.as_student("rwkv7"), "cpu").float()
    stage = Stage(kind=kind, tokens=1, seq_len=40, batch_size=2, **bench.RATES[kind])
    samples = torch.randint(0, spec.V, (2, 41), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = float(objective(stage, student, teacher, samples).loss)
        for fla in (False, True):
            with bench.recurrence_of(fla):
                assert float(bench.upstream_loss(stage, student, teacher, samples, False)) == pytest.approx(wanted, rel=1e-5)
