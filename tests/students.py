"""Tiny students as folders that load everywhere, every tensor moved away from its first value."""

from pathlib import Path

import numpy as np

from radlads.folder import ModelFolder, open_folder, save_folder
from radlads.tensors import encode
from radlads.weights_tools.standalone import model_files
from radlads.weights_tools.surgery import make_student
from tests.models import tiny_teacher


def tiny_student(path: Path, arch: str = "rwkv7", keep_softmax: tuple[int, ...] = (1,), dtype: str = "F32") -> ModelFolder:
    """A random student of two layers of `arch` and those kept as softmax, written under `path`."""
    teacher = open_folder(tiny_teacher(path / "teacher", intermediate_size=64, num_layers=2 + len(keep_softmax)))
    first = make_student(teacher, path / "first", arch=arch, keep_softmax=keep_softmax, options={})
    rng = np.random.default_rng(4)
    moved = []
    for name, row in first.spec.tensors().items():
        values = rng.standard_normal(row.shape) * 0.1 + (1.0 if name.endswith(("norm.weight", "ln_x.weight")) else 0.0)
        moved.append((name, dtype, encode(values.astype(np.float32), dtype)))
    files, extra = model_files(first.spec)
    return save_folder(
        path / "student", spec=first.spec, tensors=moved, source=first, dtype=dtype, manifest={"stage": 0},
        extra_files=files, config_extra=extra,
    )  # fmt: skip
