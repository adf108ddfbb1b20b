"""The WKV ops against a float64 recurrence on the machine at hand: output, final state and every gradient."""
from dataclasses import dataclass

import torch
from torch import Tensor

from radlads.backends.torch.kernels.wkv6 import wkv6
from radlads.backends.torch.kernels.wkv7 import wkv7

# Twice what the tests hold the kernels to: a miscompiled kernel is off by far more, a card's own rounding by far less.
BARS = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
BOUND = -0.6065306597126334
# recurrence, head size, lowest log-decay, the bound told to the op
CASES = ((6, 64, 20.0, None), (6, 128, 20.0, None), (7, 64, 0.6, BOUND), (7, 128, 0.6, BOUND), (7, 128, 20.0, None))
# Releases of Triton, from and up to but without, that make wrong gradients of kernels of this kind on cards of this capability
# (fla-org/flash-linear-attention#640). They end where we measured: 3.6.0 has the defect but none of our kernels meets it.
WRONG_TRITON = (((3, 4), (3, 6), 9),)
NAMES = ("r", "log_w", "k", "v", "a", "b", "state")


@dataclass(frozen=True)
class KernelCheck:
    """One op at one head size and dtype: the worst relative RMS error and the tensor that has it."""

    name: str
    error: float
    where: str
    bar: float

    @property
    def passed(self) -> bool:
        """False for NaN too."""
        return self.error < self.bar


def triton_refusal(version: str, capability: int) -> str | None:
    """Why this release of Triton must not be used on a card of this major capability; None where nothing is known."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    for first, good, card in WRONG_TRITON:
        if first <= release < good and capability == card:
            return f"Triton {version} is known to make wrong gradients on this card; {good[0]}.{good[1]} is the first good one"
    return None


def kernel_selftest(device: str) -> list[KernelCheck]:
    """Checks both recurrences; bfloat16 and float32 on a card, float32 (the plain form) on the CPU."""
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    return [check(*case, dtype, device) for dtype in dtypes for case in CASES]


def check(number: int, N: int, lowest: float, bound: float | None, dtype: torch.dtype, device: str) -> KernelCheck:
    """Runs one case on fresh random inputs of 100 tokens and 2 heads: one whole chunk and a part of one."""
    draw = torch.Generator().manual_seed(number * N)
    shape = (1, 100, 2, N)
    r, k, v, kappa = (torch.randn(shape, generator=draw) for _ in range(4))
    log_w = -lowest * torch.rand(shape, generator=draw).square()
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    state = torch.randn(1, 2, N, N, generator=draw)
    inputs = [r, log_w, k, v] + ([-kappa, kappa * torch.rand(shape, generator=draw)] if number == 7 else [])
    ours = [x.to(device, dtype).requires_grad_() for x in inputs] + [state.to(device).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in ours]
    if number == 7:
        got = wkv7(*ours[:6], ours[6], scale=0.5, min_log_w=bound)
    else:
        got = wkv6(ours[0], ours[2], ours[3], ours[1], ours[4], scale=0.5, min_log_w=bound)
    want = recurrence(exact[:-1], exact[-1], 0.5)
    seeds = [torch.randn(x.shape, generator=draw).to(device, x.dtype) for x in got]
    torch.autograd.backward(got, seeds)
    torch.autograd.backward(want, [x.double() for x in seeds])
    pairs = {"out": (got[0], want[0]), "final state": (got[1], want[1])}
    names = NAMES if number == 7 else (*NAMES[:4], "state")
    pairs |= {f"d({name})": (x.grad, y.grad) for name, x, y in zip(names, ours, exact, strict=True)}
    errors = {name: ((x.double() - y).norm() / y.norm()).item() for name, (x, y) in pairs.items()}
    # NaN counts as the worst.
    where = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    kind = f"wkv{number} head {N} {str(dtype).removeprefix('torch.')}{' bounded' if bound else ''}"
    return KernelCheck(kind, errors[where], where, BARS[dtype])


def recurrence(inputs: list[Tensor], state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The equations of the ops, token by token; inputs are r, log_w, k, v[, a, b]."""
    r, log_w, k, v, *removal = inputs
    out = []
    for t in range(r.shape[1]):
        removed = 0
        if removal:
            removed = (state @ removal[0][:, t, :, :, None]) * removal[1][:, t, :, None]
        state = state * log_w[:, t].exp()[:, :, None] + removed + v[:, t, :, :, None] * k[:, t, :, None]
        out.append(scale * (state @ r[:, t, :, :, None])[..., 0])
    return torch.stack(out, 1), state
