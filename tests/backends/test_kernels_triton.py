"""The Triton kernels: numerics under Triton's interpreter, ahead-of-time compilation, and a check on a GPU where there is one.

The interpreter and the compiler each need a fresh process (the choice is made when triton is imported), so this file is also
the program those processes run: `python -m tests.backends.test_kernels_triton interpret|compile NAME`.
"""
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from radlads.backends.torch.kernels import decode, segments, wkv6_triton, wkv7_centred, wkv7_triton
from radlads.backends.torch.kernels import wkv6 as wkv6_module
from radlads.backends.torch.kernels import wkv7 as wkv7_module
from tests.processes import printed_by

FLOAT32_BAR, BFLOAT16_BAR = 1e-5, 5e-3

# name: recurrence, (B, T, H, N), value heads, lowest log-decay, bound told to the op, packed offsets, initial state
CASES = {
    "rwkv7-bounded": (7, (1, 40, 1, 32), 1, 0.6, -0.6065, None, True),
    "rwkv7-any-decay": (7, (1, 33, 2, 32), 1, 20.0, None, None, True),
    "rwkv7-packed": (7, (1, 40, 1, 32), 1, 0.6, -0.6065, [0, 1, 34, 40], False),
    "rwkv7-two-blocks": (7, (1, 5, 1, 96), 1, 0.6, -0.6065, None, True),
    "rwkv6": (6, (1, 40, 1, 32), 1, 20.0, None, None, True),
    "rwkv6-packed": (6, (1, 40, 2, 32), 1, 5.0, -5.0, [0, 1, 34, 40], True),
    "rwkv6-two-blocks": (6, (1, 5, 1, 96), 1, 20.0, None, None, False),
}
# name: kernel, compiled at head size 128, bfloat16
KERNELS = {
    "wkv7_solve": wkv7_triton.wkv7_solve_kernel, "wkv7_scan": wkv7_triton.wkv7_scan_kernel,
    "wkv7_reverse": wkv7_triton.wkv7_reverse_kernel, "wkv7_grad": wkv7_triton.wkv7_grad_kernel,
    "wkv7_centred_solve": wkv7_centred.wkv7_centred_solve_kernel, "wkv7_centred_grad": wkv7_centred.wkv7_centred_grad_kernel,
    "wkv6_intra": wkv6_triton.wkv6_intra_kernel, "wkv6_scan": wkv6_triton.wkv6_scan_kernel,
    "wkv6_reverse": wkv6_triton.wkv6_reverse_kernel, "wkv6_grad": wkv6_triton.wkv6_grad_kernel,
    "wkv6_segment": wkv6_triton.wkv6_segment_kernel, "segment_join": segments.segment_join_kernel,
    "wkv_step": decode.wkv_step_kernel, "wkv_step_slots": decode.wkv_step_kernel,
}
# What takes longest to compile is compiled for one target, in turn; the rest covers every target.
ONE_TARGET = {"wkv7_solve": "gfx942", "wkv7_grad": "sm_80", "wkv7_centred_solve": "sm_80", "wkv7_centred_grad": "gfx942",
              "wkv6_grad": "sm_80"}
# Written in Gluon for one target, each beside a portable kernel of the same meaning.
HOPPER_KERNELS = {
    "wkv6_hopper": ("wkv6_hopper", "wkv6_hopper_grad_kernel", {}),
    "wkv7_hopper": ("wkv7_hopper", "wkv7_hopper_grad_kernel", {}),
    "wkv6_fused": ("wkv6_fused", "wkv6_fused_kernel", {"REVERSE": False, "DIAG": 8, "LEVELS": 4, "warps": 8}),
    "wkv7_fused": ("wkv7_fused", "wkv7_fused_forward_kernel", {"warps": 8}),
    "wkv7_fused_reverse": ("wkv7_fused", "wkv7_fused_reverse_kernel", {"warps": 8}),
    "wkv7_segment": ("wkv7_segment", "wkv7_segment_kernel", {"warps": 8}),
}
TARGETS = {"sm_80": (("cuda", 80, 32), 163 * 1024), "sm_90": (("cuda", 90, 32), 227 * 1024),
           "gfx942": (("hip", "gfx942", 64), 64 * 1024)}


