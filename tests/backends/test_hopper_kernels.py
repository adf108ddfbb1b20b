"""The Gluon kernels' arithmetic on the CPU: their Python bodies run on tensors, with stand-ins for Gluon's operations.

This proves the equations, the masks and the use of each shared-memory box; not layouts, races or speed.
"""
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

KERNELS = "radlads.backends.torch.kernels."
HOPPER_MODULES = ("wkv6_hopper", "wkv7_hopper", "wkv7_fused", "wkv6_fused", "wkv7_segment")


class Index(int):
    """A scalar of the kernel: integer arithmetic that stays a scalar, and Gluon's cast."""

    def to(self, dtype: object) -> "Index":
        return self

    def __add__(self, other: object) -> "Index":
        return Index(int(self) + other) if isinstance(other, int) else NotImplemented

    def __sub__(self, other: object) -> "Index":
        return Index(int(self) - other) if isinstance(other, int) else NotImplemented

    def __mul__(self, other: object) -> "Index":
        return Index(int(self) * other) if isinstance(other, int) else NotImplemented

    def __floordiv__(self, other: int) -> "Index":
        return Index(int(self) // other)

    def __mod__(self, other: int) -> "Index":
        return Index(int(self) % other)

    __radd__ = __add__
    __rmul__ = __mul__


class Pointer:
    def __init__(self, memory: Tensor, place: object = 0) -> None:
        self.memory, self.place = memory.view(-1), place
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other: object) -> "Pointer":
        return Pointer(self.memory, self.place + other)


