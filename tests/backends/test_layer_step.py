"""A token through a layer by few kernels: the same hidden states as the modules, and kernels that fit a GPU.

Interpreted and compiled in processes of their own: `python -m tests.backends.test_layer_step interpret|compile`.
"""

import json
import math
import sys

import pytest
import torch

from radlads.backends.torch import layer_step
from radlads.backends.torch.decode import Rows
from radlads.backends.torch.engine import TorchEngine
from radlads.backends.torch.model import Model
from radlads.backends.torch.seats import TorchSeats
from radlads.spec import ModelSpec
from tests.processes import printed_by

EIGHT = {"softmax": 8, "rwkv7": 8, "rwkv6": 8}


def random_student(kept: tuple[int, ...] = (1,), family: str = "qwen2", arch: str = "rwkv7", **options: object) -> Model:
    """A student of three layers with random weights."""
    teacher = ModelSpec(
        family, hidden_size=64, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=300,
        rope_theta=54321.0, qkv_bias=family == "qwen2", qk_norm=family == "qwen3",
    )  # fmt: skip
    model = Model(teacher.as_student(arch, kept, **options)).requires_grad_(False)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        weight.copy_(0.1 * torch.randn_like(weight) + (1.0 if "norm" in name else 0.0))
    return model


def worst(model: Model, count: int) -> float:
    """The largest relative RMS difference of hidden states and of states over two tokens, after a prompt of three."""
    device = model.head.device
    torch.manual_seed(1)
    tokens = torch.randint(0, 300, (count, 5), device=device)
    layer_step.MOST_ROWS = {}
    plain = Rows(model, count, 8)
    layer_step.MOST_ROWS = EIGHT
    fused = Rows(model, count, 8)
    assert fused.fused and not plain.fused
    errors = []
    for rows in (plain, fused):
        rows.begin(tokens[:, :3])
    for t in (3, 4):
        want, got = plain.step(tokens[:, t]).double(), fused.step(tokens[:, t]).double()
        errors.append(float((got - want).norm() / want.norm()))
    for mine, other in zip(fused.layers, plain.layers, strict=True):
        errors += [float((mine[name] - other[name]).norm() / other[name].norm()) for name in mine]
    assert all(math.isfinite(error) for error in errors), errors
    return max(errors)


def worst_in_seats(model: Model) -> float:
    """The largest relative RMS difference of logits and states of two of three seats, each at a position of its own."""
    torch.manual_seed(1)
    tokens = torch.randint(0, 300, (3, 5), device=model.head.device)
    engine = TorchEngine(model)
    states = [engine.feed(engine.start(), row[:length].tolist())[1] for row, length in zip(tokens, (2, 5, 3), strict=True)]
    results, pools = [], []
    for fused in (False, True):
        layer_step.MOST_ROWS = EIGHT if fused else {}
        seats = TorchSeats(model, 4)
        assert seats.fused[2] == fused
        places = [seats.enter(state) for state in states]
        before = [{name: pool.clone() for name, pool in layer.items()} for layer in seats.layers]
        results.append(torch.from_numpy(seats.step([places[2], places[0]], [7, 8])).double())
        pools.append([pool for layer in seats.layers for pool in layer.values()])
        for old, layer in zip(before, seats.layers, strict=True):
            for name, pool in layer.items():
                assert all(torch.equal(pool[seat], old[name][seat]) for seat in (places[1], 3))
                assert not torch.equal(pool[places[0]], old[name][places[0]])
    pairs = [(results[1], results[0]), *zip(pools[1], pools[0], strict=True)]
    errors = [float((got - want).norm() / want.norm()) for got, want in pairs]
    assert all(math.isfinite(error) for error in errors), errors
    return max(errors)


SEATED: dict[str, dict[str, object]] = {"rwkv7": {}, "rwkv6": {"rope": True}}
STUDENTS = {
    "rwkv7": {},
    "rwkv6": {"arch": "rwkv6"},
    "rwkv6-ablated": {"kept": (), "family": "llama", "arch": "rwkv6", "rope": True, "balance": False, "clamp": None},
}


def interpret() -> None:
    layer_step.runs_kernels = lambda weight: True
    counts = {"rwkv7": (1, 3), "rwkv6": (1,), "rwkv6-ablated": (3,)}
    found = {name: [worst(random_student(**STUDENTS[name]), n) for n in tried] for name, tried in counts.items()}
    found["seats"] = [worst_in_seats(random_student((), arch=arch, **options)) for arch, options in SEATED.items()]
    print(json.dumps(found))


