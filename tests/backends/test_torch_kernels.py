"""The plain recurrences against a float64 token loop: outputs, states and every gradient."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from radlads.backends.torch.kernels.wkv6 import wkv6
from radlads.backends.torch.kernels.wkv6_plain import plain_chunk
from radlads.backends.torch.kernels.wkv7 import wkv7

# (tokens, heads, key/value heads, head size, strongest log-decay, bound told to the op)
GRID = [
    (1, 2, 2, 8, -20.0, None),
    (2, 2, 1, 32, -20.0, None),
    (31, 2, 2, 32, -20.0, None),
    (33, 4, 2, 64, -0.60653066, -0.60653066),
    (64, 2, 2, 96, -5.0, -5.0),
    (65, 2, 2, 128, -0.60653066, None),
    (257, 2, 1, 64, -5.0, None),
    (1000, 1, 1, 8, -0.60653066, -0.60653066),
    (4097, 1, 1, 8, -20.0, None),
]
LIMIT = 1e-5


def loop6(q: Tensor, k: Tensor, v: Tensor, log_w: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    out = []
    for t in range(q.shape[1]):
        state = state * log_w[:, t, :, None].exp() + v[:, t, :, :, None] * k[:, t, :, None]
        out.append(scale * torch.einsum("bhvk,bhk->bhv", state, q[:, t]))
    return torch.stack(out, 1), state


def loop7(*inputs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    r, log_w, k, v, a, b, state = inputs
    out = []
    for t in range(r.shape[1]):
        removed = torch.einsum("bhvk,bhk->bhv", state, a[:, t])
        state = (
            state * log_w[:, t, :, None].exp() + removed[..., None] * b[:, t, :, None] + v[:, t, :, :, None] * k[:, t, :, None]
        )
        out.append(scale * torch.einsum("bhvk,bhk->bhv", state, r[:, t]))
    return torch.stack(out, 1), state


def inputs(case: tuple[int, int, int, int, float, float | None], op: str, rows: int = 2) -> list[Tensor]:
    T, H, Hkv, N, low, _ = case
    generator = torch.Generator().manual_seed(T)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    log_w = low * torch.rand(rows, T, H, N, generator=generator, dtype=torch.float64)
    log_w[:, ::3] = low  # at the floor
    log_w[:, 1::7] = 0.0  # and no decay at all
    state = draw(rows, H, N, N)
    if op == "wkv6":
        made = [draw(rows, T, H, N), draw(rows, T, Hkv, N), draw(rows, T, Hkv, N), log_w, state]
    else:
        kappa = torch.nn.functional.normalize(draw(rows, T, H, N), dim=-1)
        rate = torch.rand(rows, T, H, N, generator=generator, dtype=torch.float64)
        rate[:, ::5] = 1.0
        made = [draw(rows, T, H, N), log_w, draw(rows, T, H, N), draw(rows, T, H, N), -kappa, kappa * rate, state]
    return [x.float().double() for x in made]


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    """Relative RMS error within LIMIT; NaN fails."""
    error = ((found.double() - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt().item()
    assert error <= LIMIT, f"{what}: relative RMS error {error:.2e}"


@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
@pytest.mark.parametrize("case", GRID, ids=lambda c: f"T{c[0]}-H{c[1]}/{c[2]}-N{c[3]}-w{c[4]:.1f}-{c[5]}")
def test_forward_and_every_gradient(case: tuple[int, int, int, int, float, float | None], op: str) -> None:
    bound = case[5]
    exact = [x.requires_grad_() for x in inputs(case, op)]
    plain = [x.detach().float().requires_grad_() for x in exact]
    if op == "wkv6":
        wanted = loop6(*exact, scale=0.3)
        found = wkv6(*plain, scale=0.3, min_log_w=bound)
    else:
        wanted = loop7(*exact, scale=0.7)
        found = wkv7(*plain, scale=0.7, min_log_w=bound)
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for x in wanted]
    for x, y, name in zip(found, wanted, ("out", "state"), strict=True):
        close(x, y, name)
    wanted_grads = torch.autograd.grad(sum((x * w).sum() for x, w in zip(wanted, weights, strict=True)), exact)
    found_grads = torch.autograd.grad(sum((x * w).sum() for x, w in zip(found, weights, strict=True)), plain)
    for i, (x, y) in enumerate(zip(found_grads, wanted_grads, strict=True)):
        close(x, y, f"gradient of input {i}")


@pytest.mark.parametrize("op", ["wkv6", "wkv7"])
@pytest.mark.parametrize(("low", "bound"), [(-0.60653066, -0.60653066), (-5.0, -5.0), (-5.0, None), (-20.0, None)])
def test_gradient_of_one_strong_decay(op: str, low: float, bound: float | None) -> None:
    """Where every decay is as strong, its own gradient is tiny: rounding errors of larger terms must not stand in it."""
    tensors = inputs((70, 2, 2, 32, low, bound), op)
    decay = 3 if op == "wkv6" else 1
    tensors[decay] = torch.full_like(tensors[decay], low)
    exact = [x.requires_grad_() for x in tensors]
    plain = [x.detach().float().requires_grad_() for x in exact]
    wanted, found = (
        (loop6(*exact, scale=1.0), wkv6(*plain, scale=1.0, min_log_w=bound))
        if op == "wkv6"
        else (loop7(*exact, scale=1.0), wkv7(*plain, min_log_w=bound))
    )
    wanted_grads = torch.autograd.grad(wanted[0].square().sum() + wanted[1].sum(), exact)
    found_grads = torch.autograd.grad(found[0].square().sum() + found[1].sum(), plain)
    for i, (x, y) in enumerate(zip(found_grads, wanted_grads, strict=True)):
        close(x, y, f"gradient of input {i}")


@pytest.mark.parametrize("split", [1, 7, 32, 64, 99])
def test_split_anywhere_is_the_same(split: int) -> None:
    case = (100, 2, 2, 32, -0.60653066, -0.60653066)
    *tensors, state = [x.float() for x in inputs(case, "wkv7")]
    whole, last = wkv7(*tensors, state, min_log_w=case[5])
    first, middle = wkv7(*(x[:, :split] for x in tensors), state, min_log_w=case[5])
    second, end = wkv7(*(x[:, split:] for x in tensors), middle, min_log_w=case[5])
    close(torch.cat([first, second], 1), whole.double(), "out")
    close(end, last.double(), "state")


def test_packed_equals_separate_with_gradients() -> None:
    *tensors, _ = [x.float().requires_grad_() for x in inputs((60, 2, 2, 32, -0.60653066, None), "wkv7", rows=1)]
    bounds = [0, 1, 17, 60]
    packed, states = wkv7(*tensors, min_log_w=-0.60653066, cu_seqlens=torch.tensor(bounds))
    parts = [wkv7(*(x[:, a:b] for x in tensors), min_log_w=-0.60653066) for a, b in pairwise(bounds)]
    separate = torch.cat([out for out, _ in parts], 1)
    assert torch.equal(packed, separate)
    assert torch.equal(states, torch.cat([state for _, state in parts]))
    for x, y in zip(
        torch.autograd.grad(packed.square().sum(), tensors), torch.autograd.grad(separate.square().sum(), tensors), strict=True
    ):
        close(x, y.double(), "gradient")


def test_repeated_keys_do_not_cancel() -> None:
    """Equal keys, full learning rate, no decay: a power series for the inverse loses four digits here."""
    T, N = 64, 32
    kappa = torch.nn.functional.normalize(torch.ones(1, T, 1, N, dtype=torch.float64), dim=-1)
    v = torch.randn(1, T, 1, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = [kappa, torch.zeros_like(v), kappa, v, -kappa, kappa, torch.zeros(1, 1, N, N, dtype=torch.float64)]
    wanted, _ = loop7(*exact, scale=1.0)
    found, _ = wkv7(*(x.float() for x in exact), min_log_w=-0.60653066)
    close(found, wanted, "out")


@pytest.mark.parametrize(("bound", "size"), [(None, 8), (-5.0, 32), (-0.60653066, 32), (-20.0, 8), (-1000.0, 8)])
def test_chunk_keeps_every_factor_in_range(bound: float | None, size: int) -> None:
    assert plain_chunk(bound, 4096) == size
