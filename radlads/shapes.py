"""Shapes of well-known teachers, so that a run can be planned before a byte is downloaded. Standard library only."""

from radlads.spec import ModelSpec

QWEN2 = {"family": "qwen2", "qkv_bias": True, "rope_theta": 1e6, "head_dim": 128}
QWEN3 = {"family": "qwen3", "qk_norm": True, "rope_theta": 1e6, "head_dim": 128, "vocab_size": 151936}
LLAMA3 = {"family": "llama", "rope_theta": 5e5, "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5}
SEED = {"family": "seed_oss", "qkv_bias": True, "rope_theta": 1e7}
NAMES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")


def _shape(family: dict[str, object], *sizes: int, **more: object) -> ModelSpec:
    return ModelSpec(**{**family, **dict(zip(NAMES, sizes, strict=True)), **more})  # type: ignore[arg-type]


# Heads and feed-forward are a guess that gives the 21 billion parameters of its card: good for a plan, and for nothing else.
REKA = _shape(LLAMA3, 6144, 19648, 44, 64, 8, head_dim=96, vocab_size=100352, rope_theta=8e6)
SHAPES = {
    "qwen2.5-0.5b": _shape(QWEN2, 896, 4864, 24, 14, 2, head_dim=64, vocab_size=151936, tie_embeddings=True),
    "qwen2.5-1.5b": _shape(QWEN2, 1536, 8960, 28, 12, 2, vocab_size=151936, tie_embeddings=True),
    "qwen2.5-3b": _shape(QWEN2, 2048, 11008, 36, 16, 2, vocab_size=151936, tie_embeddings=True),
    "qwen2.5-7b": _shape(QWEN2, 3584, 18944, 28, 28, 4, vocab_size=152064),
    "qwen2.5-14b": _shape(QWEN2, 5120, 13824, 48, 40, 8, vocab_size=152064),
    "qwen2.5-32b": _shape(QWEN2, 5120, 27648, 64, 40, 8, vocab_size=152064),
    "qwen2.5-72b": _shape(QWEN2, 8192, 29568, 80, 64, 8, vocab_size=152064),
    "qwq-32b": _shape(QWEN2, 5120, 27648, 64, 40, 8, vocab_size=152064),
    "qwen3-0.6b": _shape(QWEN3, 1024, 3072, 28, 16, 8, tie_embeddings=True),
    "qwen3-1.7b": _shape(QWEN3, 2048, 6144, 28, 16, 8, tie_embeddings=True),
    "qwen3-4b": _shape(QWEN3, 2560, 9728, 36, 32, 8, tie_embeddings=True),
    "qwen3-8b": _shape(QWEN3, 4096, 12288, 36, 32, 8),
    "qwen3-14b": _shape(QWEN3, 5120, 17408, 40, 40, 8),
    "qwen3-32b": _shape(QWEN3, 5120, 25600, 64, 64, 8),
    "meta-llama-3-8b": _shape(LLAMA3, 4096, 14336, 32, 32, 8),
    "llama-3.1-8b": _shape(LLAMA3, 4096, 14336, 32, 32, 8),
    "llama-3.3-70b": _shape(LLAMA3, 8192, 28672, 80, 64, 8),
    "seed-oss-36b": _shape(SEED, 5120, 27648, 64, 80, 8, head_dim=128, vocab_size=155136),
    "reka-flash-3": REKA,
    "reka-flash-3.1": REKA,
    "smollm2-135m": _shape(LLAMA3, 576, 1536, 30, 9, 3, head_dim=64, vocab_size=49152, rope_theta=1e5, tie_embeddings=True),
}


def known_shape(name: str) -> ModelSpec | None:
    """The shape of a teacher by its name or path, whatever its owner and ending: "Qwen/Qwen2.5-7B-Instruct"; None if unknown."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    found = [key for key in SHAPES if last == key or last.startswith(key + "-")]
    return SHAPES[max(found, key=len)] if found else None