class Box:
    """Shared memory; starts as NaN, so that nothing unwritten goes unnoticed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.tensor.dtype
        self.tensor.copy_(value)

    def load(self, layout: object) -> Tensor:
        return self.tensor.clone()

    def permute(self, order: tuple[int, int]) -> "Box":
        return Box(self.tensor.permute(*order))

    def index(self, i: int) -> "Box":
        return Box(self.tensor[i])

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: object) -> "Box":
        return Box(self.tensor.view(-1).view(dtype).view(*shape))


def product(a: Box | Tensor, b: Box, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Tensor:
    left = a.tensor if isinstance(a, Box) else a
    assert left.dtype == b.tensor.dtype and left.dtype in (torch.bfloat16, torch.float16)
    out = left.float() @ b.tensor.float()
    return out + acc if use_acc else out


def choose(condition: object, a: object, b: object) -> Tensor | Index:
    if isinstance(condition, bool) and isinstance(a, int) and isinstance(b, int):
        return Index(a if condition else b)
    a, b = (x.float() if isinstance(x, Tensor) else torch.tensor(x) for x in (a, b))
    return torch.where(torch.as_tensor(condition), a, b)


def copy_in(box: Box, pointer: Pointer, inside: Tensor) -> None:
    assert not inside.any() or 0 <= pointer.place[inside].min() <= pointer.place[inside].max() < pointer.memory.numel()
    box.tensor.zero_()
    box.tensor[inside] = pointer.memory[pointer.place[inside]]


def fetch(pointer: Pointer, mask: Tensor | bool = True, other: float = 0.0) -> object:
    if not isinstance(pointer.place, Tensor):
        return Index(pointer.memory[pointer.place])
    value = torch.full(pointer.place.shape, other, dtype=pointer.memory.dtype)
    value[mask] = pointer.memory[pointer.place[mask]]
    return value


def copy_out(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    mask = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
    pointer.memory[pointer.place[mask]] = value[mask]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """run(module, kernel, programs, *arguments): imports the module over the stand-ins and runs its kernel."""
    here: list[tuple[int, ...]] = []
    names = ("BlockedLayout", "NVMMADistributedLayout", "DotOperandLayout", "NVMMASharedLayout", "SwizzledSharedLayout",
             "SliceLayout")
    language = ModuleType("language")
    vars(language).update(
        {name: lambda *_, **__: None for name in names}, constexpr=object, float32=torch.float32, bfloat16=torch.bfloat16,
        float16=torch.float16, int64=None, int32=None, program_id=lambda i: here[-1][i], static_range=range,
        arange=lambda a, b, layout=None: torch.arange(a, b), where=choose, load=fetch,
        allocate_shared_memory=lambda dtype, shape, layout: Box(torch.full(shape, float("nan"), dtype=dtype)),
        inline_asm_elementwise=lambda asm, places, arguments, **_: arguments[0],
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), exp2=torch.exp2, store=copy_out,
        sum=lambda x, axis: x.sum(axis), maximum=lambda x, low: x.clamp(min=low), minimum=min, barrier=lambda: None)
    hopper = ModuleType("hopper")
    copies = SimpleNamespace(async_copy_global_to_shared=copy_in, commit_group=lambda: None, wait_group=lambda n: None)
    vars(hopper).update(warpgroup_mma=product, warpgroup_mma_wait=lambda pending, deps: deps[0] if len(deps) == 1 else deps,
                         fence_async_shared=lambda: None, async_copy=copies)
    gluon = ModuleType("gluon")
    vars(gluon).update(jit=lambda fn=None, **_: fn or (lambda f: f), language=language)
    experimental = ModuleType("experimental")
    vars(experimental)["gluon"] = gluon
    for name, module in (("", experimental), (".gluon", gluon), (".gluon.language", language),
                         (".gluon.language.nvidia", ModuleType("nvidia")), (".gluon.language.nvidia.hopper", hopper)):
        monkeypatch.setitem(sys.modules, "triton.experimental" + name, module)
    for module in HOPPER_MODULES:
        monkeypatch.delitem(sys.modules, KERNELS + module, raising=False)

    def launch(module: str, kernel: str, programs: list[tuple[int, ...]], *arguments: object) -> None:
        function = getattr(importlib.import_module(KERNELS + module), kernel)
        for program in programs:
            here.append(tuple(map(Index, program)))
            function(*(Pointer(x) if isinstance(x, Tensor) else x for x in arguments))

    yield launch
    for module in HOPPER_MODULES:
        sys.modules.pop(KERNELS + module, None)


def recurrence(T: int, N: int, lowest: float, removal: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and states a gradient kernel reads, in bfloat16, and the float64 gradients it should give."""
    torch.manual_seed(0)
    names = ["q", "k", "v", "log_w", "a", "b"]
    kappa = torch.nn.functional.normalize(torch.randn(T, N), dim=-1)
    values = [torch.randn(T, N), torch.randn(T, N), torch.randn(T, N), -lowest * torch.rand(T, N).square(),
              -kappa * removal, kappa * torch.rand(T, N)]
    inputs = {name: x.bfloat16() for name, x in zip(names, values, strict=True)}
    inputs["d_out"] = torch.randn(T, N).bfloat16()
    exact = {name: inputs[name].double().requires_grad_() for name in names}
    added = torch.zeros(T, N, dtype=torch.float64, requires_grad=True)
    state = torch.zeros(N, N, dtype=torch.float64, requires_grad=True)
    starts, out, removed = [state], [], []
    for t in range(T):
        if t and t % 64 == 0:
            state = state * 1.0
            state.retain_grad()
            starts.append(state)
        q, k, v, log_w, a, b = (exact[name][t] for name in names)
        removed.append(a @ state + added[t])
        state = state * log_w.exp()[:, None] + k[:, None] * v + b[:, None] * removed[-1]
        out.append(0.5 * (q @ state))
    (torch.stack(out) * inputs["d_out"].double()).sum().backward()
    ends = [x.grad for x in starts[1:]] + [torch.zeros(N, N)]
    inputs.update(u=torch.stack(removed).detach().bfloat16(), du=added.grad.bfloat16(),
                  states=torch.stack([x.detach() for x in starts]).bfloat16(), d_states=torch.stack(ends).bfloat16())
    return inputs, {name: exact[name].grad for name in names} | {"state": starts[0].grad}