def recurrence(inputs: list[Tensor], state: Tensor, scale: float, rwkv7: bool) -> tuple[Tensor, Tensor]:
    """The equations of the docstrings, token by token; inputs are r, log_w, k, v[, a, b]."""
    r, log_w, k, v, *removal = inputs
    v, k = (x.repeat_interleave(r.shape[2] // x.shape[2], 2) for x in (v, k))
    out = []
    for t in range(r.shape[1]):
        removed = 0
        if rwkv7:
            a, b = removal
            removed = (state @ a[:, t, :, :, None]) * b[:, t, :, None]
        state = state * log_w[:, t].exp()[:, :, None] + removed + v[:, t, :, :, None] * k[:, t, :, None]
        out.append(scale * (state @ r[:, t, :, :, None])[..., 0])
    return torch.stack(out, 1), state


def packed_recurrence(inputs: list[Tensor], state: Tensor, scale: float, rwkv7: bool, offsets: list[int] | None
                      ) -> tuple[Tensor, Tensor]:
    if offsets is None:
        return recurrence(inputs, state, scale, rwkv7)
    parts = [recurrence([x[:, i:j] for x in inputs], state[n:n + 1], scale, rwkv7)
             for n, (i, j) in enumerate(pairwise(offsets))]
    return torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])


def draw(rwkv7: bool, shape: tuple[int, int, int, int], value_heads: int, lowest: float, dtype: torch.dtype, device: str
         ) -> list[Tensor]:
    B, T, H, N = shape
    heads = H if rwkv7 else value_heads
    r, k, v = (torch.randn(B, T, n, N) for n in (H, heads, value_heads))
    inputs = [r, -lowest * torch.rand(shape).square(), k, v]
    if rwkv7:
        kappa = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
        inputs += [-kappa, kappa * torch.rand(shape)]
    return [x.to(device, dtype) for x in inputs]


def call(rwkv7: bool, inputs: list[Tensor], state: Tensor | None, scale: float, bound: float | None, offsets: list[int] | None
         ) -> tuple[Tensor, Tensor]:
    packed = None if offsets is None else torch.tensor(offsets, device=inputs[0].device)
    if rwkv7:
        return wkv7_module.wkv7(*inputs, state, scale=scale, min_log_w=bound, cu_seqlens=packed)
    q, log_w, k, v = inputs
    return wkv6_module.wkv6(q, k, v, log_w, state, scale=scale, min_log_w=bound, cu_seqlens=packed)


def errors(name: str, dtype: torch.dtype, device: str) -> list[float]:
    """Relative RMS errors of output, final state and every gradient against a float64 recurrence."""
    number, shape, value_heads, lowest, bound, offsets, has_state = CASES[name]
    torch.manual_seed(0)
    rwkv7 = number == 7
    inputs = draw(rwkv7, shape, value_heads, lowest, dtype, device)
    rows = shape[0] if offsets is None else len(offsets) - 1
    state = torch.randn(rows, shape[2], shape[3], shape[3], device=device) * has_state
    tensors = [*inputs, state] if has_state else inputs
    exact = [x.double().requires_grad_() for x in tensors]
    ours = [x.clone().requires_grad_() for x in tensors]
    n = len(inputs)
    want = packed_recurrence(exact[:n], exact[n] if has_state else state.double(), 0.5, rwkv7, offsets)
    got = call(rwkv7, ours[:n], ours[n] if has_state else None, 0.5, bound, offsets)
    grads = [torch.randn_like(x) for x in got]
    torch.autograd.backward(got, grads)
    torch.autograd.backward(want, [g.double() for g in grads])
    pairs = [*zip(got, want, strict=True), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))]
    return [((x.double() - y).norm() / y.norm()).item() for x, y in pairs]


def interpret(name: str) -> None:
    # Under the interpreter the kernels run on CPU tensors.
    wkv6_module.wkv6_has_kernel = wkv7_module.wkv7_has_kernel = lambda x: True
    print(json.dumps(errors(name, torch.float32, "cpu")))


