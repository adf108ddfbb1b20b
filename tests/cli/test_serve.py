"""What `radlads serve` refuses before it listens."""

import pytest

pytest.importorskip("fastapi")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--host", "0.0.0.0"], "without an API key"),
        (["--port", 99999], "--port"),
        (["--max-batch", 0], "--max-batch"),
        (["--prefix-memory", -1], "--prefix-memory"),
        (["--host", "nowhere.invalid", "--api-key", "x"], "nowhere.invalid"),
    ],
)
def test_what_would_not_work_or_not_be_safe(radlads, teacher, engine, monkeypatch, arguments, why):
    monkeypatch.delenv("RADLADS_API_KEY", raising=False)
    done = radlads("serve", teacher, *arguments)
    assert done.status == 2 and why in done.err


def test_a_model_that_is_not_there(radlads, tmp_path):
    assert radlads("serve", tmp_path / "nothing").status == 2
