"""Full-size dimensions of the teachers that the built-in recipes name (protocol section 4.3; the rest as remarked)."""

from typing import Any

from radlads.spec import ModelSpec

NAMES = ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "vocab_size")


def spec_of(family: str, dims: tuple[int, ...], **more: Any) -> ModelSpec:
    return ModelSpec(family, **dict(zip(NAMES, dims, strict=True)), **more)


QWEN25_7B = spec_of("qwen2", (3584, 18944, 28, 28, 4, 128, 152064), rope_theta=1e6, qkv_bias=True)
QWEN25_32B = spec_of("qwen2", (5120, 27648, 64, 40, 8, 128, 152064), rope_theta=1e6, qkv_bias=True)
TEACHERS = {
    "Qwen/Qwen2.5-7B": QWEN25_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN25_7B,
    "Qwen/Qwen2.5-32B-Instruct": QWEN25_32B,
    "Qwen/QwQ-32B": QWEN25_32B,
    "Qwen/Qwen2.5-72B-Instruct": spec_of("qwen2", (8192, 29568, 80, 64, 8, 128, 152064), rope_theta=1e6, qkv_bias=True),
    "Qwen/Qwen3-0.6B": spec_of(
        "qwen3", (1024, 3072, 28, 16, 8, 128, 151936), rope_theta=1e6, qk_norm=True, tie_embeddings=True
    ),
    "Qwen/Qwen3-8B": spec_of("qwen3", (4096, 12288, 36, 32, 8, 128, 151936), rope_theta=1e6, qk_norm=True),
    "Qwen/Qwen3-14B": spec_of("qwen3", (5120, 17408, 40, 40, 8, 128, 151936), rope_theta=1e6, qk_norm=True),
    "Qwen/Qwen3-32B": spec_of("qwen3", (5120, 25600, 64, 64, 8, 128, 151936), rope_theta=1e6, qk_norm=True),
    "meta-llama/Meta-Llama-3-8B-Instruct": spec_of("llama", (4096, 14336, 32, 32, 8, 128, 128256), rope_theta=5e5),
    # A file of its own (recipe smollm2-135m); numbers of its header.
    "SmolLM2-135M-Instruct.Q4_1.gguf": spec_of(
        "llama", (576, 1536, 30, 9, 3, 64, 49152), rope_theta=1e5, rms_norm_eps=1e-5, tie_embeddings=True
    ),
    # Head geometry and feed-forward width are a guess that gives the published 21 B (peers section 5).
    "RekaAI/reka-flash-3": spec_of("llama", (6144, 19648, 44, 64, 8, 96, 100352), rope_theta=8e6, rms_norm_eps=1e-5),
    "RekaAI/reka-flash-3.1": spec_of("llama", (6144, 19648, 44, 64, 8, 96, 100352), rope_theta=8e6, rms_norm_eps=1e-5),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": spec_of(
        "seed_oss", (5120, 27648, 64, 80, 8, 128, 155136), rope_theta=1e7, qkv_bias=True
    ),
}