def compile_kernels() -> None:
    """Spilled bytes of each kernel at the widths of a 7B model, one row and eight, for sm_90; all of them for sm_80."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from radlads.backends.torch.kernels import layer_step as kernels
    from radlads.backends.torch.kernels import layer_step_rwkv6 as kernels6
    from tests.backends.test_kernels_triton import stack_bytes

    sizes = {"K": 3584, "C": 3584, "CKV": 512, "RW": 96, "RA": 96, "RV": 64, "RG": 256, "BIAS": True, "H": 28, "HKV": 4,
             "N": 128, "BN": 128, "BV": 4, "ROPE": True, "MIX_FIRST": True, "BR": 32, "R": 96, "WIDTH": 480, "BALANCE": True,
             "ANGLES": 64, "HAS_SLOTS": True}  # fmt: skip
    floats = ("qkv", "low", "parts", "v_first", "state", "qkvg", "log_w")
    scalars = {"slots": "*i64"} | dict.fromkeys(("count", "rows", "pool"), "i32")
    scalars |= dict.fromkeys(("eps", "scale", "clamp"), "fp32")
    special = {"expand": {"COLS": 64}, "decay": {"COLS": 64}, "shift": {"COLS": 32, "BK": 1024}}
    special["shift_low"] = {"COLS": 8, "BK": 256}
    by_rows = ("project", "project_shifted", "add_linear", "gated_units")
    spilled = {}
    for name in (*by_rows, "expand", "mix", "shift_low", "shift", "decay", "mix6"):
        for rows in (1, 8) if name in by_rows else (1,):
            kernel = getattr(kernels, f"{name}_kernel", None) or getattr(kernels6, f"{name}_kernel")
            columns = layer_step.launch_columns(rows)
            known = sizes | layer_step.launch_sizes(rows) | {"COLS": columns} | special.get(name, {})
            known = {key: value for key, value in known.items() if key in kernel.arg_names}
            signature = {key: scalars.get(key, "*fp32" if key in floats else "*bf16") for key in kernel.arg_names}
            signature |= dict.fromkeys(known, "constexpr") | ({"low": "fp32"} if name == "mix" else {})
            aligned = {(i,): [["tt.divisibility", 16]] for i, key in enumerate(kernel.arg_names) if signature[key][0] == "*"}
            source = ASTSource(fn=kernel, signature=signature, constexprs=known, attrs=aligned)
            for target in (80, 90):
                options = {"num_warps": 1 if name in ("mix", "mix6") else 4}
                built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
                spilled[f"{name} {rows} {target}"] = stack_bytes(built.asm.get("cubin"))
    print(json.dumps(spilled))


def child(word: str, interpreted: str) -> object:
    pytest.importorskip("triton")
    return printed_by(__name__, word, TRITON_INTERPRET=interpreted)


def test_interpreted_steps_equal_the_modules() -> None:
    found = child("interpret", "1")
    assert list(found) == [*STUDENTS, "seats"]
    assert all(error < 1e-5 for errors in found.values() for error in errors), found


def test_compiled_ahead_nothing_spills() -> None:
    spilled = child("compile", "0")
    assert len(spilled) == 28 and not any(spilled.values()), spilled


@pytest.mark.parametrize(
    "family, arch, options",
    [
        ("qwen3", "rwkv7", {}), ("qwen3", "rwkv6", {}), ("qwen2", "rwkv7", {"variant": "B", "groupnorm": True}),
        ("qwen2", "rwkv6", {"groupnorm": True}), ("qwen2", "rwkv6", {"gate": "lowrank"}), ("qwen2", "hxa079", {}),
    ],
)
def test_models_that_the_kernels_do_not_know_take_the_modules(family, arch, options, monkeypatch) -> None:
    monkeypatch.setattr(layer_step, "runs_kernels", lambda weight: True)
    monkeypatch.setattr(layer_step, "MOST_ROWS", {**EIGHT, arch: 8})
    assert not layer_step.step_has_kernels(random_student((), family, arch, **options), 1)


def test_adapters_and_many_rows_take_the_modules(monkeypatch) -> None:
    monkeypatch.setattr(layer_step, "runs_kernels", lambda weight: True)
    model = random_student()
    monkeypatch.setattr(layer_step, "MOST_ROWS", EIGHT)
    assert layer_step.step_has_kernels(model, 8)
    assert not layer_step.step_has_kernels(model, 9)
    model.model.layers[2].mlp.up_proj = torch.nn.Sequential(model.model.layers[2].mlp.up_proj)
    assert not layer_step.step_has_kernels(model, 1)


@pytest.mark.gpu
def test_on_a_gpu_steps_equal_the_modules(monkeypatch) -> None:
    monkeypatch.setattr(layer_step, "MOST_ROWS", EIGHT)
    for options in STUDENTS.values():
        model = random_student(**options).cuda()
        assert all(worst(model, count) < 1e-4 for count in (1, 3, 8))
    for arch, options in SEATED.items():
        assert worst_in_seats(random_student((), arch=arch, **options).cuda()) < 1e-4


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_kernels}[sys.argv[1]]()
