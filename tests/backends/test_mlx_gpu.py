"""The GPU kernels' own source, compiled and run as C++ (tests/shim): against float64, and against faults put in on purpose."""

import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
import torch

from radlads.backends.mlx import selftest
from radlads.backends.mlx.kernels import gpu
from radlads.backends.mlx.kernels.gpu import CUDA, LANES, METAL, ROWS, GpuKernel, has_kernels
from radlads.backends.mlx.kernels.scan import CHECKPOINT, SCAN, SHARED_BYTES, block_size, scan
from radlads.backends.mlx.kernels.step import HXA_BONUS_STEP, HXA_STEP, STEP6, STEP7
from radlads.backends.mlx.model import Model, ModelArgs
from radlads.backends.mlx.selftest import GOLDENS
from radlads.oracle import oracle_logits
from radlads.spec import ModelSpec
from tests.backends.test_mlx_kernels import OPS, errors, loop, make_inputs, relative
from tests.backends.test_mlx_model import random_tensor
from tests.golden.make import golden
from tests.shim import shim
from tests.shim.compilers import CLANG, complaints_as_metal, ptx

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
needs_clang = pytest.mark.skipif(CLANG is None, reason="clang is not installed")
needs_gpu = pytest.mark.skipif(mx.default_device() == mx.cpu, reason="MLX has no GPU here")
# (batch, tokens, heads, head size, decay): one token, blocks and checkpoints cut short or met exactly
CASES = [
    (1, 1, 1, 64, "mixed"),
    (2, 37, 2, 64, "mixed"),
    (1, 32, 1, 64, "none"),
    (1, 19, 1, 96, "strongest"),
    (1, 35, 1, 128, "weak"),
]
TINY = ModelSpec("qwen3", 40, 56, 2, 2, 1, 64, 61, rope_theta=12345.0, qk_norm=True)
GROUPED = replace(TINY, num_heads=4, num_kv_heads=2)  # a wrong key head shows only where there are several
STEPS = {
    "rwkv6": TINY.as_student("rwkv6"),
    "rwkv6 norm": TINY.as_student("rwkv6", gate="lowrank", rope=True, token_shift=False, clamp=None, groupnorm=True),
    "rwkv6 plain": GROUPED.as_student("rwkv6", gate="none", balance=False),
    "rwkv7 A": TINY.as_student("rwkv7", variant="A"),
    "rwkv7 B": TINY.as_student("rwkv7", variant="B", gate="none"),
    "rwkv7 C": replace(TINY, head_dim=128).as_student("rwkv7"),
    "hxa079": GROUPED.as_student("hxa079"),
    "hxa07a": replace(TINY, head_dim=96).as_student("hxa07a"),
    "hxa07c": GROUPED.as_student("hxa07c", rope=False),
}


@pytest.fixture
def use(monkeypatch):
    """A function that puts a dialect in place of this machine's GPU."""

    def put(dialect):
        monkeypatch.setattr(gpu, "dialect", lambda: dialect)

    return put


@needs_compiler
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_state_and_gradients_equal_the_token_loop(name, case, use):
    use(shim())
    report = errors(name, make_inputs(name, *case), None)
    assert max(report.values()) <= 1e-6, report


@needs_gpu
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("decay", ["mixed", "none", "strongest", "weak"])
@pytest.mark.parametrize("head_size", LANES)
def test_this_gpu_equals_the_token_loop(name, decay, head_size):
    for shape in ((1, 1, 1), (2, 37, 3), (1, 16, 2), (3, 130, 2)):
        report = errors(name, make_inputs(name, *shape, head_size, decay), None)
        assert max(report.values()) <= 1e-5, (shape, report)


@needs_compiler
@pytest.mark.parametrize("name", OPS)
def test_thread_order_and_spelling_change_no_bit(name, use):
    arrays = list(map(mx.array, make_inputs(name, 1, 19, 1, 64, "mixed")))
    results = []
    for dialect in (shim(), shim(backwards=True), shim(cuda=True)):
        use(dialect)
        results.append(mx.vjp(lambda *x: OPS[name](*x, scale=0.5), arrays, arrays[:1] + arrays[-1:]))
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert all(mx.array_equal(x, y) for x, y in zip(mine, theirs, strict=True))


