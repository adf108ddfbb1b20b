"""Names and layouts of GGUF for the three teacher architectures and for rwkv6qwen2, as llama.cpp reads them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from radlads.spec import ModelSpec
from radlads.tensors import Raw
from radlads.weights_tools.lazy import Lazy, small
from radlads.weights_tools.rules import SAME, Rule, Transform, reshaped

RWKV6 = "rwkv6qwen2"
# Architecture of each teacher family that is read and written.
TEACHERS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPE_FREQS = "rope_freqs.weight"

LAYER, BLOCK = "model.layers.{i}.", "blk.{i}."
ATTENTION = LAYER + "self_attn."
TO_THEIRS = [3, 1, 2, 0, 4]  # slots r, k, v, w, g in the order w, k, v, r, g; the exchange undoes itself

TRANSPOSED = reshaped(lambda x: x.T, lambda x: x.T)
FLAT = reshaped(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1))
SHIFT_DOWN = reshaped(  # (D, 5 r) to (5 r, D), slots exchanged
    lambda x: x.T.reshape(5, -1, len(x))[TO_THEIRS].reshape(-1, len(x)),
    lambda x: x.reshape(5, -1, x.shape[1])[TO_THEIRS].reshape(-1, x.shape[1]).T,
)
# (5, r, D) to (5, D, r), slots exchanged
SHIFT_UP = reshaped(lambda x: x.transpose(0, 2, 1)[TO_THEIRS], lambda x: x[TO_THEIRS].transpose(0, 2, 1))


def stack(ours: Sequence[Lazy]) -> Lazy:
    """Five (1, 1, D) as one (5, 1, 1, D)."""
    width = ours[0].shape[-1]
    return Lazy(ours[0].dtype, (5, 1, 1, width), lambda start, stop: np.stack([x.whole() for x in ours])[start:stop])


def unstack(theirs: Lazy) -> Sequence[Lazy]:
    """The inverse of `stack`."""

    def slot(index: int) -> Lazy:
        return small(theirs, lambda x: x[index], theirs.shape[1:])

    return [slot(index) for index in range(theirs.shape[0])]


FUSED = Transform(stack, unstack)


def turned_heads(heads: int) -> Transform:
    """Rows of q and k of the llama architecture: halves of each head are interleaved there, for its pairing of RoPE."""

    def permute(tensor: Lazy, split: tuple[int, int]) -> Lazy:
        size = tensor.shape[0] // heads

        def change(rows: Raw) -> Raw:
            blocks = rows.reshape(-1, *split, *rows.shape[1:])
            return blocks.swapaxes(1, 2).reshape(rows.shape)

        def read(start: int, stop: int) -> Raw:
            first, last = start // size * size, -(-stop // size) * size
            return change(tensor.read(first, last))[start - first : stop - first]

        return Lazy(tensor.dtype, tensor.shape, read)

    def forward(ours: Sequence[Lazy]) -> Lazy:
        return permute(ours[0], (2, ours[0].shape[0] // heads // 2))

    def backward(theirs: Lazy) -> Sequence[Lazy]:
        return (permute(theirs, (theirs.shape[0] // heads // 2, 2)),)

    return Transform(forward, backward)


def frame_rules() -> list[Rule]:
    """What every architecture has: embedding, norms, feed-forward, head."""
    return [
        Rule("model.embed_tokens.weight", "token_embd.weight", SAME),
        Rule("model.norm.weight", "output_norm.weight", SAME),
        Rule("lm_head.weight", "output.weight", SAME),
        Rule(LAYER + "input_layernorm.weight", BLOCK + "attn_norm.weight", SAME),
        Rule(LAYER + "post_attention_layernorm.weight", BLOCK + "ffn_norm.weight", SAME),
        *(Rule(f"{LAYER}mlp.{name}_proj.{{x}}", f"{BLOCK}ffn_{name}.{{x}}", SAME) for name in ("gate", "up", "down")),
    ]


def teacher_rules(spec: ModelSpec) -> list[Rule]:
    """llama, qwen2 and qwen3."""
    turned = spec.family in ("llama", "mistral")
    q, k = (turned_heads(spec.H), turned_heads(spec.Hkv)) if turned else (SAME, SAME)
    return [
        *frame_rules(),
        Rule(ATTENTION + "q_proj.{x}", BLOCK + "attn_q.{x}", q),
        Rule(ATTENTION + "k_proj.{x}", BLOCK + "attn_k.{x}", k),
        Rule(ATTENTION + "v_proj.{x}", BLOCK + "attn_v.{x}", SAME),
        Rule(ATTENTION + "o_proj.{x}", BLOCK + "attn_output.{x}", SAME),
        Rule(ATTENTION + "q_norm.weight", BLOCK + "attn_q_norm.weight", SAME),
        Rule(ATTENTION + "k_norm.weight", BLOCK + "attn_k_norm.weight", SAME),
    ]


def rwkv6qwen2_rules(spec: ModelSpec) -> list[Rule]:
    """RAD-RWKV6 as the architecture rwkv6qwen2 (docs/formats.md)."""
    mix = BLOCK + "time_mix_"
    fused = tuple(f"{ATTENTION}time_maa_{slot}" for slot in "wkvrg")
    projections = {"q_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output", "gate": "gate"}
    return [
        *frame_rules(),
        *(Rule(f"{ATTENTION}{ours}.{{x}}", f"{mix}{theirs}.{{x}}", SAME) for ours, theirs in projections.items()),
        Rule(ATTENTION + "time_maa_x", mix + "lerp_x.weight", FLAT),
        Rule(fused, mix + "lerp_fused.weight", FUSED),
        Rule(ATTENTION + "time_maa_w1", mix + "w1.weight", SHIFT_DOWN),
        Rule(ATTENTION + "time_maa_w2", mix + "w2.weight", SHIFT_UP),
        Rule(ATTENTION + "time_decay", mix + "decay.weight", FLAT),
        Rule(ATTENTION + "time_decay_w1", mix + "decay_w1.weight", TRANSPOSED),
        Rule(ATTENTION + "time_decay_w2", mix + "decay_w2.weight", TRANSPOSED),
    ]


def rules_of(spec: ModelSpec) -> list[Rule]:
    """The table of a spec that GGUF can hold."""
    return rwkv6qwen2_rules(spec) if spec.recurrent else teacher_rules(spec)


def rope_factors(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> Raw:
    """What divides each RoPE frequency under Llama 3's scaling, (head_dim / 2,) float32."""
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((scaling["original_max_position_embeddings"] / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)
