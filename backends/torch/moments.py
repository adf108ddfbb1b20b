"""What AdamW's moments are kept in: float32, bfloat16, or eight bits.

Of eight bits, packs of 256 values share one float32 scale, and values inside a pack follow a power law. The first moment is
sign(m) max |m| (c / 127)^2 with c in -127..127, the second max(v) (c / 255)^4 with c in 0..255: small values of a pack keep
relative precision, as the quotient of the two needs. Reading what was written gives it back exactly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Values that share a scale.
PACK = 256


class Packed:
    """A tensor kept as one byte a value and one scale a pack; `signed` for the first moment."""

    def __init__(self, like: Tensor, signed: bool) -> None:
        self.shape, self.count, self.signed = like.shape, like.numel(), signed
        packs = -(-self.count // PACK)
        self.codes = torch.zeros(packs, PACK, dtype=torch.int8 if signed else torch.uint8, device=like.device)
        self.scales = torch.zeros(packs, 1, dtype=torch.float32, device=like.device)

    def read(self) -> Tensor:
        """The values, float32, of the first shape."""
        codes = self.codes.float()
        values = codes * codes.abs() / 127**2 if self.signed else (codes / 255) ** 4
        return (values * self.scales).flatten()[: self.count].view(self.shape)

    def write(self, values: Tensor) -> None:
        """Keep `values`, rounded to the nearest code; a second moment above zero never becomes zero."""
        flat = F.pad(values.flatten().float(), (0, self.codes.numel() - self.count)).view(-1, PACK)
        self.scales.copy_(flat.abs().amax(1, keepdim=True))
        shares = flat.abs() / self.scales.clamp_min(torch.finfo(torch.float32).tiny)
        if self.signed:
            self.codes.copy_((shares.sqrt() * 127 + 0.5).floor().copysign(flat))
        else:
            self.codes.copy_(torch.where(flat > 0, (shares.sqrt().sqrt() * 255 + 0.5).floor().clamp_min(1), 0.0))


def new_moments(master: Tensor, kind: str) -> dict[str, Tensor | Packed]:
    """Both moments of a weight, zero, kept in "float32", "bfloat16" or "int8"."""
    if kind == "int8":
        return {"exp_avg": Packed(master, True), "exp_avg_sq": Packed(master, False)}
    return {name: torch.zeros_like(master, dtype=getattr(torch, kind)) for name in ("exp_avg", "exp_avg_sq")}


def read(moment: Tensor | Packed) -> Tensor:
    """A moment as float32, in memory of its own unless it is float32 already."""
    return moment.read() if isinstance(moment, Packed) else moment.float()


def write(moment: Tensor | Packed, values: Tensor) -> None:
    """Keep float32 `values` as a moment."""
    if isinstance(moment, Packed):
        moment.write(values)
    elif values is not moment:
        moment.copy_(values)