def interpret_segments() -> None:
    """Errors of the states between the segments of two sequences of 7 chunks, the last one short, both ways."""
    torch.manual_seed(0)
    B, T, H, N, span = 2, 200, 2, 32, 2
    q, log_w, k, v = draw(False, (B, T, H, N), 1, 5.0, torch.float32, "cpu")
    d_out = torch.randn_like(q)
    first, last = (torch.randn(B, H, N, N) for _ in range(2))
    plan = wkv6_module.wkv6_plan(q, None, None)
    got = wkv6_module.wkv6_starts(k, log_w, v, first, 0.5, span, plan, reverse=False)
    d_got = wkv6_module.wkv6_starts(q, log_w, d_out, last, 0.5, span, plan, reverse=True)
    want, d_want, ends = [first.double()], [last.double()], [*range(0, T, span * plan["C"]), T]
    for i, j in pairwise(ends):
        want.append(recurrence([x[:, i:j].double() for x in (q, log_w, k, v)], want[-1], 0.5, False)[1])
    for i, j in reversed(list(pairwise(ends))):
        d_state = d_want[-1]
        for t in range(j - 1, i - 1, -1):
            read = 0.5 * d_out[:, t, :, :, None].double() * q[:, t, :, None]
            d_state = (d_state + read) * log_w[:, t].double().exp()[:, :, None]
        d_want.append(d_state)
    pairs = ((got, torch.stack(want[:-1], 1)), (d_got, torch.stack(d_want[:-1][::-1], 1)))
    # Segments that pass the state on by a matrix each.
    added, passes = (torch.randn(B, 4, H, N, N) for _ in range(2))
    passes /= N ** 0.5
    for reverse, ours in ((False, added.clone()), (True, added.clone())):
        wkv7_module.wkv7_join(first, ours, passes, reverse=reverse)
        state, right = first.double(), torch.empty(B, 4, H, N, N, dtype=torch.float64)
        for place in reversed(range(4)) if reverse else range(4):
            if place != (3 if reverse else 0):
                matrix = passes[:, place + 1].mT if reverse else passes[:, place - 1]
                state = state @ matrix.double() + added[:, place]
            right[:, place] = state
        pairs = (*pairs, (ours, right))
    print(json.dumps([((x - y).norm() / y.norm()).item() for x, y in pairs]))


def targets_of(name: str) -> list[str]:
    if name in HOPPER_KERNELS:
        return ["sm_90"]
    return [ONE_TARGET[name]] if name in ONE_TARGET else list(TARGETS)


def compile_kernels() -> None:
    """Compiles every kernel for its targets and prints {kernel: {target: {"shared": bytes, "stack": bytes or None}}}."""
    print(json.dumps({name: compile_kernel(name) for name in (*KERNELS, *HOPPER_KERNELS)}))


