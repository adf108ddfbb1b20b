"""The model: teacher and student are the same class, only `spec.mixers` differs. Names equal `spec.tensors()`.

Entry of the file that stock mlx-lm loads: it exports `Model` and `ModelArgs` and uses mlx-lm's own cache classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, create_ssm_mask

from radlads.backends.mlx.layers import FeedForward
from radlads.backends.mlx.mixers import MLX_MIXERS
from radlads.spec import ModelSpec


@dataclass
class ModelArgs(BaseModelArgs):
    """What is read of config.json: `radlads` holds `ModelSpec.to_dict()`."""

    radlads: dict[str, Any]
    model_type: str = "radlads"


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.self_attn = MLX_MIXERS[spec.mixers[layer]](spec, layer)
        self.mlp = FeedForward(spec)
        self.input_layernorm = nn.RMSNorm(spec.D, spec.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(spec.D, spec.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Any, cache: Any, carry: Any) -> tuple[mx.array, Any]:
        """x (B, T, D) to the next layer's input; `carry` is what the first recurrent layer leaves to later ones (7.5, H.4)."""
        mixed, carry = self.self_attn(self.input_layernorm(x), mask, cache, carry)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), carry


class Decoder(nn.Module):
    """Everything below the head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.V, spec.D)
        self.layers = [DecoderLayer(spec, layer) for layer in range(spec.L)]
        self.norm = nn.RMSNorm(spec.D, spec.rms_norm_eps)

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Token ids (B, T) to hidden states (B, T, D) after the last norm; the cache is moved on in place."""
        x = self.embed_tokens(tokens)
        caches = cache or [None] * self.spec.L
        masks: dict[bool, Any] = {}
        for mixer, layer_cache in zip(self.spec.mixers, caches, strict=True):
            softmax = mixer == "softmax"
            if softmax not in masks:  # the caches of one kind agree on their padding
                masks[softmax] = create_attention_mask(x, layer_cache) if softmax else create_ssm_mask(x, layer_cache)
        carry = None
        for mixer, layer, layer_cache in zip(self.spec.mixers, self.layers, caches, strict=True):
            x, carry = layer(x, masks[mixer == "softmax"], layer_cache, carry)
        return self.norm(x)


class Model(nn.Module):
    """A causal language model; ValueError from `ModelSpec.from_dict` when the description does not fit together."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.spec = ModelSpec.from_dict(args.radlads)
        self.model = Decoder(self.spec)
        if not self.spec.tie_embeddings:
            self.lm_head = nn.Linear(self.spec.D, self.spec.V, bias=False)

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Token ids (B, T) to logits (B, T, V); the cache is moved on in place."""
        return self.head(self.model(tokens, cache))

    def packed(self, tokens: mx.array, lengths: Sequence[int]) -> mx.array:
        """Logits (1, T, V) of sequences of these lengths, packed into tokens (1, T): each as if it stood alone.

        They become rows of one batch: what fills a row's end changes nothing before it.
        """
        longest, first, rows = max(lengths), 0, []
        for length in lengths:
            rows.append(mx.pad(tokens[0, first : first + length], (0, longest - length)))
            first += length
        hidden = self.model(mx.stack(rows))
        return self.head(mx.concatenate([hidden[row, :length] for row, length in enumerate(lengths)])[None])

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden states (..., D) to logits (..., V)."""
        return self.model.embed_tokens.as_linear(hidden) if self.spec.tie_embeddings else self.lm_head(hidden)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        return self.model.layers

    def make_cache(self) -> list[Any]:
        """An empty cache per layer: KVCache for softmax, ArraysCache for recurrent layers."""
        return [layer.self_attn.make_cache() for layer in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The weights of a folder without what no model reads: rotary tables, a tied model's second head."""
        unread = {"lm_head.weight"} if self.spec.tie_embeddings else set()
        return {name: x for name, x in weights.items() if name not in unread and not name.endswith("rotary_emb.inv_freq")}

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
        """Says how quantisation may treat a module, as its row does: not at all, as asked, or with bits of its own."""
        rows = self.spec.tensors()
        return lambda path, module: f"{path}.weight" not in rows or rows[f"{path}.weight"].quantisation()
