"""What a training run says of itself where there is no terminal."""

from types import SimpleNamespace

import pytest

from radlads.cli import progress
from radlads.cli.progress import TrainingScreen, duration


def step(number: int, kind: str = "align") -> SimpleNamespace:
    stage = SimpleNamespace(kind=kind, steps=10)
    return SimpleNamespace(stage=stage, step=number, loss=0.5, tokens_per_second=1234.0, seconds_left=75.0)


def test_a_line_at_the_start_of_a_stage_at_its_end_and_now_and_then(capsys, monkeypatch) -> None:
    with TrainingScreen() as screen:
        for number in range(1, 11):
            screen.step(step(number))
        lines = capsys.readouterr().err.splitlines()
        assert lines == [
            "stage 1 alignment: step 1/10, loss 0.5000, 1,234 tok/s, 1 min 15 s left",
            "stage 1 alignment: step 10/10, loss 0.5000, 1,234 tok/s, 1 min 15 s left",
        ]
        monkeypatch.setattr(progress, "INTERVAL", 0.0)
        screen.step(step(2, "distill"))
        screen.step(step(3, "distill"))
        assert len(capsys.readouterr().err.splitlines()) == 2


def test_reading_large_data_is_told_and_small_data_are_not(capsys, monkeypatch) -> None:
    with TrainingScreen() as screen:
        screen.reading(1, 100)
        screen.reading(2, 100)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "INTERVAL", 0.0)
        screen.reading(50, 100)
        screen.reading(7_000, None)
        assert capsys.readouterr().err == "reading the data: 50%\nreading the data: 7,000 rows\n"
        screen.step(step(1))
        assert "step 1/10" in capsys.readouterr().err


def test_quiet_says_nothing(capsys, monkeypatch) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with TrainingScreen(quiet=True) as screen:
        screen.reading(1, 2)
        screen.reading(2, 2)
        screen.step(step(1))
        screen.say("x")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (200, "3 min 20 s"), (18420, "5 h 07 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
