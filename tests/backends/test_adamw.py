"""The AdamW kernel against torch.optim.AdamW, under Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from radlads.backends.torch.kernels.adamw import adamw_

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def compare(device: str, dtype: torch.dtype) -> None:
    """Five updates of an odd number of weights, with gradients to be halved; raises where a master differs."""
    torch.manual_seed(0)
    wanted = torch.nn.Parameter(torch.randn(4099, device=device))
    adam = torch.optim.AdamW([wanted], **SETTINGS)  # type: ignore[arg-type]
    master, weight = wanted.detach().clone(), wanted.detach().to(dtype, copy=True)
    moments, half = [torch.zeros_like(master) for _ in range(2)], torch.tensor(0.5, device=device)
    for number in range(1, 6):
        grad = torch.randn(4099, device=device).to(dtype)
        adamw_(weight, grad, master, *moments, factor=half, number=number, **SETTINGS)  # type: ignore[arg-type]
        wanted.grad = grad.float() / 2
        adam.step()
    torch.testing.assert_close(master, wanted.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(weight, master.to(dtype))


def test_interpreter_matches_torch() -> None:
    pytest.importorskip("triton")
    code = "import torch; from tests.backends.test_adamw import compare; compare('cpu', torch.float32)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                         env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=300)  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_matches_torch(dtype: torch.dtype) -> None:
    compare("cuda", dtype)
