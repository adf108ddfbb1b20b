"""The model: teacher and student are the same class, only `spec.mixers` differs. Names equal `spec.tensors()`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radlads.backends.torch.layers import FeedForward, RMSNorm, Rotary
from radlads.backends.torch.mixers.register import TORCH_MIXERS
from radlads.backends.torch.state import LayerState, MixContext, ModelState, empty_state, positions_of, visible_keys
from radlads.spec import ModelSpec


class DecoderLayer(nn.Module):
    """x + mixer(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        self.self_attn = TORCH_MIXERS[spec.mixers[layer]](spec, layer)
        self.mlp = FeedForward(spec)
        self.input_layernorm = RMSNorm(spec.D, spec.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(spec.D, spec.rms_norm_eps)

    def forward(self, x: Tensor, context: MixContext, state: LayerState) -> tuple[Tensor, LayerState]:
        """x (B, T, D) to the next layer's input and this layer's new state."""
        mixed, state = self.self_attn(self.input_layernorm(x), context, state)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), state


class Decoder(nn.Module):
    """Everything below the head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed_tokens = nn.Embedding(spec.V, spec.D)
        self.layers = nn.ModuleList(DecoderLayer(spec, layer) for layer in range(spec.L))
        self.norm = RMSNorm(spec.D, spec.rms_norm_eps)
        self.rotary = Rotary(spec)

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Token ids (B, T) to hidden states (B, T, D) after the last norm, and the new state.

        mask (B, T): False marks padding, which changes nothing. cu_seqlens (n+1): sequences packed into B = 1.
        """
        state = state or empty_state(self.spec, len(tokens), tokens.device)
        x = self.embed_tokens(tokens)
        context, real = self.context(tokens, state, mask, cu_seqlens, x.dtype)
        layers = []
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            x, layer_state = layer(x, context, layer_state)
            layers.append(layer_state)
        count = tokens.shape[1] if mask is None else mask.long().sum(1)
        return self.norm(x), ModelState(tuple(layers), state.seen + count, real)

    def context(
        self, tokens: Tensor, state: ModelState, mask: Tensor | None, cu_seqlens: Tensor | None, dtype: torch.dtype
    ) -> tuple[MixContext, Tensor | None]:
        """The context of one call with tokens (B, T), and which keys of the softmax layers are real afterwards, (B, S)."""
        batch, length = tokens.shape
        kept = self.spec.kept_layers
        past = state.layers[kept[0]]["k"].shape[1] if kept and state.layers[kept[0]] else 0
        real = state.real
        if kept and (mask is not None or real is not None):
            before = real if real is not None else tokens.new_ones(batch, past, dtype=torch.bool)
            now = mask.bool() if mask is not None else tokens.new_ones(batch, length, dtype=torch.bool)
            real = torch.cat([before, now], 1)
        visible = visible_keys(real, past, length, cu_seqlens, tokens.device) if kept else None
        cos_sin = self.rotary(positions_of(tokens, state.seen, mask, cu_seqlens), dtype)
        return MixContext(cos_sin, visible, mask, cu_seqlens), real


class Model(nn.Module):
    """A causal language model of the given spec."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Decoder(spec)
        if not spec.tie_embeddings:
            self.lm_head = nn.Linear(spec.D, spec.V, bias=False)

    @property
    def head(self) -> Tensor:
        """The output matrix (V, D)."""
        return self.model.embed_tokens.weight if self.spec.tie_embeddings else self.lm_head.weight

    def forward(
        self, tokens: Tensor, state: ModelState | None = None, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """Token ids (B, T) to logits (B, T, V) and the new state; see Decoder.forward."""
        hidden, state = self.model(tokens, state, mask, cu_seqlens)
        return F.linear(hidden, self.head), state
