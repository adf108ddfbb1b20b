"""Sequence parallelism: each process holds a stretch of the same sequences, states pass from one to the next, layer by layer.

Forward, a mixer waits for the state at the end of the stretch before (`wkv` and `shift`, or the keys and values so far of a
kept softmax layer) and sends its own on; backward, the state's gradient comes back the other way. While one process is in
layer n, the one before is in layer n + 1, so all but (processes - 1) layers overlap. Exact: no approximation, no warm-up.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from radlads.backends.torch.model import Model
from radlads.backends.torch.state import LayerState, ModelState, empty_state
from radlads.backends.torch.world import World
from radlads.spec import ModelSpec


class Chain:
    """The `size` processes that share a sequence, in order; this one is at `place`, its neighbours have the ranks around."""

    def __init__(self, world: World, size: int) -> None:
        self.world, self.size = world, size
        self.place = world.rank % size
        self.sent: list[tuple[Any, Tensor]] = []
        self.group: Any = None
        if world.size > 1:
            import torch.distributed as dist

            self.group = dist.group.WORLD

    @property
    def last(self) -> bool:
        """Whether no process comes after this one."""
        return self.place == self.size - 1

    def send(self, tensors: list[Tensor], ahead: int) -> None:
        """Send tensors to the process `ahead` places on; returns before they have arrived."""
        import torch.distributed as dist

        for tensor in tensors:
            tensor = tensor.contiguous()
            self.sent.append((dist.isend(tensor, self.world.rank + ahead, group=self.group), tensor))

    def receive(self, likes: list[Tensor], ahead: int) -> list[Tensor]:
        """Tensors like the given ones from the process `ahead` places on."""
        import torch.distributed as dist

        found = []
        for like in likes:
            tensor = torch.empty(like.shape, dtype=like.dtype, device=self.world.device)
            dist.recv(tensor, self.world.rank + ahead, group=self.group)
            found.append(tensor)
        return found

    def finish(self) -> None:
        """Wait until everything sent has arrived, and let go of it."""
        for work, _ in self.sent:
            work.wait()
        self.sent.clear()


class TakeState(torch.autograd.Function):
    """x unchanged, and the state at the end of the stretch before; backward sends the state's gradient there."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, likes: list[Tensor], x: Tensor, anchor: Tensor) -> tuple[Tensor, ...]:
        """x (B, T, D); `anchor` requires a gradient, so that backward runs whether or not x does."""
        ctx.chain, ctx.likes = chain, likes
        return (x.view_as(x), *chain.receive(likes, -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *state: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradient of x, as it came."""
        grads = [torch.zeros_like(like) if g is None else g.to(like.dtype) for g, like in zip(state, ctx.likes, strict=True)]
        ctx.chain.send(grads, -1)
        return None, None, grad, None


class GiveState(torch.autograd.Function):
    """The mixer's output unchanged, its state sent on; backward takes the state's gradient from the next process."""

    @staticmethod
    def forward(ctx: Any, chain: Chain, out: Tensor, *state: Tensor) -> Tensor:
        """out (B, T, D)."""
        ctx.chain, ctx.likes = chain, [s.detach() for s in state]
        chain.send([s.detach() for s in state], 1)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the output and of the state."""
        return (None, grad, *ctx.chain.receive(ctx.likes, 1))


def state_like(spec: ModelSpec, layer: int, batch: int, before: int, dtype: torch.dtype, device: torch.device) -> LayerState:
    """Empty tensors of the state of `layer` after `before` tokens, on `device`."""
    if spec.mixers[layer] == "softmax":
        shape = (batch, before, spec.Hkv, spec.N)
        return {name: torch.empty(shape, dtype=dtype, device=device) for name in ("k", "v")}
    return {
        name: torch.empty(batch, *shape, dtype=torch.float32 if name == "wkv" else dtype, device=device)
        for name, shape in spec.state()[layer].items()
    }


def start_state(spec: ModelSpec, tokens: Tensor, chain: Chain, dtype: torch.dtype) -> ModelState:
    """The state a stretch of tokens (B, T) begins with: right positions, and shapes of what the mixers will receive."""
    batch, length = tokens.shape
    state = empty_state(spec, batch, tokens.device)
    if chain.place == 0:
        return state
    before = chain.place * length
    # On the meta device: the model reads only the number of keys from it, the values come layer by layer.
    layers = tuple(state_like(spec, layer, batch, before, dtype, torch.device("meta")) for layer in range(spec.L))
    return ModelState(layers, state.seen + before)


def link(model: Model, chain: Chain, dtype: torch.dtype) -> list[RemovableHandle]:
    """Make the mixers of `model`, which computes in `dtype`, take their states from the process before and pass them on.

    Removing the handles ends it.
    """
    anchor = torch.zeros((), requires_grad=True)
    layers: Any = model.model.layers

    def take(mixer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, context, state = given
        if chain.place == 0:
            return None
        names = sorted(state)
        x, *values = TakeState.apply(chain, [state[name] for name in names], x, anchor)
        return x, context, dict(zip(names, values, strict=True))

    def give(mixer: nn.Module, given: tuple[Any, ...], out: tuple[Tensor, LayerState]) -> tuple[Tensor, LayerState] | None:
        if chain.last:
            return None
        return GiveState.apply(chain, out[0], *(out[1][name] for name in sorted(out[1]))), out[1]

    def begin(decoder: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return given[0], start_state(model.spec, given[0], chain, dtype)

    handles = [model.model.register_forward_pre_hook(begin)]
    for layer in layers:
        handles.append(layer.self_attn.register_forward_pre_hook(take))
        # Before FSDP's own hook: backward must gather the weights, which takes all processes, before it waits for one.
        handles.append(layer.self_attn.register_forward_hook(give, prepend=True))
    return handles


def stretch(sample: Tensor, chain: Chain) -> Tensor:
    """This process's part of samples (B, T + 1): T / size tokens and the one after, as last label."""
    length = (sample.shape[1] - 1) // chain.size
    return sample[:, chain.place * length : (chain.place + 1) * length + 1]
