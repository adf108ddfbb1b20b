"""Several sequences fed together give what each gives alone, on both backends and for every kind of state."""

from pathlib import Path

import numpy as np
import pytest

from radlads.backends import open_engine
from radlads.folder import open_folder
from radlads.weights_tools.surgery import make_student
from tests.models import tiny_teacher


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize(("arch", "kept"), [("rwkv6", ()), ("rwkv7", ()), ("hxa079", (1,))])
def test_together_as_alone(tmp_path: Path, backend: str, arch: str, kept: tuple[int, ...]) -> None:
    teacher = open_folder(tiny_teacher(tmp_path / "teacher"))
    engine = open_engine(make_student(teacher, tmp_path / "student", arch=arch, keep_softmax=kept, options={}), backend)
    states = [engine.start(), *(engine.feed(engine.start(), ids)[1] for ids in ([5, 6, 7], [8], list(range(30))))]
    for first in (0, 1):  # with and without a sequence that has not begun
        mine, tokens = states[first:], [11, 12, 13, 14][first:]
        logits, after = engine.feed_many(mine, tokens)
        for row, state, token, later in zip(logits, mine, tokens, after, strict=True):
            wanted, alone = engine.feed(state, [token])
            assert np.abs(row - wanted).max() <= 1e-5 and later.position == alone.position
            again, expected = engine.feed(later, [3])[0], engine.feed(alone, [3])[0]
            assert np.abs(again - expected).max() <= 1e-5


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize(("arch", "kept"), [("rwkv6", ()), ("rwkv7", ()), ("hxa079", ()), ("hxa079", (1,))])
def test_in_seats_as_alone(tmp_path: Path, backend: str, arch: str, kept: tuple[int, ...]) -> None:
    """Sequences that come and go: each has what it would have alone, and what was a state before stays what it was."""
    teacher = open_folder(tiny_teacher(tmp_path / "teacher"))
    engine = open_engine(make_student(teacher, tmp_path / "student", arch=arch, keep_softmax=kept, options={}), backend)
    alone = [engine.start(), *(engine.feed(engine.start(), ids)[1] for ids in ([5, 6, 7], [8], list(range(30))))]
    seats, places = engine.seats(3), {}

    def same(state: object, row: int) -> None:
        mine, wanted = engine.state_arrays(state), engine.state_arrays(alone[row])
        assert mine.keys() == wanted.keys() and state.position == alone[row].position
        assert all(np.abs(mine[name] - wanted[name]).max() <= 2e-6 * np.abs(wanted[name]).max() for name in mine)

    before, began = alone[1], engine.state_arrays(alone[1])
    for rows in ([0, 1, 2], [2, 0], [0, 3, 2], [3]):
        for gone in places.keys() - set(rows):
            same(seats.state(places[gone]), gone)
            if len(places) == 3:
                seats.leave(places.pop(gone))
        for row in rows:
            if row not in places:
                places[row] = seats.enter(alone[row])
        tokens = [11 + row for row in rows]
        logits = seats.step([places[row] for row in rows], tokens)
        for row, token, found in zip(rows, tokens, logits, strict=True):
            wanted, alone[row] = engine.feed(alone[row], [token])
            assert np.abs(found - wanted).max() <= 1e-5
    kept_state = seats.state(places[3])
    seats.step([places[3]], [9])
    same(kept_state, 3)
    seats.enter(before)
    with pytest.raises(ValueError, match="taken"):
        seats.enter(before)
    assert all(np.array_equal(began[name], value) for name, value in engine.state_arrays(before).items())
