"""Model folder to Model and back, and new models from random weights."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from radlads.backends.torch.model import Model
from radlads.errors import fail
from radlads.folder import ModelFolder
from radlads.inits import first_values
from radlads.spec import ModelSpec
from radlads.tensors import Entry, read_raw

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_model(folder: ModelFolder, *, device: str | torch.device = "cpu", dtype: str | None = None) -> Model:
    """The model of `folder` in evaluation mode; `dtype` None keeps the file's own. R202 for a dtype torch cannot hold."""
    with torch.device("meta"):
        model = Model(folder.spec)
    wanted = None if dtype is None else DTYPES[dtype]
    weights = {name: read_tensor(folder.weights[name]).to(device, wanted) for name in folder.spec.tensors()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


def read_tensor(entry: Entry, rows: slice | None = None) -> torch.Tensor:
    """A stored tensor, or some rows of it, with its own dtype, in memory of its own: the file may change or vanish later."""
    if entry.dtype not in STORED:
        why = f"dtype {entry.dtype} is no float weight"
        fix = "Dequantise it with `radlads convert --to hf`, or use `--backend mlx`"
        raise fail("R202", where=f"{entry.path}: {entry.name}", why=why, fix=fix)
    raw = read_raw(entry)
    return torch.from_numpy(np.array(raw if rows is None else raw[rows])).view(STORED[entry.dtype])


def new_model(spec: ModelSpec, seed: int) -> Model:
    """A model with random weights: normal with deviation 0.02 (outputs of residual branches / sqrt(2 L)), norms 1, biases 0."""
    with torch.device("meta"):
        model = Model(spec)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, row in spec.tensors().items():
        if not row.copied:
            weights[name] = torch.from_numpy(first_values(name, row, spec, seed))
        elif len(row.shape) == 1:
            weights[name] = torch.full(row.shape, 0.0 if name.endswith("bias") else 1.0)
        else:
            branch_end = name.endswith(("o_proj.weight", "output.weight", "down_proj.weight"))
            deviation = 0.02 / (2 * spec.L) ** 0.5 if branch_end else 0.02
            weights[name] = torch.randn(row.shape, generator=generator) * deviation
    model.load_state_dict(weights, assign=True)
    return model


def stored_tensors(model: Model, dtype: str) -> Iterator[tuple[str, str, npt.NDArray[np.generic]]]:
    """(name, dtype, stored bits) of every tensor in file order, cast to "F32", "BF16" or "F16"."""
    state: dict[str, Any] = dict(model.named_parameters())
    for name in model.spec.tensors():
        tensor = state[name].detach()
        if hasattr(tensor, "full_tensor"):  # sharded: every process takes part, and each has the whole tensor for a moment
            tensor = tensor.full_tensor()
        tensor = tensor.to("cpu", STORED[dtype]).contiguous()
        yield name, dtype, (tensor.view(torch.uint16) if dtype == "BF16" else tensor).numpy()
