import pytest

from radlads.cli.options import ModelOptions, SamplingOptions
from radlads.errors import RadladsError
from tests.models import tiny_teacher


def test_seed_is_drawn_only_where_chance_matters():
    assert SamplingOptions().sampling().seed == 0
    assert SamplingOptions(temp=1, seed=9).sampling().seed == 9
    assert len({SamplingOptions(temp=1).sampling().seed for _ in range(5)}) > 1


def test_open_gives_folder_tokenizer_and_engine(teacher, engine):
    opened = ModelOptions(model=str(teacher)).open()
    assert opened.engine is engine and opened.folder.spec.V == 300 and opened.tokenizer.has_chat_template


def test_tokenizer_that_does_not_fit_is_refused_before_the_engine_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("radlads.backends.open_engine", lambda *a, **k: pytest.fail("was loaded"))
    path = tiny_teacher(tmp_path / "small", vocab_size=290)
    (path / "tokenizer.json").write_text((tiny_teacher(tmp_path / "large") / "tokenizer.json").read_text())
    with pytest.raises(RadladsError, match="R206"):
        ModelOptions(model=str(path)).open()
