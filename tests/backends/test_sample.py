"""Writing text in bulk: the same tokens as the plain loop over the model, the template's in their places, and the kernel.

The kernel is interpreted and compiled in processes of their own: `python -m tests.backends.test_sample interpret|compile`.
"""

import json
import sys
from collections.abc import Iterator
from itertools import repeat

import numpy as np
import pytest
import torch
from torch import Tensor

from radlads.backends.torch import sample
from radlads.backends.torch.decode import draw, logits_of
from radlads.backends.torch.kernels import attend as attend_module
from radlads.backends.torch.load import load_model
from radlads.backends.torch.model import Model
from radlads.folder import open_folder
from radlads.weights_tools.surgery import make_student
from tests.models import tiny_teacher
from tests.processes import printed_by


@pytest.fixture(scope="module", params=["softmax", "rwkv7", "rwkv6 and softmax"])
def model(request, tmp_path_factory) -> Model:
    """A teacher, a student, and a student with a kept layer."""
    path = tmp_path_factory.mktemp("sample")
    tiny_teacher(path / "teacher", "llama")
    if request.param == "softmax":
        return load_model(open_folder(path / "teacher"))
    arch, *kept = request.param.split(" and ")
    make_student(open_folder(path / "teacher"), path / "student", arch=arch, keep_softmax=(1,) if kept else (), options={})
    return load_model(open_folder(path / "student"))


