"""The reader of torch.save files against torch.load, and what it must never do."""

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radlads.errors import RadladsError
from radlads.tensors import read_raw
from radlads.weights_tools.formats.pth_file import read_pth

torch = pytest.importorskip("torch")

DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
)  # fmt: skip


def some_state() -> dict[str, Any]:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = collections.OrderedDict({f"w.{dtype}": base.to(dtype) for dtype in DTYPES})
    state |= {"tied": base, "head": base, "rows": base[1:3], "one": base[2, 3], "column": base[:, 2:3].clone(), "empty": base[:0]}
    state |= {"flag": base > 3, "parameter": torch.nn.Parameter(base[0].clone()), "flat": torch.ones(1, 5, 1).transpose(0, 2)}
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    return state


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
def test_tensors_are_those_of_torch(nest: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(some_state() if nest is None else {nest: some_state(), "step": 3}, path)
    theirs = torch.load(path, weights_only=True)
    theirs = theirs if nest is None else theirs[nest]
    ours = read_pth(path)
    assert list(ours) == list(theirs)
    for name, entry in ours.items():
        tensor = theirs[name].detach()
        expected = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
        raw = read_raw(entry)
        assert raw.dtype == expected.numpy().dtype and raw.shape == tuple(tensor.shape), name
        np.testing.assert_array_equal(raw, expected.numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": torch.zeros(3, 4).T}, "tensor a is a view with strides"),
        ({"a": torch.zeros(1).expand(3)}, "tensor a is a view with strides"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "torch.ComplexFloatStorage"),
        ({"a": torch.zeros(2, dtype=torch.uint16)}, "_rebuild_tensor_v3"),
        ({"a": torch.zeros(2).to_sparse()}, "which no state dict needs"),
        ({"a": torch.zeros(2), "step": 3}, "'step' is no tensor"),
        ({"a": np.zeros(2)}, "which no state dict needs"),
        ([torch.zeros(2)], "which no state dict needs"),
        (torch.zeros(2), "no state dict"),
        (torch.nn.Linear(2, 2), "which no state dict needs"),
    ],
)
def test_what_is_no_plain_state_dict_is_refused_by_name(value: object, words: str, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(RadladsError, match="R202") as caught:
        read_pth(tmp_path / "x.pth")
    assert words in caught.value.why


def test_the_old_format_names_the_fix(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(RadladsError, match=r"R202.*before 1\.6.*weights_only=True"):
        read_pth(tmp_path / "x.pth")


class Evil:
    """Its pickle runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_nothing_is_executed(tmp_path: Path) -> None:
    evil = Evil(f"touch {tmp_path / 'executed'}")
    pickle.loads(pickle.dumps(evil))
    assert (tmp_path / "executed").exists()  # the bait works
    (tmp_path / "executed").unlink()
    torch.save({"a": torch.zeros(2), "b": evil}, tmp_path / "x.pth")
    with pytest.raises(RadladsError, match=r"posix\.system.*nothing was executed"):
        read_pth(tmp_path / "x.pth")
    assert not (tmp_path / "executed").exists()