@needs_compiler
@pytest.mark.parametrize("dtype, bound", [(mx.bfloat16, 4e-3), (mx.float16, 5e-4)])
def test_short_floats_are_rounded_once(dtype, bound, use):
    use(shim())
    *arrays, state = map(mx.array, make_inputs("wkv7", 1, 20, 1, 64, "weak"))
    arrays = [x.astype(dtype) for x in arrays]
    out, last = scan(True, 1.0)(*arrays, state)
    exact = loop("wkv7", [torch.tensor(np.array(x.astype(mx.float32)), dtype=torch.float64) for x in (*arrays, state)], 1.0)
    assert (out.dtype, last.dtype) == (dtype, mx.float32)
    assert relative(out.astype(mx.float32), exact[0]) <= bound and relative(last, exact[1]) <= 1e-6


@pytest.mark.parametrize("on", [pytest.param("shim", marks=needs_compiler), pytest.param("gpu", marks=needs_gpu)])
@pytest.mark.parametrize("name", STEPS)
def test_fused_step_equals_the_oracle(name, on, use):
    if on == "shim":
        use(shim())
    spec, rng = STEPS[name], np.random.default_rng(0)
    weights = {key: random_tensor(key, row.shape, rng) for key, row in spec.tensors().items()}
    model = Model(ModelArgs(radlads=spec.to_dict()))
    model.load_weights([(key, mx.array(x)) for key, x in weights.items()], strict=True)
    model.eval()
    tokens = rng.integers(0, spec.V, 6)
    expected = oracle_logits(spec, {key: x.astype(np.float64) for key, x in weights.items()}, tokens)
    cache = model.make_cache()
    found = [model(mx.array(tokens[i : i + 1])[None], cache)[0] for i in range(6)]
    assert relative64(mx.concatenate(found), expected) <= 1e-5
    # Two rows, the second one token longer on the left: its pad is masked by the same kernel.
    caches = [replace_padding(c) for c in model.make_cache()]
    rows = [np.stack([tokens[i], tokens[i - 1] if i else 7]) for i in range(4)]
    found = [model(mx.array(row)[:, None], caches) for row in rows]
    assert relative64(mx.concatenate(found, axis=1)[1, 1:], expected[:3]) <= 1e-5


def replace_padding(cache):
    """The cache of a batch of two whose second row has one pad on the left."""
    return type(cache)(len(cache.cache), left_padding=[0, 1])


def relative64(found, expected):
    return relative(found, torch.tensor(expected))


def test_only_a_gpu_and_known_head_sizes_have_kernels(use):
    assert has_kernels(64) == (mx.default_device() == mx.gpu)
    use(METAL)
    assert [has_kernels(N) for N in (8, 64, 80, 96, 128, 256)] == [False, True, False, True, True, False]


# ---- what the shim must notice ----


def damaged(kernel, before, after, place=0):
    """The kernel with one of the texts `before` replaced."""
    parts = kernel.source.split(before)
    source = before.join(parts[: place + 1]) + after + before.join(parts[place + 1 :])
    assert source != kernel.source
    return replace(kernel, source=source)


def result_of(kernel, monkeypatch, use, backwards=False):
    """Everything that wkv6 and its gradient give with `kernel` in place of its sound form."""
    task = kernel.name.removeprefix("wkv6_")
    monkeypatch.setitem(SCAN[False], task, kernel)
    scan.cache_clear()
    use(shim(backwards=backwards))
    arrays = list(map(mx.array, make_inputs("wkv6", 1, 40, 1, 64, "weak")))
    slopes = arrays[:1] + arrays[-1:]
    results = mx.vjp(lambda *x: OPS["wkv6"](*x, scale=0.5), arrays, slopes)
    monkeypatch.undo()
    scan.cache_clear()
    return [x for part in results for x in part]


@needs_compiler
@pytest.mark.parametrize("task, barriers", [("forward", 2), ("rows", 2), ("columns", 3)])
def test_each_barrier_is_needed(task, barriers, monkeypatch, use):
    kernel = SCAN[False][task]
    assert kernel.source.count("BARRIER();") == barriers
    sound = result_of(kernel, monkeypatch, use)
    for place in range(barriers):
        results = [result_of(damaged(kernel, "BARRIER();", "", place), monkeypatch, use, order) for order in (False, True)]
        assert any(not mx.allclose(x, y, rtol=1e-3, atol=1e-3) for found in results for x, y in zip(found, sound, strict=True))


