"""Weights and numbers that nobody here made: the public op inside stock RWKV-7, and a small real Llama in two containers."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radlads.backends.torch.kernels.wkv7 import wkv7
from radlads.backends.torch.load import load_model
from radlads.folder import open_folder
from radlads.tensors import read_float32

DATA = Path(os.environ.get("RADLADS_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
TINY = DATA / "rwkv_tiny"
STORIES = DATA / "stories260K"


def read_rwkv_cpp(path: Path) -> dict[str, Tensor]:
    """Tensors of a float32 file of rwkv.cpp: a header of 24 bytes, then rank, name length, type, sizes (innermost first)."""
    data, position, found = path.read_bytes(), 24, {}
    while position < len(data):
        rank, length, kind = struct.unpack_from("<3i", data, position)
        sizes = struct.unpack_from(f"<{rank}i", data, position + 12)[::-1]
        start = position + 12 + 4 * rank
        name, count = data[start : start + length].decode(), int(np.prod(sizes))
        assert kind == 0
        found[name] = torch.from_numpy(np.frombuffer(data, "<f4", count, start + length).copy().reshape(sizes))
        position = start + length + 4 * count
    return found


def stock_rwkv7(weights: dict[str, Tensor], tokens: list[int], layers: int = 12, head_size: int = 64) -> Tensor:
    """Logits (T, V) of plain RWKV-7 as its authors define it, with our op as the recurrence."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def shifted(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 1, -1)) - x

    x = norm(weights["emb.weight"][torch.tensor(tokens)], "blocks.0.ln0")
    steps, width = x.shape
    heads = width // head_size
    first = None
    for layer in range(layers):
        block = f"blocks.{layer}."

        def part(name: str, block: str = block) -> Tensor:
            return weights[f"{block}att.{name}"]

        def low_rank(x: Tensor, letter: str, squash=lambda y: y, part=part) -> Tensor:
            return squash(x @ part(f"{letter}1").T) @ part(f"{letter}2").T

        y = norm(x, f"{block}ln1")
        xr, xw, xk, xv, xa, xg = (y + shifted(y) * mix for mix in part("x_rwkvag")[:, 0])
        r, k, v = xr @ part("receptance.weight").T, xk @ part("key.weight").T, xv @ part("value.weight").T
        a = torch.sigmoid(low_rank(xa, "a") + part("a0").view(-1))
        log_w = -(np.exp(-0.5)) * torch.sigmoid(low_rank(xw, "w", torch.tanh) + part("w0").view(-1))
        removed = F.normalize((k * part("k_k").view(-1)).view(steps, heads, head_size), dim=-1)
        k = k * (1 + (a - 1) * part("k_a").view(-1))
        first = v if first is None else first
        if layer:
            v = v + (first - v) * torch.sigmoid(low_rank(xv, "v") + part("v0").view(-1))
        r, log_w, k, v, a = (t.view(1, steps, heads, head_size) for t in (r, log_w, k, v, a))
        out, _ = wkv7(r, log_w, k, v, -removed[None], removed[None] * a)
        out = F.group_norm(out.reshape(steps, width), heads, part("ln_x.weight"), part("ln_x.bias"), 64e-5)
        bonus = ((r * k * part("r_k").view(heads, head_size)).sum(-1, keepdim=True) * v).view(steps, width)
        x = x + ((out + bonus) * low_rank(xg, "g", torch.sigmoid)) @ part("output.weight").T
        y = norm(x, f"{block}ln2")
        hidden = (y + shifted(y) * weights[f"{block}ffn.x_k"].view(-1)) @ weights[f"{block}ffn.key.weight"].T
        x = x + torch.relu(hidden) ** 2 @ weights[f"{block}ffn.value.weight"].T
    return norm(x, "ln_out") @ weights["head.weight"].T


@pytest.mark.skipif(not TINY.is_dir(), reason=f"rwkv.cpp's tiny models are not at {TINY} (RADLADS_SHARED_DATA)")
def test_our_op_in_the_stock_block_gives_the_published_logits_of_rwkv_cpp() -> None:
    weights = read_rwkv_cpp(TINY / "tiny-rwkv-7v0-834K-FP32.bin")
    expected = np.fromfile(TINY / "expected-logits-7v0-834K.bin", "<f4")
    logits = stock_rwkv7(weights, list(b'"in'))[-1].numpy()
    assert np.abs(logits - expected).max() < 1e-5
    # Many chunks, too: the last position of a long prompt is the same whether it was run whole or from a shorter start.
    prompt = list(b'"I think that we should go to the river and see the old bridge," said the man. ' * 3)
    whole = stock_rwkv7(weights, prompt)
    torch.testing.assert_close(stock_rwkv7(weights, prompt[:100]), whole[:100], rtol=0, atol=2e-5)


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"stories260K is not at {STORIES} (RADLADS_SHARED_DATA)")
def test_stories260k_of_llama2_c_is_the_hugging_face_folder() -> None:
    data = (STORIES / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, _ = struct.unpack_from("<7i", data)
    values, position = np.frombuffer(data, "<f4", offset=28), 0
    shapes = {
        "embed_tokens": (vocab, dim), "input_layernorm": (layers, dim), "q_proj": (layers, dim, dim),
        "k_proj": (layers, dim * kv_heads // heads, dim), "v_proj": (layers, dim * kv_heads // heads, dim),
        "o_proj": (layers, dim, dim), "post_attention_layernorm": (layers, dim), "gate_proj": (layers, hidden, dim),
        "down_proj": (layers, dim, hidden), "up_proj": (layers, hidden, dim), "norm": (dim,),
    }  # fmt: skip
    folder = open_folder(STORIES / "hf")
    seen = set()
    for name, shape in shapes.items():
        tensor = values[position : position + int(np.prod(shape))].reshape(shape)
        position += tensor.size
        if name in ("q_proj", "k_proj"):  # pairs of neighbours there, halves of a head here
            count = heads if name == "q_proj" else kv_heads
            tensor = tensor.reshape(layers, count, -1, 2, dim).swapaxes(2, 3).reshape(shape)
        for full, entry in folder.weights.items():
            if f".{name}." in full:
                seen.add(full)
                layer = int(full.split(".")[2]) if len(shape) > 1 and name != "embed_tokens" else None
                np.testing.assert_array_equal(read_float32(entry), tensor if layer is None else tensor[layer], err_msg=full)
    assert seen == set(folder.weights)
    model = load_model(folder)
    ids = [1]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
    pieces = tokens_of(STORIES / "tok512.bin")
    assert b"".join(pieces[i] for i in ids[1:]).startswith(b" Once upon a time, there was a")


def tokens_of(path: Path) -> list[bytes]:
    """The pieces of llama2.c's tokenizer."""
    data, position, found = path.read_bytes(), 4, []
    while position < len(data):
        _, length = struct.unpack_from("<fi", data, position)
        found.append(data[position + 8 : position + 8 + length])
        position += 8 + length
    return found
