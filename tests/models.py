"""Tiny random teachers as folders on disk, with a byte-level tokenizer, for tests of every wing."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from radlads.families import FAMILIES
from radlads.spec import ModelSpec
from radlads.tensors import Raw, encode, read_header, read_raw, write_weights

DIMS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
    "vocab_size": 300, "rope_theta": 54321.0,
}  # fmt: skip
FLAGS: dict[str, dict[str, bool]] = {
    "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}, "llama": {}, "mistral": {}, "seed_oss": {"qkv_bias": True},
}  # fmt: skip
CONFIG_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "Once upon a time there was a little house by the sea, and in the house lived an old man and his cat.",
    "The cat said: the sea is high today. The old man said: then we stay in the house and tell a story.",
]


def tiny_spec(family: str = "qwen3", **overrides: Any) -> ModelSpec:
    """The spec of a tiny teacher; `overrides` are fields of ModelSpec."""
    return ModelSpec(**{"family": family, **DIMS, **FLAGS[family], **overrides})


def tiny_teacher(
    path: Path, family: str = "qwen3", seed: int = 0, tokenizer: bool = True, dtype: str = "F32", **overrides: Any
) -> Path:
    """Write a random teacher folder and return its path; `overrides` are fields of ModelSpec."""
    spec = tiny_spec(family, **overrides)
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    plan, tensors = {}, []
    for name, row in spec.tensors().items():
        values = rng.standard_normal(row.shape) * 0.05 + (1.0 if name.endswith("norm.weight") else 0.0)
        plan[name] = (dtype, row.shape)
        tensors.append((name, dtype, encode(values.astype(np.float32), dtype)))
    write_weights(path / "model.safetensors", tensors, plan)
    config = {**FAMILIES[family].write(spec), "dtype": CONFIG_DTYPES[dtype]}
    if tokenizer:
        ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
        config |= ids
        (path / "tokenizer.json").write_text(tiny_tokenizer(spec.vocab_size))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "eos_token": SPECIAL[0],
            "pad_token": SPECIAL[0],
            "model_max_length": spec.max_positions,
            "clean_up_tokenization_spaces": False,
        }
        (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
        (path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2], "pad_token_id": 0}, indent=2))
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return path


def rewrite(path: Path, change: Callable[[dict[str, tuple[str, Raw]]], object]) -> None:
    """Change the tensors of model.safetensors, given as name -> (dtype, raw)."""
    stored = {name: (entry.dtype, np.array(read_raw(entry))) for name, entry in read_header(path / "model.safetensors").items()}
    change(stored)
    plan = {name: (dtype, raw.shape) for name, (dtype, raw) in stored.items()}
    write_weights(path / "model.safetensors", [(name, dtype, raw) for name, (dtype, raw) in stored.items()], plan)


@lru_cache
def tiny_tokenizer(vocab_size: int) -> str:
    """`tokenizer.json` of a byte-level BPE trained on two sentences: 3 special tokens, 256 bytes, merges."""
    if vocab_size < len(SPECIAL) + 256:
        raise ValueError(f"a byte-level tokenizer needs {len(SPECIAL) + 256} tokens, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, 300), special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return str(tokenizer.to_str(pretty=True))
