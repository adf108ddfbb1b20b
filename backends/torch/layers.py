"""What every mixer and layer shares: norms, rotary positions, projections, feed-forward, gate."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radlads.backends.torch.kernels.prologue import blended, mixer_is_fused
from radlads.mixers.table import TEACHER_NAMES, ProjectionNames
from radlads.positions import inverse_frequencies, rope_amplitude, rope_depends_on_length, rope_length
from radlads.spec import ModelSpec

# Matrices of one input that have at most a tenth as many outputs as the input has rows make one product.
ROWS_OF_JOINED = 10


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight, over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape and dtype."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


def products(x: Tensor, maps: Sequence[nn.Module | Tensor]) -> list[Tensor]:
    """x (..., D) through each of `maps`: linear modules, or matrices (D, n).

    Narrow ones go together: one product reads x once and fills a GPU, and in the backward pass there is one gradient of x
    instead of a sum of many, and one long product for all weights. Beside x copying the weights is little.
    """
    widest = x.shape[:-1].numel() // ROWS_OF_JOINED
    joined = {}
    for place, m in enumerate(maps):
        matrix = matrix_of(m)
        if matrix is not None and matrix[0].shape[0] <= widest:
            joined[place] = matrix
    if len(joined) < 2:
        return [mapped(x, m) for m in maps]
    widths = [weight.shape[0] for weight, _ in joined.values()]
    bias = None
    if any(b is not None for _, b in joined.values()):
        bias = torch.cat([x.new_zeros(w.shape[0]) if b is None else b for w, b in joined.values()])
    parts = F.linear(x, torch.cat([weight for weight, _ in joined.values()]), bias).split(widths, -1)
    found = dict(zip(joined, parts, strict=True))
    return [found[place] if place in found else mapped(x, m) for place, m in enumerate(maps)]


def matrix_of(m: nn.Module | Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Matrix (n, D) and bias of a map; None for one that is more than that, an adapter's for example."""
    if isinstance(m, Tensor):
        return m.T, None
    return (m.weight, m.bias) if type(m) is nn.Linear else None


def mapped(x: Tensor, m: nn.Module | Tensor) -> Tensor:
    """x (..., D) through one map."""
    if isinstance(m, Tensor):
        return x @ m
    out: Tensor = m(x)
    return out


