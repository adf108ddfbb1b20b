"""Quantisation in numpy against MLX's own, to the bit; and whole folders against `mlx_lm convert` with the same policy."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.utils import dequantize_model, quantize_model

from radlads.folder import open_folder
from radlads.quantised import BITS
from radlads.tensors import encode, read_header, read_raw
from radlads.weights_tools.convert import convert
from radlads.weights_tools.formats.affine import dequantise, pack, quantise, scales_and_biases, unpack
from radlads.weights_tools.formats.format import Writing
from radlads.weights_tools.surgery import make_student
from tests.models import tiny_teacher

STORED = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}


def bits(array: Any) -> np.ndarray:
    """An MLX array, or raw bits of ours, as unsigned integers."""
    if isinstance(array, mx.array):
        array = np.array(array.view(mx.uint16) if array.itemsize == 2 else array.view(mx.uint32))
    return array.view(f"<u{array.itemsize}")


def awkward(rng: np.random.Generator) -> np.ndarray:
    """Rows of several sizes, and those where a scale is easily wrong: zero, constant, one-sided, tiny, whole numbers."""
    values = (rng.standard_normal((48, 256)) * rng.choice([1e-3, 1, 30], size=(48, 1))).astype(np.float32)
    values[0], values[1], values[2] = 0, 1.5, -abs(values[2])
    values[3, :5], values[4], values[5], values[6] = 1e-8, np.round(values[4]), 1e-9, -0.0
    return values


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("width", BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_rows_equal_mlx(dtype: str, width: int, group: int) -> None:
    raw = encode(awkward(np.random.default_rng(group)), dtype)
    array = mx.array(raw).view(mx.bfloat16) if dtype == "BF16" else mx.array(raw)
    expected = mx.quantize(array, group_size=group, bits=width)
    words = quantise(raw, dtype, width, group)
    scales, biases = (encode(part, dtype) for part in scales_and_biases(raw, dtype, width, group)[1:])
    for ours, theirs in zip((words, scales, biases), expected, strict=True):
        np.testing.assert_array_equal(bits(ours), bits(theirs))
    back = mx.dequantize(*expected, group_size=group, bits=width)
    np.testing.assert_array_equal(bits(dequantise(words, scales, biases, dtype, width)), bits(back))


@pytest.mark.parametrize("width", BITS)
def test_packing_is_undone(width: int) -> None:
    q = np.random.default_rng(0).integers(0, 2**width, (5, 64)).astype(np.uint8)
    np.testing.assert_array_equal(unpack(pack(q, width), width), q)


@pytest.mark.parametrize(("arch", "dtype", "width"), [("rwkv6", "BF16", 4), ("rwkv7", "F32", 8)])
def test_folder_equals_mlx_lm_convert_and_loads_in_stock_mlx_lm(arch: str, dtype: str, width: int, tmp_path: Path) -> None:
    teacher = open_folder(tiny_teacher(tmp_path / "teacher", dtype=dtype))
    make_student(teacher, tmp_path / "student", arch=arch, options={"gate": "full"}, keep_softmax=(1,))
    writing = Writing(bits=width, group_size=32)
    # The source becomes a folder with our model code first, as stock mlx-lm needs it.
    convert(tmp_path / "student", tmp_path / "float", "mlx")
    convert(tmp_path / "float", tmp_path / "ours", "mlx", writing=writing)
    trust = {"trust_remote_code": True}
    model, _, config = load(str(tmp_path / "float"), return_config=True, tokenizer_config=trust, **trust)
    model, config = quantize_model(model, config, 32, width)
    theirs = dict(flat(model.parameters()))
    ours = read_header(tmp_path / "ours" / "model.safetensors")
    assert set(ours) == set(theirs) and sum(name.endswith(".scales") for name in ours) > 10
    for name, entry in ours.items():
        np.testing.assert_array_equal(bits(np.array(read_raw(entry))), bits(theirs[name]), err_msg=name)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["quantization"] == config["quantization"] == written["quantization_config"]

    loaded, _ = load(str(tmp_path / "ours"), tokenizer_config=trust, **trust)
    tokens = mx.array([[5, 9, 200, 31]])
    np.testing.assert_array_equal(np.array(loaded(tokens).astype(mx.float32)), np.array(model(tokens).astype(mx.float32)))

    convert(tmp_path / "ours", tmp_path / "back", "hf")
    floats = dict(flat(dequantize_model(model).parameters()))
    for name, entry in open_folder(tmp_path / "back").weights.items():
        np.testing.assert_array_equal(bits(np.array(read_raw(entry))), bits(floats[name]), err_msg=name)


def test_what_gets_which_bits_is_told(tmp_path: Path) -> None:
    teacher = open_folder(tiny_teacher(tmp_path / "teacher"))
    make_student(teacher, tmp_path / "student", arch="rwkv7", options={"gate": "full"}, keep_softmax=(1,))
    said: list[str] = []
    convert(tmp_path / "student", tmp_path / "q", "mlx", writing=Writing(bits=4, group_size=32), say=said.append)
    lines = {line.partition(":")[0]: line for line in said}
    eight = next(line for label, line in lines.items() if label.startswith("8 bits"))
    assert {"k_proj", "v_proj", "gate"} <= set(eight.partition(": ")[2].partition(" (")[0].split(", "))
    assert any(label.startswith("4 bits in groups of 32, as asked") for label in lines)
    assert any("w1, w2" in line for line in said) and "bits per weight overall" in said[-1]
    # What is told is what was written, and a softmax layer's keys and values are as asked.
    few = open_folder(tmp_path / "q").quantised
    assert few["model.layers.0.self_attn.v_proj.weight"].bits == 8 and few["model.layers.1.self_attn.v_proj.weight"].bits == 4


def flat(tree: Any, prefix: str = "") -> list[tuple[str, mx.array]]:
    """(name, array) of nested parameters."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    pairs = [(f"{prefix}{name}", value) for name, value in items]
    return [row for name, value in pairs for row in ([(name, value)] if isinstance(value, mx.array) else flat(value, f"{name}."))]