def compile_kernel(name: str) -> dict[str, dict[str, int | None]]:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    hopper = name in HOPPER_KERNELS
    if hopper:
        from triton.experimental.gluon._runtime import GluonASTSource
        module, kernel_name, special = HOPPER_KERNELS[name]
        kernel = getattr(import_module(f"radlads.backends.torch.kernels.{module}"), kernel_name)
    else:
        kernel, special = KERNELS[name], {}
    report = {}
    for target_name in targets_of(name):
        target = TARGETS[target_name][0]
        exact = "tf32x3" if target[0] == "cuda" else "ieee"
        rwkv7 = name.startswith("wkv7")
        # Two levels of pairs: more repeat the second, at as much time again.
        step, with_slots = name.startswith("wkv_step"), name.endswith("slots")
        constants = dict(N=128, BN=128, BK=128 if step else 64,
                         BV=4 if step else 128 if name.endswith(("grad", "segment")) else 64, C=64, KNOWN=False,
                         DIAG=64 if rwkv7 else 32, LEVELS=1 if rwkv7 else 2, CLAMP=0.60653 if rwkv7 else 4.0,
                         DOT=tl.bfloat16, PREC="tf32" if target[0] == "cuda" else "ieee", GATE_PREC=exact,
                         SOLVE_LEVELS=6, VARLEN=False, CENTRED=True, LAST=True,
                         HAS_STATE=False, NEED_STATE=False, SAVE=True, REMOVE=True, REVERSE=False, ROWS=16,
                         MATRIX=name == "segment_join", LOCAL=False, HAS_SLOTS=with_slots,
                         cu_seqlens=None, chunk_seq=None, chunk_start=None, state_in=None, d_state_out=None)
        constants |= special | ({} if with_slots else {"slots": None})
        warps = constants.pop("warps", 4)
        constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
        signature = {}
        for arg in kernel.arg_names:
            if arg in constants:
                signature[arg] = "constexpr"
            elif arg in ("T", "NT", "walk_chunks", "walks", "H", "HV", "HK", "pool"):
                signature[arg] = "i32"
            elif arg == "slots":
                signature[arg] = "*i32"
            elif arg == "scale":
                signature[arg] = "fp32"
            else:
                floats = ("state", "states", "decays", "passes", "state_out", "d_state_in")
                signature[arg] = "*fp32" if arg in floats else "*bf16"
        aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if signature[arg][0] == "*"}
        source = (GluonASTSource if hopper else ASTSource)(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        built = triton.compile(source, target=GPUTarget(*target), options={"num_warps": warps, "num_stages": 1})
        report[target_name] = {"shared": built.metadata.shared, "stack": stack_bytes(built.asm.get("cubin"))}
    return report


def stack_bytes(cubin: bytes | None) -> int | None:
    """Spilled bytes per thread, by the disassembler that ships with triton."""
    import triton
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if cubin is None or not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(usage.split("STACK:")[1].split()[0])


def child(*words: str, **env: str) -> object:
    pytest.importorskip("triton")
    return printed_by(__name__, *words, **env)


@pytest.mark.parametrize("name", CASES)
def test_interpreter_matches_float64(name: str) -> None:
    found = child("interpret", name, TRITON_INTERPRET="1")
    assert max(found) < FLOAT32_BAR, found


def test_interpreted_segments_match_float64() -> None:
    found = child("interpret_segments", TRITON_INTERPRET="1")
    assert max(found) < FLOAT32_BAR, found


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, dict[str, int | None]]]:
    """One process compiles all: most of a small one's time would be the import of PyTorch."""
    return child("compile", TRITON_INTERPRET="0")


@pytest.mark.parametrize("name", [*KERNELS, *HOPPER_KERNELS])
def test_compiles_ahead(name: str, compiled: dict, record_property: pytest.FixtureRequest) -> None:
    report = compiled[name]
    record_property("resources", json.dumps(report))
    assert list(report) == targets_of(name)
    for target, found in report.items():
        assert found["shared"] <= TARGETS[target][1], (target, found)


