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
