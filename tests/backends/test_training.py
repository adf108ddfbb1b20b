"""Losses, optimiser and stage loop, against formulas written out again here."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from radlads.backends.torch.compiled import compiled_layers, layers_compiled
from radlads.backends.torch.convert_run import check_order
from radlads.backends.torch.model import Model
from radlads.backends.torch.objectives import aligned, alignment_errors
from radlads.backends.torch.optim import Optimizer, trainable
from radlads.backends.torch.parallel import Task, mixers_of, runnable
from radlads.backends.torch.trainer import run_stage
from radlads.data.prepare import prepare
from radlads.data.samples import Corpus
from radlads.errors import RadladsError
from radlads.recipe import Recipe
from radlads.runs import begin_run
from radlads.schedule import learning_rate
from tests.backends.test_torch_model import model_of, random_weights
from tests.models import tiny_spec

TEACHER = tiny_spec("qwen3", tie_embeddings=True)


class Letters:
    """A tokenizer of one token a character."""

    vocab_size = 300

    def encode(self, text: str) -> list[int]:
        return [ord(c) % 256 for c in text]


def recipe(**stage: object) -> Recipe:
    values = {"kind": "align", "tokens": 320, "seq_len": 16, "batch_size": 2, "lr": 1e-3, "warmup_steps": 2, **stage}
    return Recipe(name="test", teacher="t", data={"train": ["a.txt"], "valid": ["a.txt"]}, stages=[values])


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return Corpus.of(prepare([path], Letters(), tmp_path / "store", eos_id=None))


def pair(mixer: str = "rwkv7") -> tuple[Model, Model]:
    spec = TEACHER.as_student(mixer)
    return model_of(spec, random_weights(spec)), model_of(TEACHER, random_weights(TEACHER))


@pytest.mark.parametrize("mixer", ["rwkv6", "rwkv7"])
def test_alignment_error_is_the_unsquared_norm_in_the_teachers_stream(mixer: str) -> None:
    student, teacher = pair(mixer)
    tokens = torch.randint(0, 300, (2, 11))
    seen: dict[str, list[torch.Tensor]] = {"teacher": [], "student": []}
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, i, o: seen["teacher"].append(o[0])) for layer in teacher.model.layers
    ]
    teacher(tokens)
    found = alignment_errors(student, teacher, tokens)
    for hook in hooks:
        hook.remove()
    # the teacher's stream in the alignment pass is its own forward pass
    layers = len(teacher.model.layers)
    for own, again in zip(seen["teacher"][:layers], seen["teacher"][layers:], strict=True):
        assert torch.allclose(own, again, atol=1e-6)
    assert found.shape == (layers,) and torch.isfinite(found).all()
    # layer 0 written out: both mixers see the same normed embedding
    with torch.no_grad():
        normed = teacher.model.layers[0].input_layernorm(teacher.model.embed_tokens(tokens))
        from radlads.backends.torch.state import empty_state

        context, _ = student.model.context(tokens, empty_state(student.spec, 2, tokens.device), None, None, normed.dtype)
        mixed, _ = student.model.layers[0].self_attn(normed, context, {})
        wanted = (seen["teacher"][0] - mixed).norm(dim=-1).mean() / TEACHER.D**0.5
    assert found[0].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_only_mixers_train_in_step_1_and_unread_tensors_never() -> None:
    student, _ = pair()
    rows = student.spec.tensors()
    mixers = trainable(student, "mixer")
    assert mixers and all(".self_attn." in name and rows[name].read for name in mixers)
    everything = trainable(student, "all")
    assert set(everything) == {name for name, row in rows.items() if row.read}
    decay = trainable(student, "decay")
    assert {name.rpartition(".")[2] for name in decay} == {"w0", "w1", "w2"}


def test_kept_softmax_layers_do_not_train_in_step_1() -> None:
    spec = TEACHER.as_student("rwkv7", (1,))
    names = trainable(model_of(spec, random_weights(spec)), "mixer")
    assert names and not any(".layers.1." in name for name in names)


def test_adamw_step_is_the_written_one() -> None:
    stage = recipe(lr=2e-3, warmup_steps=0, clip=0.5, kind="lm", weight_decay=0.1).stages[0]
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = Optimizer({"model.norm.weight": weight}, stage)
    x, m, v = weight.detach().double().numpy().copy(), 0.0, 0.0
    for step in range(3):
        grad = np.array([0.3, -4.0, 0.0]) * (step + 1)
        weight.grad = torch.tensor(grad, dtype=torch.float32)
        rate, norm, _ = optimizer.step(step)
        assert float(norm) == pytest.approx(np.linalg.norm(grad), rel=1e-6)
        assert rate == learning_rate(stage, step, step * stage.tokens_per_step, stage.tokens_per_step, 2e-3, 2e-3)
        grad = grad * min(1, 0.5 / (np.linalg.norm(grad) + 1e-6))
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        x = x - rate * 0.1 * x - rate * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
        assert np.allclose(weight.detach().numpy(), x, rtol=1e-5)


def test_nonfinite_gradient_changes_nothing() -> None:
    stage = recipe().stages[0]
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Optimizer({"model.norm.weight": weight}, stage)
    weight.grad = torch.tensor([1.0, float("nan"), 0.0])
    norm = optimizer.step(0).norm
    assert bool(norm.isnan()) and torch.equal(weight.detach(), torch.ones(3)) and optimizer.updates == 0 and weight.grad is None


def test_bfloat16_weights_have_float32_masters() -> None:
    stage = recipe(warmup_steps=0, lr=1e-4, kind="lm").stages[0]
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = Optimizer({"model.norm.weight": weight}, stage)
    for step in range(10):
        weight.grad = torch.ones(3, dtype=torch.bfloat16)
        optimizer.step(step)
    master = optimizer.masters["model.norm.weight"]
    assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), weight.detach())
    assert master[0].item() == pytest.approx(1 - 10e-4, abs=1e-5)  # each update alone is lost in bfloat16


@pytest.mark.parametrize("kind", ["align", "distill", "lm"])
def test_resumed_losses_are_identical(tmp_path: Path, corpus: Corpus, kind: str) -> None:
    wanted = recipe(kind=kind, save_every=3)
    stage = wanted.stages[0]

    def losses(folder: Path, stops: list[int]) -> list[float]:
        for stop in [*stops, 10**9]:
            student, teacher = pair()
            with begin_run(folder, wanted) as run:
                seen: list[int] = []
                task = Task(stage, student, teacher)
                done = run_stage(stage, task, corpus, run, lambda p: seen.append(p.step), lambda: len(seen) >= stop)  # noqa: B023
                records = run.metrics()
        assert done
        assert [r["step"] for r in records] == list(range(1, stage.steps + 1))
        return [r["loss"] for r in records]

    assert losses(tmp_path / "whole", []) == losses(tmp_path / "stopped", [2, 1, 4])


def test_damaged_checkpoint_is_passed_over(tmp_path: Path, corpus: Corpus) -> None:
    wanted = recipe(kind="lm", save_every=2)
    stage = wanted.stages[0]
    student, _ = pair()
    with begin_run(tmp_path / "run", wanted) as run:
        seen: list[int] = []
        run_stage(stage, Task(stage, student, None), corpus, run, lambda p: seen.append(p.step), lambda: len(seen) >= 5)
        newest = sorted(run.checkpoints.iterdir())[-1] / "state.safetensors"
        data = bytearray(newest.read_bytes())
        data[-5] ^= 1
        newest.write_bytes(data)
    again, _ = pair()
    with begin_run(tmp_path / "run", wanted) as run:
        steps: list[int] = []
        run_stage(stage, Task(stage, again, None), corpus, run, lambda p: steps.append(p.step))
    assert steps[0] == 5  # from the checkpoint of step 4


def test_a_stage_is_measured_as_often_as_it_says(tmp_path: Path, corpus: Corpus) -> None:
    tokens = recipe(kind="lm").stages[0].tokens_per_step
    wanted = recipe(kind="lm", measure_every=2, measure_at=(1, 2 * tokens + 1))
    stage, (student, _) = wanted.stages[0], pair()
    measured: list[int] = []
    with begin_run(tmp_path / "run", wanted) as run:
        assert run_stage(stage, Task(stage, student, None), corpus, run, lambda p: None, measure=measured.append)
    assert measured == sorted({1, 3, *range(2, stage.steps, 2)})


def test_in_step_1_a_student_runs_with_what_is_the_teachers(corpus: Corpus) -> None:
    """On a GPU all of the student but its mixers waits in other memory; here it is nowhere."""
    student, teacher = pair()
    tokens = torch.arange(10)[None]
    student.load_state_dict(teacher.state_dict(), strict=False)
    wanted = student(tokens)[0]
    mixers = {id(p) for mixer in mixers_of(student) for p in mixer.parameters()}
    for module in student.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in mixers:
                setattr(module, name, torch.nn.Parameter(parameter.detach().to("meta")))
    stage = recipe(kind="align").stages[0]
    assert torch.equal(runnable(Task(stage, student, teacher))(tokens)[0], wanted)


@pytest.mark.parametrize("mixer", ["rwkv6", "rwkv7"])
def test_layers_compile_to_few_whole_graphs(mixer: str) -> None:
    """No graph breaks, and all layers of one kind in one graph (the first RAD-RWKV7 layer is a kind of its own)."""
    spec = tiny_spec("qwen2", num_layers=4)
    student, teacher = (model_of(s, random_weights(s)) for s in (spec.as_student(mixer), spec))
    tokens, graphs = torch.randint(0, 300, (2, 11)), []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    wanted = student.model(tokens)[0], alignment_errors(student, teacher, tokens)
    torch._dynamo.reset()
    with compiled_layers(student, teacher, backend=keep):
        found = student.model(tokens)[0]
        whole = len(graphs)
        one = torch.compile(aligned, fullgraph=True, dynamic=False, backend=keep)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("radlads.backends.torch.objectives.compiled_aligned", lambda: one)
            errors = alignment_errors(student, teacher, tokens)
    assert not layers_compiled(student)
    kinds = 1 + (mixer == "rwkv7")
    assert (whole, len(graphs)) == (kinds, 2 * kinds)
    torch.testing.assert_close((found, errors), wanted)


@pytest.mark.parametrize("done,kind,good", [
    (0, "align", True), (1, "align", True), (1, "distill", True), (2, "distill", True), (2, "lm", True), (3, "lm", True),
    (None, "align", False), (2, "align", False), (3, "distill", False), (0, "distill", False),
])  # fmt: skip
def test_a_run_begins_after_the_stage_before_or_goes_on_with_its_own(done: int | None, kind: str, good: bool) -> None:
    folder, first = SimpleNamespace(stage=done, path=Path("student")), recipe(kind=kind).stages[0]
    if good:
        check_order(folder, first)
    else:
        with pytest.raises(RadladsError, match="R103"):
            check_order(folder, first)
