"""AdamW's moments in eight bits: blocks of 256 values share one float32 scale, values inside a block follow a power law.

The first moment is sign(m) max |m| (c / 127)^2 with c in -127..127, the second max(v) (c / 255)^4 with c in 0..255: small
values of a block keep relative precision, as the quotient of the two needs. Reading what was written gives it back exactly.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256


class Packed:
    """A tensor kept as one byte a value and one scale a block; `signed` for the first moment."""

    def __init__(self, like: Tensor, signed: bool) -> None:
        self.shape, self.count, self.signed = like.shape, like.numel(), signed
        blocks = -(-self.count // BLOCK)
        self.codes = torch.zeros(blocks, BLOCK, dtype=torch.int8 if signed else torch.uint8, device=like.device)
        self.scales = torch.zeros(blocks, 1, dtype=torch.float32, device=like.device)

    def read(self) -> Tensor:
        """The values, float32, of the first shape."""
        codes = self.codes.float()
        values = codes * codes.abs() / 127**2 if self.signed else (codes / 255) ** 4
        return (values * self.scales).flatten()[: self.count].view(self.shape)

    def write(self, values: Tensor) -> None:
        """Keep `values`, rounded to the nearest code; a second moment above zero never becomes zero."""
        flat = F.pad(values.flatten().float(), (0, self.codes.numel() - self.count)).view(-1, BLOCK)
        self.scales = flat.abs().amax(1, keepdim=True)
        shares = flat.abs() / self.scales.clamp_min(torch.finfo(torch.float32).tiny)
        if self.signed:
            self.codes.copy_((shares.sqrt() * 127).round().copysign(flat))
        else:
            self.codes.copy_(torch.where(flat > 0, (shares.sqrt().sqrt() * 255).round().clamp_min(1), 0.0))


class SmallAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW on float32 parameters, with moments kept in "bfloat16" or "int8" and computed with in float32."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        kind: str,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.kind = kind

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients there are."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    self.put(p, torch.zeros_like(p), torch.zeros_like(p), 0)
                number = int(state["step"]) + 1
                m, v = read(state["exp_avg"]), read(state["exp_avg_sq"])
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                size = v.sqrt().div_((1 - beta2**number) ** 0.5).add_(group["eps"])
                p.addcdiv_(m, size, value=-group["lr"] / (1 - beta1**number))
                self.put(p, m, v, number)

    def put(self, p: Tensor, m: Tensor, v: Tensor, number: int) -> None:
        """Keep both moments of `p` after `number` updates."""
        state = self.state[p]
        state["step"] = torch.tensor(float(number))
        for name, values, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
            if self.kind == "bfloat16":
                state[name] = values.bfloat16()
                continue
            if name not in state:
                state[name] = Packed(values, signed)
            state[name].write(values)


def read(moment: Tensor | Packed) -> Tensor:
    """A moment as float32, in memory of its own unless it is float32 already."""
    return moment.read() if isinstance(moment, Packed) else moment.float()
