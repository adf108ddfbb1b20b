"""Learning rates against the published formulas, worked out by hand."""

import math
from typing import Any

import pytest

from radlads.recipe import Stage
from radlads.schedule import learning_rate

FINAL = {"lr_final": 1e-5, "warmup_steps": 0}


def stage(**values: Any) -> Stage:
    return Stage(**{"kind": "align", "tokens": 10_000, "seq_len": 10, "batch_size": 10, "lr": 1e-3, **FINAL, **values})


def rate(shape: Stage, step: int, peak: float = 1e-3, final: float = 1e-5) -> float:
    return learning_rate(shape, step, step * shape.tokens_per_step, shape.tokens_per_step, peak, final)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", 1e-3),
        ("linear", 1e-5 + 0.99e-3 * 0.75),
        ("exponential", 1e-3 * 0.01**0.25),
        ("quarter_cosine", 1e-5 + 0.99e-3 * math.cos(math.pi / 8)),
        ("cosine", 1e-5 + 0.99e-3 * (1 + math.cos(math.pi / 4)) / 2),
    ],
)
def test_a_quarter_of_the_way(schedule: str, expected: float) -> None:
    assert rate(stage(schedule=schedule), 25) == pytest.approx(expected, rel=1e-12)


def test_published_cosine_falls_late() -> None:
    middle = rate(stage(schedule="quarter_cosine"), 50)
    assert middle == pytest.approx(1e-5 + 0.99e-3 * math.sqrt(0.5))
    assert middle > rate(stage(schedule="cosine"), 50)


@pytest.mark.parametrize("schedule", ["linear", "exponential", "cosine", "quarter_cosine", "stable_cosine_stable"])
def test_ends_at_the_final_rate(schedule: str) -> None:
    assert rate(stage(schedule=schedule), 0) == pytest.approx(1e-3)
    assert rate(stage(schedule=schedule), 100) == pytest.approx(1e-5)
    assert rate(stage(schedule=schedule), 500) == pytest.approx(1e-5)


def test_stable_cosine_stable_drops_in_its_window() -> None:
    shape = stage(schedule="stable_cosine_stable", tokens=100_000)
    assert rate(shape, 833) == 1e-3
    assert rate(shape, 854) == pytest.approx(1e-5 + 0.99e-3 * math.cos(math.pi / 4), rel=1e-6)
    assert rate(shape, 875) == pytest.approx(1e-5)


def test_wait_and_endpoint_bound_the_decay() -> None:
    shape = stage(schedule="linear", lr_wait=0.8)
    assert rate(shape, 80) == pytest.approx(1e-3)
    assert rate(shape, 90) == pytest.approx((1e-3 + 1e-5) / 2)


def test_warmup_factor_and_progress_after_it() -> None:
    shape = stage(schedule="linear", warmup_steps=20)
    assert rate(shape, 0) == pytest.approx(1e-5)  # 0.01 of the peak
    assert rate(shape, 10) == pytest.approx(1e-3 * (0.01 + 0.99 / 2))
    assert rate(shape, 20) == pytest.approx(1e-3)
    assert rate(shape, 60) == pytest.approx((1e-3 + 1e-5) / 2)  # half of the 80 steps after warm-up


def test_flat_base_rate_under_a_decaying_schedule() -> None:
    shape = stage(schedule="stable_cosine_stable")
    assert {rate(shape, step, 7e-6, 7e-6) for step in (0, 85, 99)} == {7e-6}


def test_warmup_longer_than_the_stage_never_decays() -> None:
    shape = stage(schedule="linear", warmup_steps=200)
    assert rate(shape, 100) == pytest.approx(1e-3 * (0.01 + 0.99 / 2))
