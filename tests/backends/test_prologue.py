"""The recurrences from raw projections: exact against float64, in mixers and alone, and kernels that fit a GPU.

Interpreted and compiled in processes of their own: `python -m tests.backends.test_prologue interpret|models|traced|compile`.
"""

import json
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from radlads.backends.torch.kernels import prologue
from radlads.oracle import oracle_logits
from tests.backends.test_kernels_triton import BFLOAT16_BAR, FLOAT32_BAR, recurrence
from tests.backends.test_torch_model import SPECS, model_of, random_weights
from tests.processes import printed_by

# name: (B, T, H, Hkv, N), options of wkv7_raw or wkv6_raw
CASES = {
    "decay": ((2, 20, 4, 2, 16), {"form": "decay", "scale": 0.5}),
    "log": ((1, 20, 2, 2, 24), {"form": "log"}),
    "scaled": ((2, 33, 4, 1, 16), {"form": "scaled"}),
    "scaled_rate": ((1, 11, 2, 1, 96), {"form": "scaled_rate"}),
    "rwkv6": ((2, 20, 4, 2, 16), {"scale": 0.5, "clamp": -5.0}),
    "rwkv6-any-decay": ((1, 11, 2, 1, 96), {"scale": 0.5}),
    "rwkv6-unbalanced": ((1, 20, 4, 2, 32), {"scale": 0.5, "clamp": -5.0, "balance": False}),
}
STUDENTS = ("rwkv7-A", "rwkv7-B", "rwkv7-C", "rwkv7-hybrid-full-gate", "rwkv6", "rwkv6-groupnorm-hybrid", "hxa079", "hxa07c")
Named = dict[str, Tensor]


def drawn(name: str, dtype: torch.dtype, device: str) -> Named:
    """Random inputs, decays from almost none to almost all; k, v and the gate as parts of a wider product."""
    (B, T, H, Hkv, N), options = CASES[name]
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(B, T, (H + 3 * Hkv) * N, generator=draw).to(device, dtype)
    gate, k, v, v_first = (x.unflatten(-1, (-1, N)) for x in wide.split([H * N, Hkv * N, Hkv * N, Hkv * N], -1))
    r, d, a, v_mix = (torch.randn(B, T, H, N, generator=draw).to(device, dtype) for _ in range(4))
    state = torch.randn(B, H, N, N, generator=draw).to(device)
    if name.startswith("rwkv6"):
        return {"q": r, "d": 2 * d - 2, "k": k, "v": v, "state": state, "gate": gate}
    scales = {n: torch.randn(H * N, generator=draw).to(device, dtype) for n in ("k_k", "k_a")}
    return {"r": r, "d": 3 * d - 2, "k": k, "v": v, "a": a, "state": state, "v_first": v_first, "v_mix": v_mix, "gate": gate,
            **(scales if options["form"].startswith("scaled") else {})}  # fmt: skip


