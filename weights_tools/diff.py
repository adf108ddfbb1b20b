"""Two models side by side, whatever their formats: settings, tensors that only one has, and how far the others are apart."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from radlads.weights_tools.formats.format import Source
from radlads.weights_tools.lazy import Lazy, widened

ROWS = 4096  # rows compared at a time, unless they are long
VALUES = 2**22


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that both have: what differs ("dtype", "shape" or "values"), the largest distance, and |a - b| / |a|."""

    name: str
    what: str
    left: str
    right: str
    largest: float | None = None
    relative: float | None = None


@dataclass(frozen=True)
class Difference:
    """All that differs; `equal` counts the tensors whose values are the same to the bit."""

    settings: list[tuple[str, Any, Any]]
    only_left: list[str]
    only_right: list[str]
    tensors: list[TensorDifference]
    equal: int

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.settings or self.only_left or self.only_right or self.tensors)


def compare(left: Source, right: Source, report: Callable[[int, int], None] | None = None) -> Difference:
    """Everything in which two models differ, read piece by piece; a changed dtype with the same values is told as such."""
    common = [name for name in left.tensors if name in right.tensors]
    total, done, equal = sum(left.tensors[name].nbytes for name in common), 0, 0
    found: list[TensorDifference] = []
    for name in common:
        difference = compare_tensors(name, left.tensors[name], right.tensors[name])
        if difference:
            found.append(difference)
        equal += difference is None
        done += left.tensors[name].nbytes
        if report:
            report(done, total)
    return Difference(
        settings=settings(left, right),
        only_left=[name for name in left.tensors if name not in right.tensors],
        only_right=[name for name in right.tensors if name not in left.tensors],
        tensors=found,
        equal=equal,
    )


def settings(left: Source, right: Source) -> list[tuple[str, Any, Any]]:
    """(field, left, right) of the two specs where they differ; the mixers' flags and the ranks one by one."""
    ours, theirs = flat(asdict(left.spec)), flat(asdict(right.spec))
    return [(key, ours.get(key), theirs.get(key)) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys."""
    rows: dict[str, Any] = {}
    for key, value in table.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def compare_tensors(name: str, a: Lazy, b: Lazy) -> TensorDifference | None:
    """None where dtype, shape and every bit agree."""
    if a.shape != b.shape:
        return TensorDifference(name, "shape", " x ".join(map(str, a.shape)), " x ".join(map(str, b.shape)))
    step = max(1, min(ROWS, VALUES * a.rows // max(1, math.prod(a.shape))))
    largest = apart = length = 0.0
    same = True
    for start in range(0, a.rows, step):
        stop = min(start + step, a.rows)
        left, right = a.read(start, stop), b.read(start, stop)
        if a.dtype == b.dtype and left.tobytes() == right.tobytes():
            length += square(widened(left, a.dtype))
            continue
        x, y = widened(left, a.dtype), widened(right, b.dtype)
        same = same and x.tobytes() == y.tobytes()
        with np.errstate(all="ignore"):
            gap = x.astype(np.float64) - y
        largest = max(largest, float(np.max(np.abs(gap), initial=0.0)))
        apart += square(gap)
        length += square(x)
    if same:
        return None if a.dtype == b.dtype else TensorDifference(name, "dtype", a.dtype, b.dtype, 0.0, 0.0)
    relative = math.sqrt(apart / length) if length else math.inf
    return TensorDifference(name, "values", a.dtype, b.dtype, largest, relative)


def square(values: Any) -> float:
    """Sum of squares in float64."""
    with np.errstate(all="ignore"):
        return float(np.sum(np.square(values, dtype=np.float64)))
