"""RAD-RWKV6, equations 6.1-6.8 of docs/mixers.md."""

import torch
from torch import Tensor

from radlads.backends.torch.kernels.decode import wkv6_step
from radlads.backends.torch.kernels.prologue import mixer_is_fused, wkv6_keys
from radlads.backends.torch.kernels.wkv6 import wkv6
from radlads.backends.torch.kernels.wkv6_plain import repeat_heads
from radlads.backends.torch.layers import (
    HeadNorm,
    Projections,
    declare,
    declare_gate,
    gate_of,
    gated,
    products,
    with_base,
)
from radlads.backends.torch.state import LayerState, MixContext
from radlads.spec import ModelSpec


class Rwkv6Mixer(Projections):
    """Token shift, vector decay, output gate."""

    time_maa_x: Tensor
    time_maa_r: Tensor
    time_maa_k: Tensor
    time_maa_v: Tensor
    time_maa_w: Tensor
    time_maa_g: Tensor
    time_maa_w1: Tensor
    time_maa_w2: Tensor
    time_decay: Tensor
    time_decay_w1: Tensor
    time_decay_w2: Tensor

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__(spec)
        D, C, ranks = spec.D, spec.C, spec.ranks
        if spec.mixer.token_shift:
            declare(self, time_maa_x=(1, 1, D), **{f"time_maa_{slot}": (1, 1, D) for slot in "rkvwg"})
            declare(self, time_maa_w1=(D, 5 * ranks.tokenshift), time_maa_w2=(5, ranks.tokenshift, D))
        declare(self, time_decay=(1, 1, C), time_decay_w1=(D, ranks.decay), time_decay_w2=(ranks.decay, C))
        declare_gate(self, spec)
        if spec.mixer.groupnorm:
            self.ln_x = HeadNorm(spec)

    def forward(self, x: Tensor, context: MixContext, state: LayerState) -> tuple[Tensor, LayerState]:
        """x (B, T, D) to the output (B, T, D) and the state `wkv` (B, H, N, N), `shift` (B, 1, D)."""
        opts, heads, mask = self.spec.mixer, self.spec.H, context.mask
        new_state: LayerState = {}
        x_r = x_k = x_v = x_w = x_g = x
        if opts.token_shift:
            if mask is not None:
                x = x * mask[..., None].to(x.dtype)
            x_r, x_k, x_v, x_w, x_g = self.shifted(x, self.previous(x, state, context))
            new_state["shift"] = last_real(x, state, mask)
        q, k, v = self.project(x_r, x_k, x_v, context.cos_sin if opts.rope else None)  # 6.3
        d = self.heads(self.time_decay + torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2)
        log_w, k = wkv6_keys(d, k, clamp=opts.clamp, balance=opts.balance, fused=mixer_is_fused(k))  # 6.4, 6.5
        k, v = repeat_heads(k, heads), repeat_heads(v, heads)
        if mask is not None:
            real = mask[..., None, None].to(k.dtype)
            k, v, log_w = k * real, v * real, log_w * real.float()
        log_w = log_w.to(q.dtype)  # half the bytes; a log-decay rounded moves less than what it decays, rounded
        if context.in_place:  # 6.6, 6.7
            new_state["wkv"] = state["wkv"]
            p = wkv6_step(
                q[:, 0], k[:, 0], v[:, 0], log_w[:, 0], state["wkv"], scale=self.spec.N**-0.5, slots=context.slots
            )[:, None]
        else:
            p, new_state["wkv"] = wkv6(
                q, k, v, log_w, state.get("wkv"), scale=self.spec.N**-0.5, min_log_w=opts.clamp, cu_seqlens=context.cu_seqlens
            )
        p = p.flatten(2)
        if opts.groupnorm:
            p = self.ln_x(p)
        gate = products(x_g, gate_of(self, self.spec))
        return self.output_of(gated(self, self.spec, p, gate)), new_state  # 6.8

    def previous(self, x: Tensor, state: LayerState, context: MixContext) -> Tensor:
        """x (B, T, D) one token earlier: the stored one before the first, zeros at the start of a sequence."""
        first = state["shift"].to(x.dtype) if "shift" in state else torch.zeros_like(x[:, :1])
        previous = torch.cat([first, x[:, :-1]], 1)
        if context.cu_seqlens is not None:
            previous = previous.index_fill(1, context.cu_seqlens[1:-1].long(), 0)
        return previous

    def shifted(self, x: Tensor, previous: Tensor) -> tuple[Tensor, ...]:
        """6.1, 6.2: five mixes of x and the previous token, both (B, T, D), in the order r, k, v, w, g."""
        delta = previous - x
        slots = torch.tanh((x + delta * self.time_maa_x) @ self.time_maa_w1).unflatten(-1, (5, -1))
        bases = torch.cat((self.time_maa_r, self.time_maa_k, self.time_maa_v, self.time_maa_w, self.time_maa_g))
        mixes = with_base(slots.flatten(0, 1).transpose(0, 1), self.time_maa_w2, bases)
        return tuple(x + delta * mix.view_as(x) for mix in mixes)


def last_real(x: Tensor, state: LayerState, mask: Tensor | None) -> Tensor:
    """The last unpadded input of each row (B, 1, D); the stored one where the row is all padding."""
    if mask is None:
        return x[:, -1:]
    steps = torch.arange(1, x.shape[1] + 1, device=x.device)
    last = (mask.long() * steps).amax(1)
    first = state["shift"].to(x.dtype) if "shift" in state else torch.zeros_like(x[:, :1])
    return torch.cat([first, x], 1)[torch.arange(len(x), device=x.device), last][:, None]