def plain_loop(model: Model, opening: list[int], rows: int, length: int, temp: float, seed: int) -> Tensor:
    """The same without caches of fixed size: the model's own state, which grows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([opening] * rows)
    new, state = tokens, None
    with torch.no_grad():
        while tokens.shape[1] < length:
            hidden, state = model.model(new, state)
            new = draw(logits_of(model, hidden[:, -1]), temp, generator)[:, None]
            tokens = torch.cat([tokens, new], 1)
    return tokens


@pytest.mark.parametrize("temp", [0.0, 1.3])
def test_the_same_tokens_as_the_plain_loop(model: Model, temp: float) -> None:
    writer = sample.Writer(model, 3, 20, sample.Turns(), temp, torch.Generator().manual_seed(5))
    opening = torch.tensor([[7, 8, 9]] * 3)
    first, second = writer.write(opening), writer.write(opening)
    assert first.tokens.tolist() == plain_loop(model, [7, 8, 9], 3, 20, temp, 5).tolist()
    assert (first.origin[:, :3] == sample.GIVEN).all() and (first.origin[:, 3:] == sample.WROTE).all()
    # The next rows begin from nothing, with the random numbers that follow.
    assert np.array_equal(first.tokens, second.tokens) == (temp == 0)


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    drawn = draw(logits.repeat(40_000, 1), 0.7, generator).bincount(minlength=4) / 40_000
    torch.testing.assert_close(drawn, (logits / 0.7).softmax(-1), rtol=0, atol=0.01)


def test_a_conversation_is_fed_as_the_template_writes_it(tmp_path, monkeypatch) -> None:
    model = load_model(open_folder(tiny_teacher(tmp_path / "teacher")))
    words = iter([21, 22, 2, 99, 99, 31, 0, 99, 99, 2, 99, 51, 52])
    monkeypatch.setattr(sample, "draw", lambda *_: torch.tensor([next(words)]))
    turns = sample.Turns([2, 7], [2, 8], frozenset({0, 2}))
    writer = sample.Writer(model, 1, 15, turns, 1.0, torch.Generator())
    fed: list[int] = []
    step = writer.rows.step
    monkeypatch.setattr(writer.rows, "step", lambda tokens: (fed.extend(tokens.tolist()), step(tokens))[1])
    found = writer.write(torch.tensor([[5, 6]]))
    # What is drawn while the template's tokens are due is passed over: 2 begins them, then comes the rest.
    assert found.tokens[0].tolist() == [5, 6, *fed] == [5, 6, 21, 22, 2, 7, 99, 31, 2, 8, 99, 2, 7, 51, 52]
    assert sample.said(found.tokens[0].tolist(), found.origin[0].tolist()) == [[21, 22], [99, 31], [99]]


def test_an_empty_turn_stays_one() -> None:
    origin = [sample.GIVEN, sample.TEMPLATE, sample.GIVEN, sample.WROTE, sample.TEMPLATE, sample.GIVEN]
    assert sample.said([5, 2, 7, 31, 2, 8], origin) == [[], [31]]


def test_rows_end_with_the_tokens_or_the_time(tmp_path, monkeypatch) -> None:
    folder = open_folder(tiny_teacher(tmp_path / "teacher"))

    def rows(**options: object) -> Iterator[int]:
        found = sample.sample_rows(folder, repeat([5]), sample.Turns(), seed=0, seq_len=4, batch_size=2, **options)
        return [len(written.tokens) for written in found]

    assert rows(tokens=20) == [2, 2, 1]
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(sample.time, "monotonic", lambda: next(clock))
    assert len(rows(tokens=2000, seconds=100)) in range(2, 10)


def attention(q: Tensor, k: Tensor, v: Tensor, filled: int) -> Tensor:
    """Equations S.4 and S.5 in float64."""
    k, v = (x[:, :, :filled].double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return ((k @ q.double()[..., None])[..., 0] * q.shape[-1] ** -0.5).softmax(-1)[:, :, None].matmul(v)[:, :, 0]


def worst(dtype: torch.dtype, device: str) -> float:
    """The largest relative error over head sizes, shared heads and fillings."""
    torch.manual_seed(0)
    errors = []
    for heads, kv_heads, width, filled in ((6, 2, 64, 130), (4, 4, 48, 64), (3, 1, 32, 1)):
        q = torch.randn(2, heads, width, dtype=dtype, device=device)
        k, v = (torch.randn(2, kv_heads, 140, width, dtype=dtype, device=device) for _ in range(2))
        k[:, :, filled:], v[:, :, filled:] = 1e4, float("nan")
        found, wanted = attend_module.attend(q, k, v, torch.tensor([filled], device=device)), attention(q, k, v, filled)
        errors.append(float((found.double() - wanted).norm() / wanted.norm()))
    return max(errors)


def interpret() -> None:
    attend_module.attend_has_kernel = lambda q: True
    print(json.dumps(worst(torch.float32, "cpu")))


def compile_kernel() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = attend_module.attend_kernel
    constants = {"SHARED": 3, "ROWS": 16, "N": 64, "COLUMNS": 64, "PLACES": 64}
    signature = {name: "*bf16" for name in ("q", "k", "v", "out")} | {"filled": "*i64", "S": "i32", "Hkv": "i32", "scale": "fp32"}
    signature = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    shared = [
        triton.compile(source, target=GPUTarget(*target), options={"num_warps": 4}).metadata.shared
        for target in (("cuda", 80, 32), ("cuda", 90, 32))
    ]
    print(json.dumps(max(shared)))


@pytest.mark.parametrize("word, interpreted, bar", [("interpret", "1", 1e-6), ("compile", "0", 163 * 1024)])
def test_the_kernel_matches_float64_and_fits_a_gpu(word: str, interpreted: str, bar: float) -> None:
    pytest.importorskip("triton")
    assert printed_by(__name__, word, TRITON_INTERPRET=interpreted) < bar


@pytest.mark.gpu
def test_on_a_gpu_a_graph_writes_what_the_plain_loop_writes(tmp_path) -> None:
    assert worst(torch.float32, "cuda") < 1e-5 and worst(torch.bfloat16, "cuda") < 5e-3
    model = load_model(open_folder(tiny_teacher(tmp_path / "teacher", "llama")), device="cuda")
    opening = torch.tensor([[7, 8, 9]] * 3, device="cuda")
    for temp in (0.0, 1.0):
        writers = [sample.Writer(model, 3, 40, sample.Turns(), temp, torch.Generator("cuda").manual_seed(1)) for _ in range(2)]
        writers[1].go = writers[1].step
        assert np.array_equal(*(writer.write(opening).tokens for writer in writers))


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_kernel}[sys.argv[1]]()
