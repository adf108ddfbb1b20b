"""Means over items with bootstrap intervals, of one model or of a student beside its teacher on the same items."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

DRAWS, LEVEL = 10_000, 0.95
# Entries of the tables of drawn items that exist at once.
ENTRIES_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Estimate:
    """A figure and the interval that holds `LEVEL` of its bootstrap draws."""

    value: float
    low: float
    high: float


def bootstrap(statistic: Callable[..., Array], *items: Array, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """`statistic` of the means of `items`, with a percentile interval over `draws` resamplings of the items.

    Each of `items` is (n,): the same items in the same order, so several are drawn in pairs. `statistic` takes one array of
    means for each and works element by element. Raises ValueError for no items or arrays of different lengths.
    """
    count = len(items[0])
    if not count or any(len(values) != count for values in items):
        raise ValueError("a bootstrap needs the same items, at least one, for every model")
    rng = np.random.default_rng(seed)
    found = []
    for first in range(0, draws, max(1, ENTRIES_AT_ONCE // count)):
        drawn = rng.integers(0, count, (min(max(1, ENTRIES_AT_ONCE // count), draws - first), count))
        found.append(statistic(*(values[drawn].mean(1) for values in items)))
    low, high = np.nanquantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = statistic(*(values.mean(keepdims=True) for values in items))[0]
    return Estimate(float(value), float(low), float(high))


def mean(values: Array) -> Array:
    """The mean itself."""
    return values


def perplexity(mean_nats: Array) -> Array:
    """exp of a mean loss in nats."""
    return np.exp(mean_nats)


def relative_to(chance: float) -> Callable[[Array, Array], Array]:
    """(student - chance) / (teacher - chance): the share of what the teacher knows beyond chance (the paper's Table 1)."""

    def share(student: Array, teacher: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (student - chance) / (teacher - chance)

    return share


def ratio(student: Array, teacher: Array) -> Array:
    """student / teacher, for figures without a chance level such as bits per byte."""
    return student / teacher