@pytest.mark.parametrize("number,N", [(6, 64), (6, 96), (7, 64), (7, 96)])
def test_gradients_match_float64(number: int, N: int, run: object) -> None:
    T = 70
    x, want = recurrence(T, N, 20.0 if number == 6 else 0.6, number == 7)
    grads = {name: torch.full((T, N), float("nan"), dtype=torch.bfloat16) for name in ("q", "log_w", "k", "a", "b")}
    programs = [(part, 0, chunk) for part in range(-(-N // 64)) for chunk in range(2)]
    sizes = (None, None, None, Index(T), Index(2), 1, 1, 0.5)
    if number == 6:
        del grads["a"], grads["b"]
        run("wkv6_hopper", "wkv6_hopper_grad_kernel", programs, x["q"], x["log_w"], x["k"], x["v"], x["states"], x["d_out"],
            x["d_states"], *grads.values(), *sizes, N, 8, 4, 16.0, False)
    else:
        run("wkv7_hopper", "wkv7_hopper_grad_kernel", programs, x["q"], x["log_w"], x["k"], x["v"], x["a"], x["b"], x["u"],
            x["states"], x["d_out"], x["du"], x["d_states"], *grads.values(), *sizes, N, 0.6126, False, False)
    for name, grad in grads.items():
        assert (grad.double() - want[name]).norm() / want[name].norm() < 5e-3, name


# Head size, and chunks of a walk: one walk of three, or two walks of two and one.
WALKS = pytest.mark.parametrize("N,span", [(64, 3), (96, 2)])


@WALKS
def test_fused_forward_matches_float64(N: int, span: int, run: object) -> None:
    T, width, walks = 150, 64 if N == 64 else 128, 4 - span
    x, _ = recurrence(T, N, 0.6, True)
    start = torch.randn(N, N)
    starts = torch.stack([start] * walks)
    out, u = (torch.full((T, N), float("nan"), dtype=torch.bfloat16) for _ in range(2))
    states, last = torch.full((3, N, N), float("nan"), dtype=torch.bfloat16), torch.full((walks, N, N), float("nan"))
    solve, a_rb = (torch.full((3, 64, 64), float("nan"), dtype=torch.bfloat16) for _ in range(2))
    run("wkv7_fused", "wkv7_fused_forward_kernel", [(0, walk) for walk in range(walks)], x["q"], x["log_w"], x["k"], x["v"],
        x["a"], x["b"], starts, out, u, states, solve, a_rb, last, None, None, Index(T), Index(3), Index(span), 1, 1, 0.5, N,
        width, 0.6126, True, True, False)
    q, log_w, k, v, a, b = (x[name].double() for name in ("q", "log_w", "k", "v", "a", "b"))
    state, want, want_u, want_states, want_last = start.double(), [], [], [], []
    for t in range(T):
        if t and t % (64 * span) == 0:
            want_last.append(state[None])
            state = start.double()
        if t % 64 == 0:
            want_states.append((state * log_w[t:t + 32].sum(0).exp()).T)
        want_u.append(state @ a[t])
        state = state * log_w[t].exp() + want_u[-1][:, None] * b[t] + v[t][:, None] * k[t]
        want.append(0.5 * state @ q[t])
    want_last.append(state[None])
    for found, right in ((out, want), (u, want_u), (states, want_states), (last, want_last)):
        right = torch.cat([y[None] if y.dim() < found.dim() else y for y in right]).view(found.shape)
        assert (found.double() - right).norm() / right.norm() < 5e-3
    assert not solve.isnan().any() and not a_rb.isnan().any()


@pytest.mark.parametrize("N", [64, 96])
def test_fused_backward_matches_float64(N: int, run: object) -> None:
    T, width = 150, 64 if N == 64 else 128
    x, want = recurrence(T, N, 0.6, True)
    start, last, d_last = torch.zeros(N, N), torch.zeros(N, N), torch.zeros(N, N)
    out, u = (torch.zeros(T, N, dtype=torch.bfloat16) for _ in range(2))
    states = torch.zeros(3, N, N, dtype=torch.bfloat16)
    solve, a_rb = (torch.zeros(3, 64, 64, dtype=torch.bfloat16) for _ in range(2))
    inputs = [x[name] for name in ("q", "log_w", "k", "v", "a", "b")]
    sizes = (None, None, Index(T), Index(3), Index(3), 1, 1, 0.5, N, width, 0.6126)
    run("wkv7_fused", "wkv7_fused_forward_kernel", [(0, 0)], *inputs, start, out, u, states, solve, a_rb, last, *sizes,
        True, True, False)
    grads = {name: torch.full((T, N), float("nan"), dtype=torch.bfloat16) for name in ("q", "log_w", "k", "v", "a", "b")}
    d_start = torch.full((N, N), float("nan"))
    r, log_w, k, _, a, b = inputs
    du, d_states = torch.zeros_like(u), torch.zeros_like(states)
    run("wkv7_fused", "wkv7_fused_reverse_kernel", [(0, 0)], r, log_w, k, a, b, solve, a_rb, x["d_out"], d_last, grads["v"],
        du, d_states, d_start, *sizes[:6], *sizes[7:], True, True, False, False)
    chunks = [(part, 0, chunk) for part in range(width // 64) for chunk in range(3)]
    run("wkv7_hopper", "wkv7_hopper_grad_kernel", chunks, *inputs, u, states, x["d_out"], du, d_states,
        *(grads[name] for name in ("q", "log_w", "k", "a", "b")), None, *sizes[:4], 1, 1, 0.5, N, 0.6126, True, False)
    for name, grad in grads.items():
        assert (grad.double() - want[name]).norm() / want[name].norm() < 5e-3, name
    assert (d_start.T.double() - want["state"]).norm() / want["state"].norm() < 5e-3


def test_a_sequence_of_no_tokens_passes_the_state_on(run: object) -> None:
    """The first of two packed sequences: nothing before the tensors is read, its state and gradient go through."""
    T, N = 70, 64
    x, _ = recurrence(T, N, 0.6, True)
    offsets, chunk_start = torch.tensor([0, 0, T]), torch.tensor([0, 0])
    ends, d_ends = torch.randn(2, N, N), torch.randn(2, N, N)
    found, d_found = (torch.full((2, N, N), float("nan")) for _ in range(2))
    tokens = [torch.full((T, N), float("nan"), dtype=torch.bfloat16) for _ in range(3)]
    chunks = [torch.zeros(2, N, N, dtype=torch.bfloat16) for _ in range(2)]
    solve, a_rb = (torch.zeros(2, 64, 64, dtype=torch.bfloat16) for _ in range(2))
    r, log_w, k, v, a, b = (x[name] for name in ("q", "log_w", "k", "v", "a", "b"))
    programs, sizes = [(0, 0), (0, 1)], (offsets, chunk_start, Index(T), Index(2), Index(2), 1)
    run("wkv7_fused", "wkv7_fused_forward_kernel", programs, r, log_w, k, v, a, b, ends, tokens[0], tokens[1], chunks[0], solve,
        a_rb, found, *sizes, 1, 0.5, N, 64, 0.6126, True, True, True)
    run("wkv7_fused", "wkv7_fused_reverse_kernel", programs, r, log_w, k, a, b, solve, a_rb, x["d_out"], d_ends, tokens[1],
        tokens[2], chunks[1], d_found, *sizes, 0.5, N, 64, 0.6126, True, True, False, True)
    assert found[0].equal(ends[0]) and d_found[0].equal(d_ends[0])
    assert not found.isnan().any() and not d_found.isnan().any() and not any(y.isnan().any() for y in tokens)
    six = (offsets, chunk_start, Index(T), Index(2), Index(2), 1, 1, 1, 0.5, N, 64, 16, 3, 8.0)
    d_found.fill_(float("nan"))
    run("wkv6_fused", "wkv6_fused_kernel", programs, r, log_w, k, x["d_out"], d_ends, tokens[0], chunks[1], d_found, *six, True,
        True, True, True, True)
    assert d_found[0].equal(d_ends[0]) and not d_found.isnan().any()


@pytest.mark.parametrize("N", [64, 96])
def test_first_walk_over_segments_matches_float64(N: int, run: object) -> None:
    T, width, span = 150, 64 if N == 64 else 128, 2
    x, _ = recurrence(T, N, 0.6, True)
    inputs = [x[name] for name in ("q", "log_w", "k", "v", "a", "b")]
    added, passes = (torch.full((2, N, N), float("nan")) for _ in range(2))
    sizes = (Index(T), Index(3), Index(span), 1)
    run("wkv7_segment", "wkv7_segment_kernel", [(0, 0), (0, 1)], *inputs[1:], added, passes, *sizes, 1, N, width, 0.6126)
    solve, a_rb = (torch.zeros(3, 64, 64, dtype=torch.bfloat16) for _ in range(2))
    out, u, states = torch.zeros_like(x["v"]), torch.zeros_like(x["v"]), torch.zeros(3, N, N, dtype=torch.bfloat16)
    run("wkv7_fused", "wkv7_fused_forward_kernel", [(0, 0)], *inputs, torch.zeros(N, N), out, u, states, solve, a_rb,
        torch.zeros(N, N), None, None, Index(T), Index(3), Index(3), 1, 1, 0.5, N, width, 0.6126, True, True, False)
    r, log_w, k, _, a, b = inputs
    d_added = torch.full((2, N, N), float("nan"))
    run("wkv7_fused", "wkv7_fused_reverse_kernel", [(0, 0)], r, log_w, k, a, b, solve, a_rb, x["d_out"], None, None, None, None,
        d_added, None, None, *sizes, 0.5, N, width, 0.6126, False, True, True, False)
    ends = []
    for start, segment, values in ((torch.zeros(N, N), (0, 128), 1), (torch.eye(N), (0, 128), 0), (torch.eye(N), (128, T), 0)):
        state = start.double()
        for t in range(*segment):
            k, v, log_w, a, b = (x[name][t].double() for name in ("k", "v", "log_w", "a", "b"))
            state = state * log_w.exp() + (state @ a)[:, None] * b + values * v[:, None] * k
        ends.append(state)
    for found, right in zip((added[1], passes[0], passes[1], d_added[0].T), (*ends, x["d_states"][1].double()), strict=True):
        assert (found.double() - right).norm() / right.norm() < 5e-3
    assert added[0].isnan().all() and d_added[1].isnan().all()


@pytest.mark.parametrize("N,span,levels", [(64, 3, 3), (96, 2, 4)])
def test_fused_attention_matches_float64(N: int, span: int, levels: int, run: object) -> None:
    T, width, walks = 150, 64 if N == 64 else 128, 4 - span
    x, want = recurrence(T, N, 7.0, False)
    # The states before each walk and the gradients after it; the kernel leaves in their place those at its other end.
    lasts = torch.stack([x["states"][span * walk].T.float() for walk in range(walks)])
    d_starts = torch.stack([x["d_states"][min(2, span * (walk + 1) - 1)].T.float() for walk in range(walks)])
    states, d_states = (torch.full((3, N, N), float("nan"), dtype=torch.bfloat16) for _ in range(2))
    out = torch.full((T, N), float("nan"), dtype=torch.bfloat16)
    grads = {name: torch.full((T, N), float("nan"), dtype=torch.bfloat16) for name in ("q", "log_w", "k", "v")}
    sizes = (None, None, Index(T), Index(3), Index(span), 1, 1, 1, 0.5, N, width, 128 >> levels, levels, 8.0)
    inputs, programs = (x["q"], x["log_w"], x["k"]), [(0, walk) for walk in range(walks)]
    run("wkv6_fused", "wkv6_fused_kernel", programs, *inputs, x["v"], lasts, out, states, lasts, *sizes, False, True, True,
        True, False)
    run("wkv6_fused", "wkv6_fused_kernel", programs, *inputs, x["d_out"], d_starts, grads["v"], d_states, d_starts, *sizes,
        True, True, True, True, False)
    chunks = [(part, 0, chunk) for part in range(width // 64) for chunk in range(3)]
    run("wkv6_hopper", "wkv6_hopper_grad_kernel", chunks, *inputs, x["v"], states, x["d_out"], d_states, grads["q"],
        grads["log_w"], grads["k"], None, None, None, Index(T), Index(3), 1, 1, 0.5, N, 128 >> levels, levels, 8.0, False)
    state, outs = torch.zeros(N, N, dtype=torch.float64), []
    for t in range(T):
        q, k, v, log_w = (x[name][t].double() for name in ("q", "k", "v", "log_w"))
        state = state * log_w.exp() + v[:, None] * k
        outs.append(0.5 * state @ q)
    pairs = [(out, torch.stack(outs)), (lasts[-1], state), (d_starts[0].T, want["state"]), *((grads[n], want[n]) for n in grads)]
    for found, right in pairs:
        assert (found.double() - right).norm() / right.norm() < 5e-3
