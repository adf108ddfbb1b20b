"""Teachers of every family on both backends against stock transformers, and a real one that writes its published text."""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.models.cache import BatchKVCache

from radlads.backends import open_engine
from radlads.backends.mlx.load import load_model as load_mlx
from radlads.backends.torch.load import load_model
from radlads.errors import RadladsError
from radlads.families import read_config
from radlads.folder import open_folder
from radlads.sampling import Sampling
from radlads.session import stream
from radlads.tokenizer import Tokenizer
from tests.backends.test_torch_model import LLAMA3
from tests.models import tiny_teacher

SHARED = Path(os.environ.get("RADLADS_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32.0}
LONG = {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32.0}
LONG |= {"short_factor": [1.0 + i / 40 for i in range(16)], "long_factor": [1.0 + i / 4 for i in range(16)]}


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_embeddings": True, "head_dim": 16}),
        ("qwen3", {}),
        ("qwen3", {"tie_embeddings": True, "num_kv_heads": 1, "head_dim": 64}),
        ("qwen3", {"qkv_bias": True, "output_bias": True}),
        ("llama", {"rope_scaling": LLAMA3}),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "num_kv_heads": 4}),
        ("llama", {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "tie_embeddings": True}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_positions": 32}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_positions": 64}),
        ("llama", {"rope_scaling": YARN}),
        ("qwen2", {"rope_scaling": {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False, "mscale": 0.7,
                                    "mscale_all_dim": 1.2}}),
        ("qwen3", {"rope_scaling": {**YARN, "attention_factor": 1.3}}),
        ("llama", {"rope_scaling": LONG}),
        ("llama", {"rope_scaling": {**LONG, "original_max_position_embeddings": 64.0}}),
        ("mistral", {"head_dim": 24}),
        ("seed_oss", {"num_heads": 10, "mlp_bias": True, "output_bias": True}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_teacher_equals_stock_transformers(tmp_path: Path, family: str, flags: dict[str, object]) -> None:
    from transformers import AutoModelForCausalLM

    path = tiny_teacher(tmp_path / "teacher", family, **flags)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :11] = 0
    whole = stock(tokens).logits
    padded = stock(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[0, 11:]
    first = stock(tokens[:, :30], use_cache=True)
    parts = first.logits.clone(), stock(tokens[:, 30:], past_key_values=first.past_key_values).logits

    model = load_model(open_folder(path))
    assert apart(model(tokens)[0], whole) <= 1e-5
    assert apart(model(tokens, None, mask.bool())[0][0, 11:], padded) <= 1e-5
    logits, state = model(tokens[:, :30])
    assert apart(logits, parts[0]) <= 1e-5 and apart(model(tokens[:, 30:], state)[0], parts[1]) <= 1e-5

    mlx_model, ids = load_mlx(open_folder(path)), mx.array(tokens.numpy())
    assert apart(mlx_model(ids), whole) <= 1e-5
    assert apart(mlx_model(ids, [BatchKVCache([11, 0]) for _ in mlx_model.layers])[0, 11:], padded) <= 1e-5
    cache = mlx_model.make_cache()
    assert apart(mlx_model(ids[:, :30], cache), parts[0]) <= 1e-5 and apart(mlx_model(ids[:, 30:], cache), parts[1]) <= 1e-5


def apart(found: mx.array | torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference."""
    values = found.numpy() if isinstance(found, torch.Tensor) else np.array(found)
    return float(np.abs(values - wanted.numpy()).max())


# What `./run stories260K.bin -z tok512.bin -t 0.0 -n 200` prints, as test_all.py of karpathy/llama2.c (MIT) has it.
STORY = """Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, \
red ball. She wanted to play with it, but it was too high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to do. She said, "I want to play with your \
ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know what to do."
Lily didn't want to help her mom, so she"""


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_real_teacher_writes_its_published_text(backend: str) -> None:
    path = SHARED / "stories260K" / "hf"
    if not path.is_dir():
        pytest.skip(f"the shared data is absent ({path}); set RADLADS_SHARED_DATA")
    folder = open_folder(path)
    tokenizer = Tokenizer(folder.path, vocab_size=folder.spec.V)
    assert "".join(stream(open_engine(folder, backend), tokenizer, [1], Sampling(), 200)).strip() == STORY


def config(**changes: object) -> dict[str, object]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 9}
    return {"model_type": "llama", **sizes, "max_position_embeddings": 128, **changes}


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({}, 1e4, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_theta": 5e5}, 7e4, None),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, 5e5, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 32}},
            1e4,
            {"rope_type": "yarn", "original_max_position_embeddings": 32.0, "factor": 4.0, "truncate": True},
        ),
    ],
)
def test_rope_is_read_as_transformers_reads_it(keys: dict[str, object], theta: float, scaling: dict[str, object]) -> None:
    spec = read_config(config(**keys))
    assert (spec.rope_theta, spec.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"rope_scaling": {"rope_type": "linear"}}, "R204.*rope factor.*missing"),
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "R205.*'su'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "R204.*short_factor.*8 numbers",
        ),
        ({"partial_rotary_factor": 0.5}, "R205.*part of each head"),
        ({"model_type": "mistral"}, None),
        ({"model_type": "mistral", "max_position_embeddings": 8192}, "R205.*window of 4096"),
        ({"model_type": "mistral", "max_position_embeddings": 8192, "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 64}, "R205.*window of 64"),
    ],
)
def test_what_is_not_supported_is_refused(keys: dict[str, object], reason: str | None) -> None:
    if reason is None:
        assert read_config({**config(num_key_value_heads=2), **keys}).num_kv_heads == 2
        return
    with pytest.raises(RadladsError, match=reason):
        read_config({**config(num_key_value_heads=2), **keys})