FAULTS = {
    "barrier for some": ("BARRIER();", "if (me < 7) BARRIER();", "different barriers"),
    "early leave": ("BARRIER();", "if (me == 3) return; BARRIER();", "different barriers"),
    "too much memory": ("SHARED float4 shared_r[", "SHARED float4 shared_r[6 * ", "32 KB"),
    "write outside": ("put4(last + (head", "put4(last - 64 + (head", "wrote outside last"),
    "unknown name": ("shared_v[t * ROWS", "shared_u[t * ROWS", "shared_u"),
}


@needs_compiler
@pytest.mark.parametrize("before, after, reason", FAULTS.values(), ids=FAULTS)
def test_faults_are_found(before, after, reason, monkeypatch, use):
    with pytest.raises(RuntimeError, match=reason):
        result_of(damaged(SCAN[False]["forward"], before, after), monkeypatch, use)


# ---- what a compiler for each kind of GPU says ----

EVERY = [*SCAN[False].values(), *SCAN[True].values(), STEP6, STEP7, HXA_STEP, HXA_BONUS_STEP]


def constants(head_size, inputs=6):
    """The constants of every kernel, with all that can be switched on."""
    steps = {"NORM": 1, "MASKED": 1, "GATE": 2, "BALANCE": 1, "VARIANT": 0, "RESIDUAL": 1, "TRUE_DECAY": 1}
    block = block_size(99, head_size, inputs)
    return {"N": head_size, "LANES": LANES[head_size], "ROWS": ROWS, "BLOCK": block, "CHECKPOINT": CHECKPOINT, **steps}


@needs_clang
@pytest.mark.parametrize("kernel", EVERY, ids=lambda kernel: kernel.name)
def test_address_spaces_agree(kernel, tmp_path):
    assert complaints_as_metal(kernel, constants(64), tmp_path) == ""


@needs_clang
def test_a_wrong_address_space_is_noticed(tmp_path):
    wrong = damaged(SCAN[True]["forward"], "const int tokens", "const DEVICE float* no = scale; const int tokens")
    assert "cannot initialize" in complaints_as_metal(wrong, constants(64), tmp_path)


@needs_clang
@pytest.mark.parametrize("kernel", EVERY, ids=lambda kernel: kernel.name)
def test_cuda_spelling_keeps_states_in_registers(kernel, tmp_path):
    assert ".local" not in ptx(kernel, constants(128), tmp_path)


def test_blocks_fit_into_threadgroup_memory():
    assert {(N, inputs): block_size(99, N, inputs) for N in LANES for inputs in (4, 6)} == {
        (64, 4): 16, (64, 6): 16, (96, 4): 16, (96, 6): 16, (128, 4): 16, (128, 6): 8,
    }  # fmt: skip
    assert all(4 * block_size(99, N, 6) * (5 * N + ROWS) <= SHARED_BYTES for N in LANES)


def test_sources_are_plain_constants_under_different_names():
    names = [kernel.name for kernel in EVERY]
    assert len(set(names)) == len(names) and all(isinstance(kernel, GpuKernel) for kernel in EVERY)
    assert METAL.header != CUDA.header


# ---- the self-test ----


def test_golden_files_are_what_the_token_loop_gives():
    for op in OPS:
        for head_size in LANES:
            path = GOLDENS / f"{op}-{head_size}.npz"
            fresh = golden(op, head_size)
            assert path.stat().st_size <= 200_000
            with np.load(path) as stored:
                assert set(stored) == set(fresh)
                assert all(np.allclose(stored[name], fresh[name], rtol=1e-5, atol=1e-6) for name in fresh)


@needs_compiler
def test_self_test_passes_with_our_kernels_and_finds_a_wrong_one(use, monkeypatch):
    use(shim())
    monkeypatch.setattr(selftest, "LANES", {64: 4})
    monkeypatch.setattr(selftest, "STUDENTS", {"rwkv7 B": selftest.STUDENTS["rwkv7 B"]})
    done = [check() for check in selftest.checks().values()]
    assert [check.good for check in done] == [True] * 3, done
    use(replace(shim(), header=METAL.header.replace("s * x.x, s * x.y", "s * x.x, 1.001f * s * x.y")))
    assert not all(selftest.golden_check(op, 64).good for op in selftest.OPS)
