import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from radlads.errors import RadladsError
from radlads.sampling import Sampling, pick

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def drawn(sampling: Sampling, logits: np.ndarray = LOGITS, count: int = 400, recent: tuple[int, ...] = ()) -> list[int]:
    rng = sampling.generator()
    return [pick(logits, sampling, rng, recent)[0] for _ in range(count)]


def test_temp_0_takes_the_most_likely_and_gives_its_log_probability():
    token, logprob = pick(LOGITS, Sampling(), np.random.default_rng(0))
    assert token == 0 and logprob == pytest.approx(math.log(0.5), abs=1e-6)


def test_temp_1_samples_the_distribution():
    counts = np.bincount(drawn(Sampling(temp=1, seed=1), count=4000), minlength=4) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.03


def test_low_temperature_sharpens_and_high_flattens():
    share = [drawn(Sampling(temp=temp, seed=2)).count(0) for temp in (0.3, 1.0, 5.0)]
    assert share[0] > share[1] > share[2]


@pytest.mark.parametrize(
    "setting, left",
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.0}, {0, 1, 2, 3}),
        ({"min_p": 0.25}, {0, 1, 2}),
        ({"min_p": 0.25, "top_k": 1}, {0}),
    ],
)
def test_filters_leave_the_right_tokens(setting, left):
    assert set(drawn(Sampling(temp=1, seed=3, **setting))) == left


def test_filters_judge_before_the_temperature():
    assert set(drawn(Sampling(temp=50, top_p=0.6, seed=4))) == {0, 1}


def test_repetition_penalty_moves_away_from_recent_tokens():
    assert drawn(Sampling(repetition_penalty=5), recent=(0,), count=1) == [1]
    assert drawn(Sampling(repetition_penalty=1), recent=(0,), count=1) == [0]


def test_same_seed_same_tokens_even_where_logits_differ_in_the_last_bits():
    rng = np.random.default_rng(5)
    logits = rng.standard_normal(1000).astype(np.float32)
    near = logits + 1e-6 * rng.standard_normal(1000).astype(np.float32)
    one, two, other = (drawn(Sampling(temp=1, seed=s), x) for s, x in ((6, logits), (6, near), (7, logits)))
    assert one == two and one != other


@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=40), st.integers(0, 99), st.floats(0.01, 10))
def test_any_finite_logits_give_a_token(values, seed, temp):
    logits = np.array(values, np.float32)
    token, logprob = pick(logits, Sampling(temp=temp, top_p=0.9, top_k=7, min_p=0.01, seed=seed), np.random.default_rng(seed))
    assert 0 <= token < len(values) and logprob <= 1e-9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(RadladsError, match="R207"):
        pick(np.array([0.0, bad], np.float32), Sampling(), np.random.default_rng(0))


OUTSIDE = [("temp", -1), ("temp", math.nan), ("top_p", 1.1), ("top_k", -1), ("min_p", 2), ("seed", -1), ("seed", 2**63)]


@pytest.mark.parametrize("name, value", [*OUTSIDE, ("repetition_penalty", 0)])
def test_values_out_of_range_name_their_flag(name, value):
    with pytest.raises(RadladsError, match="R101.*--" + name.replace("_", "-")):
        Sampling(**{name: value})
