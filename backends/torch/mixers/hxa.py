"""hxa079, hxa07A, hxa07B and hxa07C, equations H.1-H.11 of docs/mixers.md."""

import torch
from torch import Tensor

from radlads.backends.torch.kernels.decode import wkv7_step
from radlads.backends.torch.kernels.prologue import RWKV7_MIN_LOG_W, mixer_is_fused, wkv7_keys
from radlads.backends.torch.kernels.wkv6_plain import repeat_heads
from radlads.backends.torch.kernels.wkv7 import wkv7
from radlads.backends.torch.layers import Projections, declare
from radlads.backends.torch.state import LayerState, MixContext
from radlads.mixers.hxa import HXA_FORMS, HXA_NAMES
from radlads.spec import ModelSpec


class HxaMixer(Projections):
    """Generalised delta rule with balanced keys; the four kinds differ by their HxaForm."""

    w0: Tensor
    w1: Tensor
    w2: Tensor
    a0: Tensor
    a1: Tensor
    a2: Tensor
    v0: Tensor
    v1: Tensor
    v2: Tensor
    k0: Tensor
    k1: Tensor
    k2: Tensor
    g1: Tensor
    g2: Tensor
    r_k: Tensor

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__(spec, HXA_NAMES)
        self.form = HXA_FORMS[spec.mixers[layer]]
        D, C, Ckv, ranks = spec.D, spec.C, spec.Ckv, spec.ranks
        declare(self, w0=(1, 1, C), w1=(D, ranks.decay), w2=(ranks.decay, C))
        declare(self, a0=(1, 1, C), a1=(D, ranks.iclr), a2=(ranks.iclr, C))
        declare(self, g1=(D, ranks.gate), g2=(ranks.gate, C))
        if self.form.residual:
            declare(self, v0=(1, 1, Ckv), v1=(D, ranks.value_residual), v2=(ranks.value_residual, Ckv))
            declare(self, k0=(1, 1, Ckv), k1=(D, ranks.key_residual), k2=(ranks.key_residual, Ckv))
        if self.form.value_pair:
            declare(self, v1=(D, ranks.value_residual), v2=(ranks.value_residual, C))
        if self.form.bonus:
            declare(self, r_k=(spec.H, spec.N))

    def forward(self, x: Tensor, context: MixContext, state: LayerState) -> tuple[Tensor, LayerState]:
        """x (B, T, D) to the output (B, T, D) and the state `wkv` (B, H, N, N)."""
        form, spec, mask = self.form, self.spec, context.mask
        r, k, v = self.project(x, x, x, context.cos_sin if spec.mixer.rope else None)  # H.1
        d = self.heads(self.w0 + torch.tanh(x @ self.w1) @ self.w2)
        a = self.heads(self.a0 + x @ self.a1 @ self.a2)
        if form.residual:
            k, v = self.mixed_with_first(x, k, v, context.carry)
        if form.value_pair:
            v = repeat_heads(v, spec.H) + 0.2 * self.heads(x @ self.v1 @ self.v2)  # H.5
        keys = "decay" if form.true_decay else "log"
        log_w, k, removal, beta = wkv7_keys(d, k, a, keys, fused=mixer_is_fused(k))  # H.2, H.3, H.6, H.7
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * repeat_heads(v, spec.H) if form.bonus else None  # H.10
        if mask is not None:
            real = mask[..., None, None].to(k.dtype)
            k, v, removal, log_w = k * real, v * real, removal * real, log_w * real.float()
        log_w = log_w.to(r.dtype)  # half the bytes; a log-decay rounded moves less than what it decays, rounded
        if context.in_place:  # H.8, H.9
            wkv = state["wkv"]
            p = wkv7_step(
                r[:, 0], log_w[:, 0], k[:, 0], v[:, 0], removal[:, 0], beta[:, 0], wkv, scale=spec.N**-0.5,
                slots=context.slots,
            )[:, None]  # fmt: skip
        else:
            p, wkv = wkv7(
                r, log_w, k, v, removal, beta, state.get("wkv"), scale=spec.N**-0.5, min_log_w=RWKV7_MIN_LOG_W,
                cu_seqlens=context.cu_seqlens,
            )  # fmt: skip
        p = (p if bonus is None else p + bonus).flatten(2)
        return self.output_of(p * (torch.sigmoid(x @ self.g1) @ self.g2)), {"wkv": wkv}  # H.11

    def mixed_with_first(self, x: Tensor, k: Tensor, v: Tensor, carry: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """H.4 on k and v (B, T, Hkv, N)."""
        if "v_first" not in carry:
            carry.update(k_first=k, v_first=v)
            return k, v
        k = torch.lerp(k, carry["k_first"], self.heads(torch.sigmoid(self.k0 + x @ self.k1 @ self.k2)))
        v = torch.lerp(v, carry["v_first"], self.heads(torch.sigmoid(self.v0 + x @ self.v1 @ self.v2)))
        return k, v
