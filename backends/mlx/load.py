"""A model folder to a Model: every tensor goes through the checked header of radlads.tensors."""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from radlads.backends.mlx.model import Model, ModelArgs
from radlads.errors import fail
from radlads.folder import ModelFolder
from radlads.tensors import Entry, read_raw

MLX_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def load_model(folder: ModelFolder, dtype: str | None = None) -> Model:
    """The model of a teacher's or student's folder, for inference; `dtype` is a name of MLX_DTYPES, None keeps the file's.

    R101 for another dtype. Tensors that no model reads (a tied model's second head) are left in the file.
    """
    if dtype is not None and dtype not in MLX_DTYPES:
        raise fail("R101", where="dtype", why=f"{dtype!r} is none of {', '.join(MLX_DTYPES)}", fix="Choose one of these")
    model = Model(ModelArgs(radlads=folder.spec.to_dict()))
    if folder.quantised:
        nn.quantize(model, class_predicate=lambda path, _: few_bits(folder, f"{path}.weight"))
    weights = []
    for name, entry in stored_arrays(folder):
        x = read_array(entry)
        x = x if dtype is None or entry.dtype == "U32" else x.astype(MLX_DTYPES[dtype])
        mx.eval(x)  # one tensor at a time: the raw and the cast copy of a whole model need not fit together
        weights.append((name, x))
    model.load_weights(weights, strict=True)
    model.eval()
    return model


def few_bits(folder: ModelFolder, name: str) -> dict[str, Any] | bool:
    """How the matrix `name` is quantised, False where it is not."""
    few = folder.quantised.get(name)
    return False if few is None else {"bits": few.bits, "group_size": few.group_size, "mode": "affine"}


def stored_arrays(folder: ModelFolder) -> Iterator[tuple[str, Entry]]:
    """Every stored tensor by the name that MLX's modules give it."""
    for name in folder.spec.tensors():
        yield name, folder.weights[name]
        if name in folder.quantised:
            stem = name.removesuffix(".weight")
            yield f"{stem}.scales", folder.quantised[name].scales
            yield f"{stem}.biases", folder.quantised[name].biases


def read_array(entry: Entry) -> mx.array:
    """The tensor in its stored type; numpy holds bfloat16 as its bits."""
    x = mx.array(read_raw(entry))
    return x.view(mx.bfloat16) if entry.dtype == "BF16" else x
