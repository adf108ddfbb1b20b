"""What the planner reckons with, counted on the model: activations by saved tensors, shards of a 72B on the meta device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from radlads.backends.torch.model import Model
from radlads.backends.torch.moments import PACK, Packed
from radlads.backends.torch.optim import Optimizer
from radlads.backends.torch.state import empty_state
from radlads.costs import activation_bytes, memory_of
from radlads.recipe import Parallel, Stage
from radlads.shapes import SHAPES
from radlads.spec import ModelSpec

B, T = 2, 128


def saved_bytes(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> float:
    """Bytes a token that one layer keeps for its backward pass on a GPU: its kernels are asked for shapes, nothing runs."""
    for name in ("wkv6", "wkv7"):
        monkeypatch.setattr(f"radlads.backends.torch.kernels.{name}.{name}_has_kernel", lambda x: True)
    with torch.device("meta"):
        model = Model(spec).to(torch.bfloat16)
    tokens = torch.zeros(B, T, dtype=torch.long, device="meta")
    context, _ = model.model.context(tokens, empty_state(spec, B, tokens.device), None, None, torch.bfloat16)
    x = torch.zeros(B, T, spec.D, dtype=torch.bfloat16, device="meta", requires_grad=True)
    layers: Any = model.model.layers
    layers[0](x, context, {})
    kept: dict[int, tuple[Any, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layers[1](x, context, {})
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(size for key, (_, size) in kept.items() if key not in weights) / (B * T)


@pytest.mark.parametrize("mixer", ["rwkv6", "rwkv7"])
@pytest.mark.parametrize("shape", ["qwen2.5-7b", "qwen2.5-0.5b"])
def test_activations_are_those_of_the_model(mixer: str, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_layers": 2, "vocab_size": 64, "mixers": ()}
    spec = ModelSpec(**{**vars(SHAPES[shape]), **sizes}).as_student(mixer)
    assert activation_bytes(spec) / 2 == pytest.approx(saved_bytes(spec, monkeypatch), rel=0.1)


@pytest.fixture
def eight() -> Iterator[Any]:
    """Rank 3 of 8 processes that do not exist."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from radlads.backends.torch.world import World

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield World(3, 8, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.slow
def test_72b_is_built_and_planned_on_the_meta_device(eight: Any) -> None:
    from radlads.backends.torch.parallel import Task, local_of, spread

    student = SHAPES["qwen2.5-72b"].as_student("rwkv7")
    how = Parallel(layout="full", teacher="sharded", recompute="always", vocab_heads=True, moments="int8")
    stage = Stage(kind="distill", tokens=1, seq_len=512, batch_size=8, lr=1e-5)
    with torch.device("meta"):
        task = Task(stage, Model(student), None)
    spread(task, how, eight, "bfloat16")
    held = sum(local_of(p).numel() for p in task.student.parameters())
    assert held == pytest.approx(student.parameters() / 8, rel=1e-3)
    planned = memory_of(stage, SHAPES["qwen2.5-72b"], student, how, 8, 1, "bfloat16")
    packed = Packed(torch.zeros(1000 * PACK, device="meta"), signed=True)
    moments = 2 * (packed.codes.nbytes + packed.scales.nbytes) / (1000 * PACK)
    assert planned.optimizer == pytest.approx(held * (4 + moments), rel=1e-3)


def test_eight_bit_moments_read_back_what_was_written() -> None:
    generator = torch.Generator().manual_seed(0)
    for signed in (True, False):
        values = torch.randn(3, 417, generator=generator) * torch.logspace(-6, 2, 417)
        values = values if signed else values.square()
        packed = Packed(values, signed)
        packed.write(values)
        read = packed.read()
        assert read.shape == values.shape and torch.isfinite(read).all() and (signed or (read[values > 0] > 0).all())
        again = Packed(read, signed)
        again.write(read)
        assert torch.equal(again.read(), read)  # so that a run that resumes is the run that never stopped
        top = torch.nn.functional.pad(values.flatten().abs(), (0, -values.numel() % PACK)).view(-1, PACK).amax(1)
        scale = top.repeat_interleave(PACK)[: values.numel()].view(values.shape)
        near = values.abs() > scale * (1e-2 if signed else 1e-4)
        assert ((read - values).abs()[near] <= 0.085 * values.abs()[near]).all()


@pytest.mark.parametrize(("kind", "bound"), [("bfloat16", 0.02), ("int8", 0.06)])
def test_small_moments_train_as_adamw_does(kind: str, bound: float) -> None:
    generator = torch.Generator().manual_seed(1)
    wanted = torch.randn(700, generator=generator)
    stage = Stage(kind="lm", tokens=100, seq_len=1, batch_size=1, lr=0.05, warmup_steps=0, weight_decay=0.01, clip=0)
    ways = []
    for moments in ("float32", kind):
        x = torch.nn.Parameter(torch.zeros(700))
        optimizer = Optimizer({"x": x}, stage, moments)
        noise = torch.Generator().manual_seed(2)
        for step in range(100):
            x.grad = (x.detach() - wanted) + 0.1 * torch.randn(700, generator=noise)
            optimizer.step(step)
        ways.append(x.detach().clone())
    assert (ways[0] - wanted).norm() < 0.2 * wanted.norm()
    assert (ways[1] - ways[0]).norm() <= bound * wanted.norm()
