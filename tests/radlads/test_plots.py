"""The arithmetic behind the pictures: smoothing, pooling, and labels that do not touch."""

import numpy as np
import pytest

from radlads.plots import draw_positions, number, numbers, pooled, running_mean, spread


def test_running_mean_of_a_line_is_the_line_where_the_window_is_symmetric() -> None:
    line = np.arange(20.0)
    smooth = running_mean(line, 3)
    assert smooth[:17] == pytest.approx(line[:17])
    assert smooth[-1] == pytest.approx(np.mean(line[-4:]))


def test_running_mean_leaves_gaps_out() -> None:
    assert running_mean(np.array([1.0, np.nan, 3.0]), 1)[1] == 2.0
    assert np.isnan(running_mean(np.array([np.nan, np.nan]), 1)).all()


def test_pooling_keeps_the_first_positions_and_averages_the_far_ones() -> None:
    values = np.arange(1.0, 1001.0)
    centres, means = pooled(values)
    assert centres[:3] == pytest.approx([1, 2, 3]) and means[:3] == pytest.approx([1, 2, 3])
    assert len(centres) <= 40
    assert means[-1] == pytest.approx(np.mean(values[round(2 * means[-1] - 1000) - 1 :]))


def test_the_positions_of_a_long_context_are_tokens_not_stretches() -> None:
    record = {"kind": "eval", "stage": 1, "kl_by_position": [0.4, 0.3, 0.2, 0.1], "kl_stretch": 16}
    figure = draw_positions([record])
    assert figure is not None
    (line,) = figure.axes[0].lines
    assert np.asarray(line.get_xdata()).tolist() == pytest.approx([16, 32, 48, 64])
    assert figure.axes[0].get_xlim()[1] == 64


def test_labels_keep_their_distance_and_their_place() -> None:
    assert spread([0.1, 0.5, 0.9], 0.1) == pytest.approx([0.1, 0.5, 0.9])
    crowd = spread([0.5, 0.5, 0.5], 0.1)
    assert crowd == pytest.approx([0.4, 0.5, 0.6])
    assert spread([], 0.1) == []


def test_only_finite_numbers_count() -> None:
    assert number(1) and number(-2.5)
    assert not any(map(number, (True, None, "1", float("nan"), float("inf"), 10**400, [1])))
    assert numbers([None, 2]) is not None and numbers([None]) is None and numbers("12") is None
