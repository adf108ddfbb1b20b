"""The rwkv6qwen2 file against llama.cpp's graph, written down from its source and fed with what gguf-py reads."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from radlads.folder import open_folder
from radlads.oracle import oracle_logits
from radlads.tensors import read_float32
from radlads.weights_tools.convert import convert
from radlads.weights_tools.formats.format import Writing
from radlads.weights_tools.surgery import make_student
from tests.models import rewrite, tiny_teacher

TOKENS = [3, 77, 250, 12, 12, 199, 0, 41]


def graph(path: Path, tokens: list[int]) -> np.ndarray:
    """Logits (T, V) in float64. ggml's innermost dimension comes first in the comments."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: t.data.reshape(tuple(map(int, t.shape[::-1]))).astype(np.float64) for t in reader.tensors}
    keys = {name.removeprefix("rwkv6qwen2."): field.contents() for name, field in reader.fields.items()}
    size, kv_heads, eps = keys["wkv.head_size"], keys["attention.head_count_kv"], keys["attention.layer_norm_rms_epsilon"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * tensors[f"{name}.weight"]

    x = tensors["token_embd.weight"][tokens]
    steps, width = x.shape
    heads = width // size
    for layer in range(keys["block_count"]):
        block = f"blk.{layer}."

        def get(name: str, block: str = block) -> np.ndarray:
            return tensors.get(f"{block}time_mix_{name}", np.zeros(1))

        cur = norm(x, f"{block}attn_norm")
        back = np.vstack((np.zeros((1, width)), cur[:-1])) - cur
        mixed = np.tanh((back * get("lerp_x.weight") + cur) @ get("w1.weight").T).reshape(steps, 5, -1)
        mixed = np.einsum("tsr,sdr->std", mixed, get("w2.weight"))  # w2: {rank, width, 5}
        xw, xk, xv, xr, xg = (get("lerp_fused.weight")[i, 0] + mixed[i] for i in range(5))
        xw, xk, xv, xr, xg = (mix * back + cur for mix in (xw, xk, xv, xr, xg))
        r, k, v = (
            xs @ get(f"{name}.weight").T + get(f"{name}.bias") for xs, name in ((xr, "receptance"), (xk, "key"), (xv, "value"))
        )
        gate = 1 / (1 + np.exp(-(xg @ get("gate.weight").T)))
        k, v = (np.repeat(t.reshape(steps, kv_heads, size), heads // kv_heads, 1) for t in (k, v))
        decay = np.tanh(xw @ get("decay_w1.weight").T) @ get("decay_w2.weight").T + get("decay.weight")
        w = np.exp(-np.exp(decay)).reshape(steps, heads, size)
        k = k - k * w
        r = r.reshape(steps, heads, size)
        state, out = np.zeros((heads, size, size)), []
        for t in range(steps):
            state = state * w[t][:, :, None] + k[t][:, :, None] * v[t][:, None, :]
            out.append(np.einsum("hkv,hk->hv", state, r[t]) * size**-0.5)
        x = x + (np.array(out).reshape(steps, width) * gate) @ get("output.weight").T
        cur = norm(x, f"{block}ffn_norm")
        up = cur @ tensors[f"{block}ffn_gate.weight"].T
        x = x + (up / (1 + np.exp(-up)) * (cur @ tensors[f"{block}ffn_up.weight"].T)) @ tensors[f"{block}ffn_down.weight"].T
    return norm(x, "output_norm") @ tensors["output.weight"].T


@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_the_file_equal_those_of_the_student(tied: bool, tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher", "qwen2", num_heads=2, num_kv_heads=1, tie_embeddings=tied)
    make_student(open_folder(teacher), tmp_path / "student", arch="rwkv6", options={})
    rng = np.random.default_rng(3)

    def trained(stored) -> None:  # every new tensor must count
        for name, (_, raw) in stored.items():
            if "time_" in name or "gate" in name or name.endswith("bias"):
                raw[...] += rng.standard_normal(raw.shape) * (0.3 if "decay" not in name else 0.1)

    rewrite(tmp_path / "student", trained)
    (tmp_path / "student" / "radlads.json").unlink()
    student = open_folder(tmp_path / "student")
    weights = {name: read_float32(entry).astype(np.float64) for name, entry in student.weights.items()}
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    said: list[str] = []
    convert(student.path, tmp_path / "student.gguf", "gguf", writing=Writing(dtype="F32"), say=said.append)
    expected = oracle_logits(student.spec, weights, np.array(TOKENS))
    np.testing.assert_allclose(graph(tmp_path / "student.gguf", TOKENS), expected.reshape(len(TOKENS), -1), rtol=0, atol=1e-9)


def test_the_missing_clamp_is_stated_and_whether_it_matters(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher", "qwen2", num_heads=2, num_kv_heads=1)
    make_student(open_folder(teacher), tmp_path / "student", arch="rwkv6", options={})
    said: list[str] = []
    convert(tmp_path / "student", tmp_path / "a.gguf", "gguf", say=said.append)
    assert len(said) == 1 and "no input can reach the clamp" in said[0]
    rewrite(tmp_path / "student", lambda stored: stored["model.layers.1.self_attn.time_decay"][1].fill(np.log(5) - 0.01))
    convert(tmp_path / "student", tmp_path / "b.gguf", "gguf", say=said.append)
    assert "possible in 1 of 2 layers" in said[1]