@pytest.mark.parametrize("module", [wkv6_module.wkv6_has_hopper, wkv7_module.wkv7_has_hopper])
def test_hopper_kernels_serve_bfloat16_on_hopper_only(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)
    for capability, expected in (((9, 0), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert module(x, x) is expected
        assert not module(x, x.float()) and not module(x.float(), x)


def test_many_programs_take_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    with FakeTensorMode():
        for N, rows, fused in ((128, 2, True), (128, 1, False), (64, 2, False), (64, 3, True), (32, 32, False)):
            x = torch.zeros(rows, 64, 28, N, dtype=torch.bfloat16)
            plan6, plan7 = wkv6_module.wkv6_plan(x, None, None), wkv7_module.wkv7_plan(x, 28, None, -0.6065)
            assert wkv6_module.wkv6_span(x, x, plan6) == fused
            assert wkv7_module.wkv7_span(x, x, plan7) == fused
            assert not wkv7_module.wkv7_span(x, x, wkv7_module.wkv7_plan(x, 28, None, None))
            assert not wkv7_module.wkv7_span(x, x.float(), plan7)


@pytest.mark.parametrize("programs,chunks,slots,walks", [
    (28, 256, 132, 9), (56, 256, 264, 9), (56, 128, 132, 7), (112, 64, 132, 1), (896, 8, 132, 1), (1, 15, 132, 1),
    (28, 16, 132, 2),
])
def test_few_long_sequences_are_cut(programs: int, chunks: int, slots: int, walks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENTS", True)
    assert -(-chunks // segments.walk_span(programs, chunks, slots)) == walks


class Recorder:
    """In place of a kernel: keeps the grid and the arguments by name of each launch, after checking that they are its own."""

    def __init__(self, kernel: object, launches: list[tuple[str, tuple[int, ...], dict[str, object]]]) -> None:
        self.fn, self.launches = kernel.fn, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, num_warps: int, num_stages: int = 3, **kwargs: object) -> None:
            bound = inspect.signature(self.fn).bind(*args, **kwargs)
            assert all(0 < size < 2 ** 16 for size in grid[1:]), grid
            self.launches.append((self.fn.__name__, grid, bound.arguments))
        return launch


@pytest.mark.parametrize("rwkv7", [False, True])
def test_long_sequences_are_launched_in_segments(rwkv7: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(segments, "SEGMENTS", True)
    monkeypatch.setattr(wkv6_module, "WKV6_FUSED_PROGRAMS", (1, 1))
    monkeypatch.setattr(wkv7_module, "WKV7_FUSED_PROGRAMS", (1, 1))
    launches: list[tuple[str, tuple[int, ...], dict[str, object]]] = []
    for module in (wkv6_module, wkv7_module):
        for name in ("has_kernel", "has_hopper"):
            monkeypatch.setattr(module, f"wkv{6 + (module is wkv7_module)}_{name}", lambda *_: True)
        monkeypatch.setattr(module, "segment_join_kernel", Recorder(segments.segment_join_kernel, launches))
    monkeypatch.setattr(wkv6_module, "wkv6_segment_kernel", Recorder(wkv6_triton.wkv6_segment_kernel, launches))
    for name, (module, kernel, _) in HOPPER_KERNELS.items():
        if name.startswith("wkv7") is rwkv7:
            owner = import_module(f"radlads.backends.torch.kernels.{module}")
            monkeypatch.setattr(owner, kernel, Recorder(getattr(owner, kernel), launches))
    # 40 chunks of 4 heads of 64: five segments of 8.
    inputs = [x.requires_grad_() for x in draw(rwkv7, (2, 2550, 2, 64), 2, 0.6, torch.bfloat16, "cpu")]
    state = torch.zeros(2, 2, 64, 64, requires_grad=True)
    out, final = call(rwkv7, inputs, state, 1.0, -0.6065, None)
    torch.autograd.grad(out.float().sum() + final.sum(), [*inputs, state])
    seen = [(name.removesuffix("_kernel"), grid) for name, grid, _ in launches]
    join, pieces = ("segment_join", (4, 2, 2)), (1, 2, 8)
    if rwkv7:
        assert seen == [("wkv7_segment", (2, 10)), join, ("wkv7_fused_forward", (2, 10)), ("wkv7_fused_reverse", (2, 8)), join,
                        ("wkv7_fused_reverse", (2, 10)), ("wkv7_hopper_grad", (1, 2, 80))]
    else:
        assert seen == [("wkv6_segment", pieces), join, ("wkv6_fused", (2, 10)), ("wkv6_segment", pieces), join,
                        ("wkv6_fused", (2, 10)), ("wkv6_hopper_grad", (1, 2, 80))]
    walks = [arguments for name, _, arguments in launches if name.startswith(("wkv6_fused", "wkv7_fused"))]
    assert all(arguments["walk_chunks"] == 8 for arguments in walks)


def test_a_release_known_to_be_wrong_is_refused() -> None:
    from radlads.backends.torch.kernels.selftest import triton_refusal
    assert "3.5.1" in triton_refusal("3.5.1", 9) and triton_refusal("3.5.1", 8) is None
    assert triton_refusal("3.6.0", 9) is None and triton_refusal("3.7.1+git", 9) is None


def step_errors(rwkv7: bool, slots: list[int] | None, N: int, dtype: torch.dtype, device: str) -> list[float]:
    """Relative RMS errors of the output and the states of two real rows after one token, in a pool of five.

    Every other state of the pool and the memory around it must keep its bits, and rows of slot -1 come out as zeros.
    """
    torch.manual_seed(0)
    slots_of_rows = [0, 1] if slots is None else slots
    real = [row for row, slot in enumerate(slots_of_rows) if slot >= 0]
    used = [slots_of_rows[row] for row in real]
    inputs = draw(rwkv7, (len(slots_of_rows), 1, 2, N), 1, 1.0, torch.float32, "cpu")
    for x in inputs:
        x[[row for row in range(len(x)) if row not in real]] = float("nan")
    inputs = [x.to(device, dtype) for x in inputs]
    memory = torch.randn(7, 2, N, N, device=device)
    memory[[0, 1 + next(slot for slot in range(5) if slot not in used), 6]] = float("nan")
    before, pool = memory.clone(), memory[1:-1]
    want, want_states = recurrence([x[real].double() for x in inputs], pool[used].double(), 0.5, rwkv7)
    r, log_w, k, v, *removal = (x[:, 0] for x in inputs)
    index = None if slots is None else torch.tensor(slots, dtype=torch.int32, device=device)
    if rwkv7:
        got = decode.wkv7_step(r, log_w, k, v, *removal, pool, scale=0.5, slots=index)
    else:
        got = decode.wkv6_step(r, k, v, log_w, pool, scale=0.5, slots=index)
    others = [place for place in range(7) if place - 1 not in used]
    assert torch.equal(memory[others].view(torch.int32), before[others].view(torch.int32))
    assert all(not got[row].any() for row in range(len(got)) if row not in real)
    pairs = ((got[real], want[:, 0]), (pool[used], want_states))
    return [((x.double() - y).norm() / y.norm()).item() for x, y in pairs]


STEP_SLOTS = (None, [3, 0], [-1, 2, -1, 4, -1])


def interpret_steps() -> None:
    """The errors of each recurrence and choice of slots, and what a slot that the pool does not have comes out as."""
    decode.step_has_kernel = lambda r: True
    # A head size that is not a power of two: masked channels too.
    found = [error for rwkv7 in (False, True) for slots in STEP_SLOTS
             for error in step_errors(rwkv7, slots, 24, torch.float32, "cpu")]
    decode.check_slots = lambda *_: None  # as on a GPU, where the values are not read
    memory = torch.ones(6, 1, 16, 16)
    x = torch.ones(3, 1, 16)
    out = decode.wkv6_step(x, x, x, -x, memory[1:3], scale=1.0, slots=torch.tensor([2, 1, -2]))
    untouched = torch.equal(memory[[0, 1, 3, 4, 5]], torch.ones(5, 1, 16, 16)) and not memory[2].eq(1).any()
    print(json.dumps([*found, bool(untouched and out[[0, 2]].isnan().all() and out[1].isfinite().all())]))


@pytest.mark.parametrize("rwkv7", [False, True])
@pytest.mark.parametrize("slots", STEP_SLOTS)
def test_plain_step_equals_the_recurrence(rwkv7: bool, slots: list[int] | None) -> None:
    assert all(error < FLOAT32_BAR for error in step_errors(rwkv7, slots, 16, torch.float32, "cpu"))


def test_interpreted_step_equals_the_recurrence() -> None:
    *found, bounded = child("interpret_steps", TRITON_INTERPRET="1")
    assert len(found) == 4 * len(STEP_SLOTS) and all(error < FLOAT32_BAR for error in found), found
    assert bounded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rwkv7", [False, True])
@pytest.mark.parametrize("slots", STEP_SLOTS)
def test_gpu_step_equals_the_recurrence(rwkv7: bool, slots: list[int] | None) -> None:
    for dtype, bar in ((torch.float32, FLOAT32_BAR), (torch.bfloat16, BFLOAT16_BAR)):
        assert all(error < bar for error in step_errors(rwkv7, slots, 128, dtype, "cuda"))


@pytest.mark.parametrize("slots, message", [
    (torch.tensor([1, 1]), "none of them twice"), (torch.tensor([0, 3]), "below 3"), (torch.tensor([-2, 0]), "below 3"),
    (torch.tensor([0]), "int32 or int64"), (torch.tensor([0.0, 1.0]), "int32 or int64"), (None, "4 rows"),
])
def test_slots_that_do_not_fit_are_refused(slots: Tensor | None, message: str) -> None:
    x = torch.randn(4 if slots is None else 2, 1, 16)
    pool = torch.ones(3, 1, 16, 16)
    with pytest.raises(ValueError, match=message):
        decode.wkv6_step(x, x, x, -x.abs(), pool, scale=1.0, slots=slots)
    assert pool.eq(1).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    x = torch.randn(2, 3, 2, 32)
    with pytest.raises(ValueError, match="one shape"):
        wkv7_module.wkv7(x, x[:, :2], x, x, x, x)
    with pytest.raises(ValueError, match="batch of 1"):
        wkv6_module.wkv6(x, x, x, x, scale=1.0, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="state must be"):
        wkv6_module.wkv6(x, x, x, x, torch.zeros(1, 2, 32, 32), scale=1.0)


@pytest.mark.parametrize("rwkv7", [False, True])
def test_traced_shapes_and_gradients(rwkv7: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake registrations that torch.compile uses: right shapes forward and backward, without a launch."""
    monkeypatch.setattr(wkv6_module, "wkv6_has_kernel", lambda x: True)
    monkeypatch.setattr(wkv7_module, "wkv7_has_kernel", lambda x: True)
    with FakeTensorMode():
        inputs = [x.requires_grad_() for x in draw(rwkv7, (2, 70, 4, 64), 2, 0.6, torch.bfloat16, "cpu")]
        state = torch.zeros(2, 4, 64, 64, requires_grad=True)
        out, final = call(rwkv7, inputs, state, 1.0, None, None)
        grads = torch.autograd.grad(out.float().sum() + final.sum(), [*inputs, state])
    assert out.shape == inputs[0].shape and out.dtype == torch.bfloat16 and final.shape == state.shape
    assert [g.shape for g in grads] == [x.shape for x in [*inputs, state]]


# On a GPU alone: bfloat16 arithmetic is wrong in Triton's interpreter.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype,bar", [(torch.float32, FLOAT32_BAR), (torch.bfloat16, BFLOAT16_BAR)])
@pytest.mark.parametrize("name", CASES)
def test_gpu_matches_float64(name: str, dtype: torch.dtype, bar: float) -> None:
    found = errors(name, dtype, "cuda")
    assert max(found) < bar, found
    assert found == errors(name, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("N", [64, 96, 128])
@pytest.mark.parametrize("number", [6, 7])
def test_gpu_segments_match_float64(number: int, N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads of 33 chunks: with segments, no worse than allowed, and the same bits twice."""
    monkeypatch.setattr(segments, "SEGMENTS", True)
    monkeypatch.setattr(wkv6_module, "WKV6_FUSED_PROGRAMS", (1, 1))
    monkeypatch.setattr(wkv7_module, "WKV7_FUSED_PROGRAMS", (1, 1))
    bound = -5.0 if number == 6 else -0.6065
    monkeypatch.setitem(CASES, "segments", (number, (1, 2100, 2, N), 1 if number == 6 else 2, -bound, bound, None, True))
    x = torch.zeros(1, 2100, 2, N, dtype=torch.bfloat16, device="cuda")
    span = wkv6_module.wkv6_span(x, x, wkv6_module.wkv6_plan(x, None, bound)) if number == 6 else \
        wkv7_module.wkv7_span(x, x, wkv7_module.wkv7_plan(x, 2, None, bound))
    assert 8 <= span < 33
    found = errors("segments", torch.bfloat16, "cuda")
    assert max(found) < BFLOAT16_BAR, found
    assert found == errors("segments", torch.bfloat16, "cuda")


if __name__ == "__main__":
    {"interpret": interpret, "interpret_segments": interpret_segments, "interpret_steps": interpret_steps,
     "compile": compile_kernels}[sys.argv[1]](*sys.argv[2:])
