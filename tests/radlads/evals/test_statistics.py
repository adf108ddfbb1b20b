"""Intervals against textbook values, and the figures of the paper's Table 1."""

import numpy as np
import pytest

from radlads.evals.statistics import bootstrap, mean, perplexity, ratio, relative_to


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).standard_normal(400)
    found = bootstrap(mean, values, draws=10_000)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_draws_are_paired() -> None:
    teacher = np.random.default_rng(2).random(200)
    found = bootstrap(ratio, 0.9 * teacher, teacher, draws=1000)
    assert (found.value, found.low, found.high) == pytest.approx((0.9, 0.9, 0.9))


def test_relative_score_of_the_paper() -> None:
    # QRWKV7-7B: MMLU 68.2 of the teacher's 71.7 with 25 % by chance is 92.4 % (protocol section 5.1, rounded inputs).
    share = relative_to(0.25)(np.array([0.682]), np.array([0.717]))
    assert share[0] == pytest.approx(0.924, abs=2e-3)


def test_perplexity_and_seed() -> None:
    nats = np.array([1.0, 2.0, 3.0])
    first, again, other = (bootstrap(perplexity, nats, draws=500, seed=seed) for seed in (0, 0, 1))
    assert first.value == pytest.approx(np.exp(2.0))
    assert first == again and first != other


def test_models_must_have_seen_the_same_items() -> None:
    with pytest.raises(ValueError, match="same items"):
        bootstrap(ratio, np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="at least one"):
        bootstrap(mean, np.ones(0))
