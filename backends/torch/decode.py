"""One token at a time for many rows, in memory of fixed size: what writes text in bulk.

The state never moves, so on a GPU a whole step is one CUDA graph: a small model is else bound by the launch of its kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from radlads.backends.torch.kernels.attend import attend
from radlads.backends.torch.layer_step import fed_step, mixed_step, step_has_kernels
from radlads.backends.torch.model import Model
from radlads.backends.torch.state import LayerState, MixContext
from radlads.positions import rope_depends_on_length

# Tokens whose logits exist at once while they are scored or measured: those of all would not fit beside two models of a large
# vocabulary.
LOGITS_AT_ONCE = 1024
# Steps before a graph is taken, in which kernels are compiled and libraries make their plans.
WARM_UP = 2


class Rows:
    """`count` rows of at most `length` tokens in a model: the caches of its softmax layers and the states of the others."""

    def __init__(self, model: Model, count: int, length: int) -> None:
        self.model, self.count = model, count
        self.device = model.model.norm.weight.device
        self.fused = step_has_kernels(model, count)
        # How many tokens each row has had; the same for all of them.
        self.seen = torch.zeros(1, dtype=torch.long, device=self.device)
        self.layers = empty_states(model, count, length)

    @torch.no_grad()
    def begin(self, tokens: Tensor) -> Tensor:
        """Begin all rows anew with tokens (count, T); hidden states (count, D) after the last of them."""
        hidden, state = self.model.model(tokens)
        for mixer, mine, found in zip(self.model.spec.mixers, self.layers, state.layers, strict=True):
            for name, value in found.items():
                if mixer == "softmax":
                    mine[name][:, :, : tokens.shape[1]] = value.transpose(1, 2)
                else:
                    mine[name].copy_(value)
        self.seen.fill_(tokens.shape[1])
        return hidden[:, -1]

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """One more token (count,) to each row; hidden states (count, D). Nothing waits for the device."""
        decoder = self.model.model
        x = decoder.embed_tokens(tokens)[:, None]
        context = MixContext(decoder.rotary(self.seen[None], x.dtype), in_place=True)
        filled = self.seen + 1
        layers: list[Any] = list(decoder.layers)
        for layer, mixer, held in zip(layers, self.model.spec.mixers, self.layers, strict=True):
            if mixer == "softmax":
                x = x + self.attend(layer.self_attn, layer.input_layernorm(x), context, held, filled)
            else:
                x = recurrent_step(layer, x, context, held, self.fused)
            x = feed_forward_step(layer, x, self.fused)
        self.seen += 1
        return decoder.norm(x)[:, 0]

    def attend(self, mixer: Any, x: Tensor, context: MixContext, held: LayerState, filled: Tensor) -> Tensor:
        """SoftmaxMixer.forward of one token, its keys and values written into the cache."""
        q, k, v = mixer.project(x, x, x, context.cos_sin if self.model.spec.mixer.kept_rope else None)
        for name, value in (("k", k), ("v", v)):
            held[name].index_copy_(2, self.seen, value.transpose(1, 2))
        return mixer.output_of(attend(q[:, 0], held["k"], held["v"], filled).flatten(1))[:, None]


def empty_states(model: Model, count: int, length: int = 0) -> list[LayerState]:
    """Zeros for `count` sequences in every layer: states (count, ...), or caches (count, Hkv, length, N) of softmax layers."""
    weight, spec = model.model.norm.weight, model.spec
    layers: list[LayerState] = []
    for mixer, shapes in zip(spec.mixers, spec.state(), strict=True):
        if mixer == "softmax":
            shapes = dict.fromkeys(("k", "v"), (spec.Hkv, length, spec.N))
        dtypes = {name: torch.float32 if name == "wkv" else weight.dtype for name in shapes}
        layers.append({n: torch.zeros(count, *shape, dtype=dtypes[n], device=weight.device) for n, shape in shapes.items()})
    return layers


def recurrent_step(layer: Any, x: Tensor, context: MixContext, held: LayerState, fused: bool) -> Tensor:
    """x (B, 1, D) plus the layer's mixer of its norm; the states `held`, or those of them in context.slots, in place."""
    if fused:
        return mixed_step(layer, x[:, 0], context, held)[:, None]
    slots = context.slots
    # The recurrence finds its states in the pool by itself; the others are small.
    mine = {name: value if slots is None or name == "wkv" else value[slots] for name, value in held.items()}
    mixed, new = layer.self_attn(layer.input_layernorm(x), context, mine)
    for name, value in new.items():
        if name == "wkv":
            continue
        if slots is None:
            held[name].copy_(value)
        else:
            held[name].index_copy_(0, slots.long(), value)
    return x + mixed


def feed_forward_step(layer: Any, x: Tensor, fused: bool) -> Tensor:
    """x (B, 1, D) plus the layer's feed-forward of its norm."""
    return fed_step(layer, x[:, 0])[:, None] if fused else x + layer.mlp(layer.post_attention_layernorm(x))


def captured(step: Callable[[], None], rows: Rows, generator: torch.Generator) -> Callable[[], None]:
    """`step` as a CUDA graph where that can be, itself elsewhere; it takes and leaves everything in tensors that stay.

    The warm-up runs it: whoever calls begins the rows anew afterwards. The generator is left as it was.
    """
    if rows.device.type != "cuda" or rope_depends_on_length(rows.model.spec):
        return step
    before = generator.get_state()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    generator.set_state(before)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def logits_of(model: Model, hidden: Tensor) -> Tensor:
    """Logits (B, V) float32 of hidden states (B, D)."""
    return F.linear(hidden, model.head).float()


def log_probabilities(model: Model, hidden: Tensor) -> Tensor:
    """log p (n, V) float32 after hidden states (n, D): n is at most LOGITS_AT_ONCE where there are many."""
    return logits_of(model, hidden).log_softmax(-1)


def draw(logits: Tensor, temp: float, generator: torch.Generator) -> Tensor:
    """One token for each row of logits (B, V) float32, shape (B,); temperature 0 is greedy.

    The largest of logits / temp plus Gumbel noise: a sample of the softmax without making it.
    """
    if temp == 0:
        return logits.argmax(-1)
    noise = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator)
    return (logits.div_(temp) - noise.log_()).argmax(-1)