def prepared(x: Named, form: str | None, clamp: float | None = None, balance: bool = True) -> tuple[Tensor, ...]:
    """The equations of docs/mixers.md in the dtype of x: log_w, written keys and, for RWKV-7, -kappa and beta."""
    k = x["k"].repeat_interleave(x["d"].shape[2] // x["k"].shape[2], 2)
    if form is None:
        log_w = -x["d"].exp() if clamp is None else torch.maximum(-x["d"].exp(), torch.tensor(clamp))
        return log_w, k * (1 - log_w.exp()) if balance else k
    L = -0.5 - F.softplus(-x["d"])
    log_w, a = -L.exp(), torch.sigmoid(x["a"])
    if form in ("decay", "log"):
        kappa = k / k.norm(dim=-1, keepdim=True)
        return log_w, k * (1 - (L if form == "log" else log_w.exp()) + a), -kappa, kappa * a
    kappa = k * x["k_k"].view(k.shape[2:])
    kappa = kappa / kappa.norm(dim=-1, keepdim=True)
    key_scale = 1 + (a - 1) * x["k_a"].view(k.shape[2:])
    return log_w, k * key_scale, -kappa, kappa * (key_scale if form == "scaled_rate" else a)


def wanted(x: Named, form: str | None = None, scale: float = 1.0, clamp: float | None = None, balance: bool = True
           ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """wkv6_raw and wkv7_raw by their equations, token by token."""
    log_w, k, *removal = prepared(x, form, clamp, balance)
    v = x["v"]
    if form is not None:
        groups = x["d"].shape[2] // v.shape[2]
        v, first = (y.repeat_interleave(groups, 2) for y in (v, x["v_first"]))
        v = v + (first - v) * torch.sigmoid(x["v_mix"])
    out, state = recurrence([x["q" if form is None else "r"], log_w, k, v, *removal], x["state"], scale, form is not None)
    return out * torch.sigmoid(x["gate"]), state


def found(x: Named, **options: object) -> tuple[Tensor, Tensor]:
    return (prologue.wkv7_raw if "r" in x else prologue.wkv6_raw)(**x, **options)


def compared(got: tuple[Tensor, ...], want: tuple[Tensor, ...], ours: Named, exact: Named) -> dict[str, float]:
    """Relative RMS differences of results and, for random gradients of these, of the gradients of all they depend on."""
    draw = torch.Generator().manual_seed(1)
    seeds = [torch.randn(x.shape, generator=draw).to(x.device, x.dtype) for x in got]
    got_grads = torch.autograd.grad(got, list(ours.values()), seeds, allow_unused=True)
    want_grads = torch.autograd.grad(want, list(exact.values()), [x.double() for x in seeds], allow_unused=True)
    pairs = {f"result {i}": pair for i, pair in enumerate(zip(got, want, strict=True))}
    for name, x, y in zip(ours, got_grads, want_grads, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            pairs[f"d({name})"] = x, y
    return {name: ((x.double() - y).norm() / y.norm()).item() for name, (x, y) in pairs.items()}


def whole_errors(name: str, device: str) -> dict[str, float]:
    """Errors of a case's raw recurrence in float32."""
    options = CASES[name][1]
    inputs = drawn(name, torch.float32, device)
    ours = {n: x.requires_grad_() for n, x in inputs.items()}
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    return compared(found(ours, **options), wanted(exact, **options), ours, exact)


def part_errors(name: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    """Errors of a case's kernels alone, without a recurrence that enlarges the rounding of its inputs."""
    options = {n: x for n, x in CASES[name][1].items() if n != "scale"}
    inputs = drawn(name, dtype, device)
    ours = {n: x.requires_grad_() for n, x in inputs.items()}
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    if "r" not in ours:
        balance = options.get("balance", True)
        made = slice(2 if balance else 1)  # unbalanced keys are handed on
        keys = prologue.wkv6_keys(ours["d"], ours["k"], clamp=options.get("clamp"), balance=balance, fused=True)
        errors = compared(keys[made], prepared(exact, None, **options)[made], ours, exact)
    else:
        keys = prologue.wkv7_keys(*(ours.get(n) for n in ("d", "k", "a")), options["form"], ours.get("k_k"), ours.get("k_a"),
                                  fused=True)  # fmt: skip
        errors = compared(keys, prepared(exact, **options), ours, exact)
        groups = ours["d"].shape[2] // ours["v"].shape[2]
        v, first = (exact[n].repeat_interleave(groups, 2) for n in ("v", "v_first"))
        values = prologue.blended(ours["v"], ours["v_first"], ours["v_mix"], fused=True)
        wanted_values = v + (first - v) * torch.sigmoid(exact["v_mix"])
        errors |= {f"values {n}": e for n, e in compared((values,), (wanted_values,), ours, exact).items()}
    gated = prologue.blended(None, ours["gate"], ours["d"], fused=True)
    wanted_gated = exact["gate"] * torch.sigmoid(exact["d"])
    return errors | {f"gate {n}": e for n, e in compared((gated,), (wanted_gated,), ours, exact).items()}


def interpret() -> None:
    """Errors of every case: the kernels alone in bfloat16, and with a recurrence (in its plain form) in float32."""
    prologue.prologue_has_kernel = lambda k: True
    whole = {name: whole_errors(name, "cpu") for name in CASES}
    parts = {f"{name} bfloat16": part_errors(name, torch.bfloat16, "cpu") for name in CASES}
    print(json.dumps(whole | parts))


def models() -> None:
    """Relative errors of logits against the oracle, and of gradients against the mixers' own operations, by kind of student."""
    prologue.prologue_has_kernel = lambda k: True
    errors = {}
    for name in STUDENTS:
        spec = SPECS[name]
        weights = random_weights(spec)
        model = model_of(spec, weights)
        tokens = torch.randint(0, spec.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[0, :2] = False
        grads = []
        for prologue.FUSED_PROLOGUE in (False, True):
            model.zero_grad()
            logits = model(tokens, mask=mask)[0]
            (logits[mask] ** 2).sum().backward()
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        want = torch.from_numpy(oracle_logits(spec, weights, tokens[1].numpy()))
        plain, fused = grads
        assert plain.keys() == fused.keys()
        errors[name] = [float((logits[1].detach() - want).norm() / want.norm()),
                        max(float((fused[n] - g).norm() / g.norm().clamp(min=1e-6)) for n, g in plain.items())]  # fmt: skip
    print(json.dumps(errors))


def traced() -> None:
    """One graph without breaks, with the same results; the registrations pass PyTorch's own checks."""
    prologue.prologue_has_kernel = lambda k: True
    x = {n: y.requires_grad_() for n, y in drawn("decay", torch.float32, "cpu").items()}

    def grads(fn: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        results = fn(x, form="decay")
        return [*results, *torch.autograd.grad(sum(y.square().sum() for y in results), list(x.values()))]

    torch.testing.assert_close(grads(torch.compile(found, fullgraph=True, backend="aot_eager")), grads(found))
    d, k, v, a, first, mix = (x[n].detach()[:, :3].requires_grad_() for n in ("d", "k", "v", "a", "v_first", "v_mix"))
    scales = torch.randn(2, 1, 1, d.shape[2] * d.shape[3]).unbind()
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(prologue.wkv6_keys_op, (d, k, None, True), test_utils=checks)
    torch.library.opcheck(prologue.wkv7_keys_op, (d, k, a, *scales, "scaled"), test_utils=checks)
    torch.library.opcheck(prologue.blend_op, (v, first, mix), test_utils=checks)
    print(json.dumps("one graph"))


def compile_kernels() -> None:
    """Spilled bytes of each kernel at the heads of a 7B model, bfloat16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from radlads.backends.torch.kernels import prologue_triton as kernels
    from tests.backends.test_kernels_triton import TARGETS, stack_bytes

    sizes = {"GROUP": 7, "N": 128, "BN": 128, "ROWS": 8, "CLAMPED": True, "BALANCE": True, "HAS_X": True}
    scalars = {"clamp": "fp32", "low": "fp32"} | dict.fromkeys(("tokens", "H", "step_k", "step_x", "step_y", "step_share"), "i32")
    spilled = {}
    for name in ("keys6", "keys6_grad", "keys7", "keys7_grad", "blend", "blend_grad"):
        kernel = getattr(kernels, f"{name}_kernel")
        for form in prologue.KEY_FORMS if name == "keys7_grad" else ("decay",):
            known = {n: x for n, x in (sizes | {"FORM": form}).items() if n in kernel.arg_names}
            if form in ("decay", "log") and "k_k" in kernel.arg_names:
                known |= {"k_k": None, "k_a": None}
            signature = {n: "constexpr" if n in known else scalars.get(n, "*fp32" if n == "d_scales" else "*bf16")
                         for n in kernel.arg_names}  # fmt: skip
            aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
                       if signature[n][0] == "*" or n.startswith("step")}  # fmt: skip
            source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=aligned)
            for target, (place, _) in TARGETS.items():
                built = triton.compile(source, target=GPUTarget(*place), options={"num_warps": 4})
                spilled[f"{name} {form} {target}"] = stack_bytes(built.asm.get("cubin"))
    print(json.dumps(spilled))


def child(word: str, interpreted: str = "1") -> object:
    pytest.importorskip("triton")
    return printed_by(__name__, word, TRITON_INTERPRET=interpreted)


def test_interpreted_kernels_match_float64() -> None:
    errors = child("interpret")
    assert len(errors) == 2 * len(CASES)
    for name, parts in errors.items():
        bar = BFLOAT16_BAR if name.endswith("bfloat16") else FLOAT32_BAR
        assert all(error < bar for error in parts.values()), (name, parts)


def test_students_with_interpreted_kernels_match_the_oracle() -> None:
    errors = child("models")
    assert tuple(errors) == STUDENTS and all(error < FLOAT32_BAR for pair in errors.values() for error in pair), errors


def test_traced_as_one_graph() -> None:
    assert child("traced") == "one graph"


def test_compiled_ahead_nothing_spills() -> None:
    spilled = child("compile", "0")
    assert len(spilled) == 27 and not any(spilled.values()), spilled


@pytest.mark.parametrize("name", CASES)
def test_plain_form_matches_float64(name: str) -> None:
    errors = whole_errors(name, "cpu")
    assert max(errors.values()) < FLOAT32_BAR, errors


def test_mixers_take_the_kernels_only_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prologue, "prologue_has_kernel", lambda k: True)
    assert not prologue.mixer_is_fused(torch.zeros(1, 1, 1, 16))
    monkeypatch.setattr(prologue, "FUSED_PROLOGUE", True)
    assert prologue.mixer_is_fused(torch.zeros(1, 1, 1, 16))


def test_inputs_that_do_not_fit_are_refused() -> None:
    x = torch.randn(2, 3, 2, 32)
    with pytest.raises(ValueError, match="d must have"):
        prologue.wkv6_raw(x, x[:, :2], x, x, scale=1.0)
    with pytest.raises(ValueError, match="k and v must be"):
        prologue.wkv7_raw(x, x, x[:, :, :1], x, x)
    with pytest.raises(ValueError, match="go together"):
        prologue.wkv7_raw(x, x, x, x, x, v_first=x)
    with pytest.raises(ValueError, match="v_first must have"):
        prologue.wkv7_raw(x, x, x, x, x, v_first=x[:, :, :1], v_mix=x)
    with pytest.raises(ValueError, match="form must be"):
        prologue.wkv7_raw(x, x, x, x, x, form="balanced")
    with pytest.raises(ValueError, match="without k_k"):
        prologue.wkv7_raw(x, x, x, x, x, form="scaled")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_kernels_match_float64(name: str) -> None:
    for errors, bar in ((whole_errors(name, "cuda"), FLOAT32_BAR), (part_errors(name, torch.float32, "cuda"), FLOAT32_BAR),
                        (part_errors(name, torch.bfloat16, "cuda"), BFLOAT16_BAR)):  # fmt: skip
        assert all(error < bar for error in errors.values()), errors
    assert part_errors(name, torch.bfloat16, "cuda") == errors


if __name__ == "__main__":
    {"interpret": interpret, "models": models, "traced": traced, "compile": compile_kernels}[sys.argv[1]]()
