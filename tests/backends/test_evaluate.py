"""Measuring on held-out samples against the definitions in float64, and that logits of all tokens never exist."""

import pytest
import torch

from radlads.backends.torch import evaluate as measuring
from radlads.backends.torch.evaluate import by_position, compare, evaluate, limited_context_loss
from radlads.backends.torch.model import Model
from radlads.data.samples import SILENT
from tests.backends.test_torch_model import model_of, random_weights
from tests.models import tiny_spec

TEACHER = tiny_spec("qwen3", num_layers=2)


@pytest.fixture(scope="module")
def pair() -> tuple[Model, Model]:
    """A student and its teacher."""
    weights, spec = random_weights(TEACHER), TEACHER.as_student("rwkv7")
    return model_of(spec, {**random_weights(spec), **weights}), model_of(TEACHER, weights)


@pytest.fixture(scope="module")
def samples() -> torch.Tensor:
    """Samples (3, 25) of which some labels do not count."""
    drawn = torch.randint(0, 300, (3, 25), generator=torch.Generator().manual_seed(1))
    drawn[0, 5:9] |= SILENT
    return drawn


@torch.no_grad()
def test_loss_kl_and_agreement_are_the_definitions(pair, samples, monkeypatch) -> None:
    student, teacher = pair
    ids, labels = samples[:, :-1] & ~SILENT, samples[:, 1:] & ~SILENT
    log_p, target = (model(ids)[0].double().log_softmax(-1) for model in (student, teacher))
    counted = ((samples[:, 1:] & SILENT) == 0).double()
    loss = -log_p.gather(-1, labels[..., None])[..., 0] * counted
    kl = (target.exp() * (target - log_p)).sum(-1) * counted
    agrees = (target.argmax(-1) == log_p.argmax(-1)) * counted
    monkeypatch.setattr(Model, "forward", None)  # it would make the logits of all tokens
    for at_once in (1024, 7):
        monkeypatch.setattr(measuring, "LOGITS_AT_ONCE", at_once)
        found = compare(student, samples, teacher)
        assert found.kl is not None and found.agrees is not None
        for mine, wanted in ((found.counted, counted), (found.loss, loss), (found.kl, kl), (found.agrees, agrees)):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine.double(), wanted.double(), rtol=1e-4, atol=1e-5)
    sums = evaluate(student, samples, teacher)
    assert sums["tokens"] == 68 and sums["loss"] == pytest.approx(loss.sum().item() / 68, rel=1e-5)
    assert sums["kl_by_position"] == pytest.approx((kl.sum(0) / counted.sum(0)).tolist(), rel=1e-4)
    alone = compare(student, samples)
    assert alone.kl is None and torch.equal(alone.loss, compare(student, samples, teacher).loss)


def test_stretches_of_a_long_context_are_means_of_their_labels() -> None:
    values, counted = torch.arange(4096.0)[None], torch.ones(1, 4096)
    counted[0, 1], values[0, 1] = 0, 0
    found = by_position(values, counted)
    assert len(found) == 1024 and found[0] == pytest.approx((0 + 2 + 3) / 3) and found[1] == pytest.approx(5.5)


@torch.no_grad()
def test_loss_of_a_limited_context_reads_the_last_tokens_alone(pair, samples, monkeypatch) -> None:
    _, teacher = pair
    ids, window = samples & ~SILENT, 4
    limited = full = 0.0
    for row, flags in zip(ids, samples, strict=True):
        whole = teacher(row[None, :-1])[0][0].double().log_softmax(-1)
        for end in range(window, len(row)):
            if flags[end] & SILENT == 0:
                short = teacher(row[None, end - window : end])[0][0, -1].double().log_softmax(-1)
                limited, full = limited - short[row[end]].item(), full - whole[end - 1, row[end]].item()
    monkeypatch.setattr(measuring, "LOGITS_AT_ONCE", 16)
    count = int(((samples[:, window:] & SILENT) == 0).sum())
    assert limited_context_loss(teacher, samples, window) == pytest.approx((full / count, limited / count), rel=1e-5)
