"""Makes the golden files of the MLX self-test: both recurrences and their gradients, token by token in float64.

Run: python -m tests.golden.make
"""

import numpy as np
import torch

from radlads.backends.mlx.kernels.gpu import LANES
from radlads.backends.mlx.selftest import GOLDENS, OPS, SCALE, Arrays, condensed, golden_inputs
from tests.backends.test_mlx_kernels import loop


def golden(op: str, head_size: int) -> Arrays:
    """The results of one golden file."""
    arrays = golden_inputs(op, head_size)
    names = OPS[op][1]
    inputs = [torch.tensor(arrays[name], dtype=torch.float64, requires_grad=True) for name in names]
    results = loop(op, inputs, SCALE)
    sum((x * torch.tensor(arrays[f"slope of {name}"])).sum() for name, x in zip(("p", "last"), results, strict=True)).backward()
    found = dict(zip(("p", "last"), results, strict=True)) | {f"d {name}": x.grad for name, x in zip(names, inputs, strict=True)}
    return {name: x.astype(np.float32) for name, x in condensed({k: x.detach().numpy() for k, x in found.items()}).items()}


if __name__ == "__main__":
    for op in OPS:
        for head_size in LANES:
            np.savez_compressed(GOLDENS / f"{op}-{head_size}.npz", **golden(op, head_size))