class FeedForward(nn.Module):
    """SwiGLU: W_down(SiLU(W_gate x) * W_up x)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.D, spec.F, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(spec.D, spec.F, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(spec.F, spec.D, bias=spec.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        gate, up = products(x, (self.gate_proj, self.up_proj))
        return self.down_proj(F.silu(gate) * up)


class Rotary(nn.Module):
    """Cosines and sines of S.3. The frequencies are kept per device, outside the module's own tensors."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.amplitude = rope_amplitude(spec)
        self.frequencies: dict[torch.device, tuple[int, Tensor]] = {}

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions (B, T) to cos, sin (B, T, 1, N/2), computed in float32 and cast to `dtype`."""
        angles = (positions[..., None].float() * self.at(positions))[:, :, None, :]
        return (self.amplitude * angles.cos()).to(dtype), (self.amplitude * angles.sin()).to(dtype)

    def at(self, positions: Tensor) -> Tensor:
        """The frequencies (N/2,) for these positions; where they depend on the longest one, the device is waited for."""
        length = rope_length(self.spec, int(positions.max()) + 1) if rope_depends_on_length(self.spec) else 0
        known = self.frequencies.get(positions.device)
        if known is None or known[0] != length:
            values = inverse_frequencies(self.spec, length)
            known = length, torch.tensor(values, dtype=torch.float32, device=positions.device)
            self.frequencies[positions.device] = known
        return known[1]


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """S.3 in half-split form: x (B, T, heads, N)."""
    cos, sin = cos_sin
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Projections(nn.Module):
    """q, k, v, o with the teacher's biases and per-head norms (S.1, S.2), under the teacher's names or others."""

    def __init__(self, spec: ModelSpec, names: ProjectionNames = TEACHER_NAMES) -> None:
        super().__init__()
        self.spec = spec
        self.names = names
        for name, width in ((names.q, spec.C), (names.k, spec.Ckv), (names.v, spec.Ckv)):
            self.add_module(name, nn.Linear(spec.D, width, bias=spec.qkv_bias))
        self.add_module(names.o, nn.Linear(spec.C, spec.D, bias=spec.output_bias))
        if spec.qk_norm:
            self.add_module(names.q_norm, RMSNorm(spec.N, spec.rms_norm_eps))
            self.add_module(names.k_norm, RMSNorm(spec.N, spec.rms_norm_eps))

    def project(
        self,
        x_q: Tensor,
        x_k: Tensor,
        x_v: Tensor,
        cos_sin: tuple[Tensor, Tensor] | None,
        others: Sequence[nn.Module | Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """(B, T, D) inputs to q (B, T, H, N) and k, v (B, T, Hkv, N), normed and, given `cos_sin`, rotated.

        Then come the products of x_q with `others`, which cost less here than alone where the three inputs are one.
        """
        names = self.names
        to_q, to_k, to_v = (getattr(self, name) for name in (names.q, names.k, names.v))
        if x_q is x_k is x_v:
            q, k, v, *rest = products(x_q, (to_q, to_k, to_v, *others))
        else:
            q, k, v, rest = to_q(x_q), to_k(x_k), to_v(x_v), products(x_q, others)
        q, k, v = self.heads(q), self.heads(k), self.heads(v)
        if self.spec.qk_norm:
            q, k = getattr(self, names.q_norm)(q), getattr(self, names.k_norm)(k)
        if cos_sin is not None:
            q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        return q, k, v, *rest

    def output_of(self, p: Tensor) -> Tensor:
        """p (B, T, C) through the output projection (B, T, D)."""
        out: Tensor = getattr(self, self.names.o)(p)
        return out

    def heads(self, x: Tensor) -> Tensor:
        """(..., heads*N) to (..., heads, N)."""
        return x.unflatten(-1, (-1, self.spec.N))


def declare(module: nn.Module, **shapes: tuple[int, ...]) -> None:
    """Give `module` a parameter of each name and shape; values come from a file or from radlads.inits."""
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def declare_gate(module: Any, spec: ModelSpec) -> None:
    """Parameters of the output gate: `gate.weight` (full) or `g1`, `g2` (lowrank)."""
    if spec.mixer.gate == "full":
        module.gate = nn.Linear(spec.D, spec.C, bias=False)
    elif spec.mixer.gate == "lowrank":
        declare(module, g1=(spec.D, spec.ranks.gate), g2=(spec.ranks.gate, spec.C))


def with_base(h: Tensor, matrix: Tensor, base: Tensor) -> Tensor:
    """h (..., R) @ matrix (R, C) + base (C values), or many such products: h (n, T, R), matrix (n, R, C), base (n, 1, C).

    Where base learns it is one more row of the matrix, so that its gradient comes with the matrix's instead of from another
    pass over that of the result. Rows up to a multiple of 8 are zeros: products are read 16 bytes at a time. The sum is rounded
    to h's dtype, so this is not for decays, whose base is large beside what is added to it.
    """
    base = base.view(*matrix.shape[:-2], 1, matrix.shape[-1])
    if not (torch.is_grad_enabled() and base.requires_grad):
        return base + h @ matrix
    spare = 7 - h.shape[-1] % 8
    with_one = F.pad(F.pad(h, (0, 1), value=1.0), (0, spare))
    return with_one @ F.pad(torch.cat([matrix, base], -2), (0, 0, 0, spare))


def gate_of(module: Any, spec: ModelSpec) -> tuple[nn.Module | Tensor, ...]:
    """What the input of the output gate is multiplied with; nothing where there is no gate."""
    if spec.mixer.gate == "full":
        return (module.gate,)
    return (module.g1,) if spec.mixer.gate == "lowrank" else ()


def gated(module: Any, spec: ModelSpec, p: Tensor, x: Sequence[Tensor]) -> Tensor:
    """6.8, 7.9: p (B, T, C) times the output gate, from the products of its input with `gate_of`."""
    if not x:
        return p
    if spec.mixer.gate == "lowrank":
        return p * (torch.sigmoid(x[0]) @ module.g2)
    values, logits = (y.unflatten(-1, (spec.H, spec.N)) for y in (p, x[0]))
    return blended(None, values, logits, fused=mixer_is_fused(values)).flatten(2)


class HeadNorm(nn.GroupNorm):
    """GroupNorm over each head of N channels, eps N * 1e-5, computed in float32."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec.H, spec.C, eps=spec.N * 1e-5)

    def forward(self, p: Tensor) -> Tensor:
        """p (B, T, C) to the same shape and dtype."""
        flat = p.reshape(-1, p.shape[-1]).float()
        return F.group_norm(flat, self.num_groups, self.weight.float(), self.bias.float(), self.eps).view(p.shape).to(p.dtype)
