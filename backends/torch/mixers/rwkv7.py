"""RAD-RWKV7, equations 7.1-7.9 of docs/mixers.md."""

import torch
from torch import Tensor

from radlads.backends.torch.kernels.decode import wkv7_step
from radlads.backends.torch.kernels.prologue import RWKV7_MIN_LOG_W, blended, mixer_is_fused, wkv7_keys
from radlads.backends.torch.kernels.wkv6_plain import repeat_heads
from radlads.backends.torch.kernels.wkv7 import wkv7
from radlads.backends.torch.layers import (
    HeadNorm,
    Projections,
    declare,
    declare_gate,
    gate_of,
    gated,
    with_base,
)
from radlads.backends.torch.state import LayerState, MixContext
from radlads.spec import ModelSpec

# How each variant makes its keys (7.4).
FORMS = {"A": "scaled_rate", "B": "scaled", "C": "decay"}


class Rwkv7Mixer(Projections):
    """Generalised delta rule with value residual; variants A, B and C."""

    w0: Tensor
    w1: Tensor
    w2: Tensor
    a0: Tensor
    a1: Tensor
    a2: Tensor
    v0: Tensor
    v1: Tensor
    v2: Tensor
    k_k: Tensor
    k_a: Tensor

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__(spec)
        D, C, ranks = spec.D, spec.C, spec.ranks
        declare(self, w0=(1, 1, C), w1=(D, ranks.decay), w2=(ranks.decay, C))
        declare(self, a0=(1, 1, C), a1=(D, ranks.iclr), a2=(ranks.iclr, C))
        declare(self, v0=(1, 1, C), v1=(D, ranks.value_residual), v2=(ranks.value_residual, C))
        declare_gate(self, spec)
        declare(self, k_k=(1, 1, C), k_a=(1, 1, C), r_k=(spec.H, spec.N))
        if spec.mixer.groupnorm:
            self.ln_x = HeadNorm(spec)

    def forward(self, x: Tensor, context: MixContext, state: LayerState) -> tuple[Tensor, LayerState]:
        """x (B, T, D) to the output (B, T, D) and the state `wkv` (B, H, N, N)."""
        opts, heads, carry, mask = self.spec.mixer, self.spec.H, context.carry, context.mask
        later = "v_first" in carry
        maps = (self.w1, self.a1, *((self.v1,) if later else ()), *gate_of(self, self.spec))
        r, k, v, x_w, x_a, *rest = self.project(x, x, x, context.cos_sin if opts.rope else None, maps)  # 7.1
        fused = mixer_is_fused(k)
        w0 = 2 * self.w0 if opts.variant == "A" else self.w0
        d = self.heads(w0 + torch.tanh(x_w) @ self.w2)
        a = self.heads(with_base(x_a, self.a2, self.a0))
        scales = () if opts.variant == "C" else (self.k_k, self.k_a)
        log_w, k, removal, beta = wkv7_keys(d, k, a, FORMS[opts.variant], *scales, fused=fused)  # 7.2 to 7.4
        if later:  # 7.5
            x_v, *rest = rest
            v = blended(v, carry["v_first"], self.heads(with_base(x_v, self.v2, self.v0)), fused=fused)
        else:
            v = carry["v_first"] = v if fused else repeat_heads(v, heads)
        if mask is not None:
            real = mask[..., None, None].to(k.dtype)
            k, v, removal, log_w = k * real, v * real, removal * real, log_w * real.float()
        log_w = log_w.to(r.dtype)  # half the bytes; a log-decay rounded moves less than what it decays, rounded
        scale = 1.0 if opts.groupnorm else self.spec.N**-0.5  # of 7.8
        if context.in_place:  # 7.6, 7.7
            wkv = state["wkv"]
            p = wkv7_step(
                r[:, 0], log_w[:, 0], k[:, 0], v[:, 0], removal[:, 0], beta[:, 0], wkv, scale=scale, slots=context.slots
            )[:, None]
        else:
            p, wkv = wkv7(
                r, log_w, k, v, removal, beta, state.get("wkv"), scale=scale, min_log_w=RWKV7_MIN_LOG_W,
                cu_seqlens=context.cu_seqlens,
            )  # fmt: skip
        p = p.flatten(2)
        p = self.ln_x(p) if opts.groupnorm else p
        return self.output_of(gated(self, self.spec, p, rest)), {"wkv": wkv}  # 7.9
