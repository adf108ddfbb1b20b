"""The AdamW kernels against torch.optim.AdamW, under Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from radlads.backends.torch import optim
from radlads.backends.torch.moments import Packed
from radlads.backends.torch.optim import OnePass, Optimizer
from radlads.recipe import Stage

ROOT = Path(__file__).resolve().parents[2]
# Odd, even, larger than a chunk, and without a gradient.
SHAPES = {"model.norm.weight": (4099,), "model.layers.0.self_attn.w0": (64,), "lm_head.weight": (35, 1024), "unused": (7,)}


def stage(**more: object) -> Stage:
    values = {"kind": "lm", "tokens": 1000, "seq_len": 1, "batch_size": 1, "warmup_steps": 0, "lr": 1e-2, "mixer_lr": 2e-2}
    return Stage(**{**values, "weight_decay": 0.1, "clip": 3.0, **more})  # type: ignore[arg-type]


def started(device: str, dtype: torch.dtype, masters: str = "float32", moments: str = "float32") -> Optimizer:
    """An optimizer of weights that are always the same."""
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in SHAPES.items()}
    optimizer = Optimizer({name: torch.nn.Parameter(weight) for name, weight in drawn.items()}, stage(), moments, masters)
    assert isinstance(optimizer.adam, OnePass)
    return optimizer


def update(optimizer: Optimizer, step: int) -> None:
    """One update by gradients that only depend on its number; those of the third hold an infinity, so it must change nothing."""
    generator = torch.Generator().manual_seed(step + 1)
    for name, weight in optimizer.parameters.items():
        if name != "unused":
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight) / 50
    if step == 2:
        optimizer.parameters["lm_head.weight"].grad[3, 3] = float("inf")  # type: ignore[index]
    assert bool(torch.isfinite(optimizer.step(step).norm)) == (step != 2)


def train(device: str, dtype: torch.dtype, masters: str = "float32", steps: int = 5) -> Optimizer:
    optimizer = started(device, dtype, masters)
    for step in range(steps):
        update(optimizer, step)
    assert optimizer.updates == steps - (steps > 2)
    return optimizer


def reference(dtype: torch.dtype, steps: int = 5) -> dict[str, torch.Tensor]:
    """The same updates by torch.optim.AdamW in float64, of float64 copies."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype).double()) for name, shape in SHAPES.items()
    }
    groups = [
        {"params": [w for n, w in weights.items() if (".self_attn." in n) == mixer], "lr": 2e-2 if mixer else 1e-2}
        for mixer in (False, True)
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(steps):
        generator.manual_seed(step + 1)
        for name, weight in weights.items():
            if name != "unused":
                weight.grad = (torch.randn(weight.shape, generator=generator).to(dtype) / 50).double()
        if step != 2:
            torch.nn.utils.clip_grad_norm_(weights.values(), 3.0)
            adam.step()
    return {name: weight.detach() for name, weight in weights.items()}


def compare(device: str, dtype: torch.dtype) -> None:
    """Masters within float32 rounding of the reference, weights rounded from them; raises where they are not."""
    found, wanted = train(device, dtype), reference(dtype)
    for name, master in found.masters.items():
        torch.testing.assert_close(master.cpu().double(), wanted[name], rtol=2e-6, atol=2e-6)
        # The interpreter cuts bfloat16 off where a GPU rounds it.
        near = 0 if device == "cuda" or dtype == torch.float32 else 2**-7
        torch.testing.assert_close(found.parameters[name].detach(), master.to(dtype), rtol=near, atol=0)


def compare_rounded(device: str) -> None:
    """Without masters a weight is one of the two bfloat16 values around where it belongs, and right in the mean."""
    found, wanted = train(device, torch.bfloat16, "none", steps=1), reference(torch.bfloat16, steps=1)
    errors = []
    for name, weight in found.parameters.items():
        exact, got = wanted[name].float(), weight.detach().cpu().float()
        errors.append((got - exact) / torch.exp2(exact.abs().log2().floor() - 7))
        assert (errors[-1].abs() <= 1.001).all() and weight is found.masters[name]
    assert abs(float(errors[2].mean())) < 0.01
    again = train(device, torch.bfloat16, "none", steps=1)
    assert all(torch.equal(again.parameters[name], found.parameters[name]) for name in SHAPES)


def compare_small(device: str, kind: str) -> None:
    """Moments in fewer bits: each update by kernel against the same one by array operations, from the same state.

    Weights are within float32 rounding, and a moment is what the other rounds to or, where the two fall on either side of a
    tie, its neighbour. The kernel's state is then given to the other, for one code more or less is carried on.
    """
    found, has_kernel = started(device, torch.float32, moments=kind), optim.adamw_has_kernel
    optim.adamw_has_kernel = lambda weight: False
    wanted = started(device, torch.float32, moments=kind)
    optim.adamw_has_kernel = has_kernel
    assert isinstance(found.adam, OnePass) and isinstance(wanted.adam, OnePass)
    assert len(found.adam.tables) == 2 and not wanted.adam.tables
    # The interpreter cuts bfloat16 off where a GPU rounds it, so there half of the moments are the neighbours.
    cut = kind == "bfloat16" and device == "cpu"
    for step in range(5):
        before = [kept.clone() for kept in kept_by(found)]
        update(found, step)
        update(wanted, step)
        apart = count = 0
        for mine, other in zip(kept_by(found), kept_by(wanted), strict=True):
            if mine.dtype == torch.float32:  # masters, and scales of packs
                torch.testing.assert_close(mine, other, rtol=2e-6, atol=5e-7 * float(other.abs().max()))
                continue
            gap = (mine.float() - other.float()).abs()
            assert (gap <= (1 if kind == "int8" else 2**-7 * other.float().abs())).all()
            apart, count = apart + int((gap > 0).sum()), count + gap.numel()
        assert cut or apart <= 2e-3 * count, (apart, count)
        changed = [not torch.equal(now, then) for now, then in zip(kept_by(found), before, strict=True)]
        assert any(changed) == (step != 2)
        for mine, other in zip(kept_by(found), kept_by(wanted), strict=True):
            other.copy_(mine)


def kept_by(optimizer: Optimizer) -> list[Tensor]:
    """Masters and all that is kept of their moments."""
    found: list[Tensor] = []
    for master in optimizer.masters.values():
        found.append(master.detach())
        for moment in optimizer.adam.state[master].values():
            found += [moment.codes, moment.scales] if isinstance(moment, Packed) else [moment]
    return found


def interpret() -> None:
    """All comparisons with kernels on a CPU, for a process in which triton interprets."""
    optim.adamw_has_kernel = lambda weight: True  # type: ignore[assignment]
    compare_small("cpu", "int8")
    compare_small("cpu", "bfloat16")
    compare("cpu", torch.float32)
    compare("cpu", torch.bfloat16)
    compare_rounded("cpu")
    found = train("cpu", torch.bfloat16, steps=1)
    assert isinstance(found.adam, OnePass) and len(found.adam.tables) == 2


def test_interpreter_matches_torch() -> None:
    pytest.importorskip("triton")
    code = "from tests.backends.test_adamw import interpret; interpret()"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                         env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]


def test_plain_form_rounds_by_chance() -> None:
    compare_rounded("cpu")


def test_lost_updates_are_counted() -> None:
    """Each update is far below the spacing of bfloat16: rounding by chance moves few weights, and says so."""
    weight = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = Optimizer({"model.norm.weight": weight}, stage(lr=1e-4, weight_decay=0.0), masters="none")
    weight.grad = torch.ones_like(weight)
    lost = optimizer.step(0).lost
    moved = (weight != 1).sum()
    assert lost is not None and int(lost) == 10_000 - int(moved)
    # the spacing below 1 is 2^-8: one in 39 of them moves
    assert 10_000 * 1e-4 * 2**8 == pytest.approx(int(moved), rel=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_matches_torch(dtype: torch.dtype) -> None:
    compare("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_gpu_keeps_small_moments(kind: str) -> None:
    compare_small("cuda", kind)


@pytest.mark.gpu
def test_gpu_rounds_by_chance() -> None:
    compare_rounded("cuda")
