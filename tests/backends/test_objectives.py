"""What the stages minimise when tokens are masked, documents are kept apart, or the follower's form is asked for."""

from pathlib import Path

import pytest
import torch

from radlads.backends.torch.head import retied, untied
from radlads.backends.torch.objectives import alignment_errors, objective, weight
from radlads.backends.torch.optim import trainable
from radlads.backends.torch.parallel import Task
from radlads.backends.torch.trainer import StageRun, run_stage
from radlads.backends.torch.world import World
from radlads.data.samples import FIRST, PAD, SILENT, Corpus
from radlads.errors import RadladsError
from radlads.recipe import Stage
from radlads.runs import begin_run
from tests.backends.test_torch_model import model_of, random_weights
from tests.backends.test_training import TEACHER, corpus, pair, recipe  # noqa: F401
from tests.models import tiny_spec

KINDS = ("align", "distill", "lm")


def stage(kind: str, **more: object) -> Stage:
    return Stage(kind=kind, tokens=100, seq_len=12, batch_size=4, lr=1e-3, **more)


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 300, (rows, length), generator=torch.Generator().manual_seed(3))


def loss(of: Stage, sample: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    student, teacher = pair()
    trained = trainable(student, of.train)
    found = objective(of, student, teacher, sample).loss
    found.backward()
    return found.item(), {name: p.grad for name, p in trained.items() if p.grad is not None}


def assert_same(a: tuple[float, dict[str, torch.Tensor]], b: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert a[1].keys() == b[1].keys()
    for name, grad in a[1].items():
        assert (grad - b[1][name]).norm() <= 1e-4 * b[1][name].norm() + 1e-7, name


@pytest.mark.parametrize("kind", ["distill", "lm"])
def test_silent_labels_do_not_count(kind: str) -> None:
    """Labels 5 to 8 alone: the mean over them, written out from the logits."""
    sample = tokens(2, 13)
    masked = sample.clone()
    masked[:, 1:5] |= SILENT
    masked[:, 9:] |= SILENT
    student, teacher = pair()
    found = objective(stage(kind), student, teacher, masked).loss
    with torch.no_grad():
        log_p, log_t = (model(sample[:, :-1])[0].double().log_softmax(-1)[:, 4:8] for model in (student, teacher))
        if kind == "lm":
            wanted = -log_p.gather(-1, sample[:, 5:9, None]).mean()
        else:
            wanted = (log_t.exp() * (log_t - log_p)).sum(-1).mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert weight(stage(kind), masked) == 8


def test_a_batch_in_which_nothing_counts_changes_nothing() -> None:
    found, grads = loss(stage("lm"), tokens(1, 9) | SILENT)
    assert found == 0 and all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("kind", KINDS)
def test_reset_is_the_same_as_documents_alone(kind: str) -> None:
    """A window of three documents gives the weighted mean of the losses of the three."""
    sample = tokens(1, 13)
    sample[0, [4, 9]] |= FIRST | SILENT
    parts = [sample[:, :5], sample[:, 4:10], sample[:, 9:]]
    parts = [part.clone() & ~FIRST for part in parts]
    for part in parts:
        part[:, 0] &= ~SILENT
    of, alone = stage(kind, packing="reset"), stage(kind)
    found = loss(of, sample)
    shares = [weight(alone, part) for part in parts]
    assert sum(shares) == weight(of, sample) == (12 if kind == "align" else 10)
    losses, grads = zip(*(loss(alone, part) for part in parts), strict=True)
    total = sum(n * value for n, value in zip(shares, losses, strict=True)) / sum(shares)
    summed = {
        name: sum(n * grad[name] for n, grad in zip(shares, grads, strict=True)) / sum(shares)  # type: ignore[misc]
        for name in grads[0]
    }
    assert_same(found, (total, summed))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind: str) -> None:
    sample = tokens(1, 9)
    padded = torch.cat([sample, torch.full((1, 4), PAD | SILENT)], 1)
    # the last token of the document is an input too, though nothing follows it
    wanted = sample if kind != "align" else torch.cat([sample, sample[:, :1]], 1)
    assert_same(loss(stage(kind, packing="document"), padded), loss(stage(kind), wanted))


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_weigh_by_what_counts(kind: str, corpus: Corpus, tmp_path: Path) -> None:  # noqa: F811
    sample = tokens(4, 13)
    sample[0, 3:] |= PAD | SILENT
    sample[2, 1:6] |= SILENT
    found = []
    for micro in (4, 1):
        of = stage(kind, packing="document", micro_batch=micro)
        with begin_run(tmp_path / str(micro), recipe(kind=kind)) as run:
            begun = StageRun(of, Task(of, *pair()), corpus, run, World())
            loss = float(begun.accumulate(sample)[0])
        found.append((loss, {name: p.grad for name, p in begun.parameters.items() if p.grad is not None}))
    assert_same(*found)


def test_mse_is_the_mean_of_squares() -> None:
    student, teacher = pair()
    sample = tokens(2, 11)
    seen: list[torch.Tensor] = []
    hook = student.model.layers[0].self_attn.register_forward_hook(lambda m, i, o: seen.append(o[0]))
    found = alignment_errors(student, teacher, sample, loss="mse")
    hook.remove()
    hook = teacher.model.layers[0].self_attn.register_forward_hook(lambda m, i, o: seen.append(o[0]))
    teacher(sample)
    hook.remove()
    assert found[0].item() == pytest.approx((seen[0] - seen[1]).square().mean().item(), rel=1e-5)


def test_layers_leave_embedding_head_and_last_norm() -> None:
    spec = tiny_spec("qwen3", tie_embeddings=False).as_student("rwkv7")
    model = model_of(spec, random_weights(spec))
    left = {name for name, _ in model.named_parameters()} - set(trainable(model, "layers"))
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= left
    assert all(not spec.tensors()[name].read for name in left if name.startswith("model.layers."))


def test_a_head_of_its_own_and_back() -> None:
    model = model_of(TEACHER, random_weights(TEACHER))
    ids = tokens(1, 7)
    before = model(ids)[0].detach()
    apart = untied(model)
    assert torch.equal(apart(ids)[0], before) and not apart.spec.tie_embeddings
    with torch.no_grad():
        apart.lm_head.weight.mul_(2)
        apart.model.norm.weight.mul_(3)
    again = retied(apart)
    assert again.spec == TEACHER and "lm_head.weight" not in again.state_dict()
    assert torch.allclose(again(ids)[0], 3 * before, atol=1e-4)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_global_one(
    corpus: Corpus, tmp_path: Path  # noqa: F811
) -> None:
    """An allocator that has no room for more than 2 sequences: the losses are those of micro-batches of 2 from the start."""
    losses = {}
    for name, micro, room in (("small", 2, 4), ("full", 4, 2), ("none", 1, 0)):
        wanted = recipe(kind="distill", tokens=256, batch_size=4, micro_batch=micro)
        of = wanted.stages[0]

        class Small(Task):
            def forward(self, sample: torch.Tensor, *rest: object, room: int = room) -> object:
                if len(sample) > room:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
                return super().forward(sample, *rest)  # type: ignore[arg-type]

        with begin_run(tmp_path / name, wanted) as run:
            if name == "none":
                with pytest.raises(RadladsError, match=r"R403.*CUDA out of memory"):
                    run_stage(of, Small(of, *pair()), corpus, run, lambda p: None)
                continue
            run_stage(of, Small(of, *pair()), corpus, run, lambda p: None)
            losses[name] = [r["loss"] for r in run.metrics() if r["kind"] == "train"]
            notes = [r["text"] for r in run.metrics() if r["kind"] == "note"]
            assert run.micro_batch(2) == (2 if name == "full" else None)
            assert notes == (["out of memory: micro-batch 4 -> 2"] if name == "full" else [])
    assert losses["full"] == losses["small"]
