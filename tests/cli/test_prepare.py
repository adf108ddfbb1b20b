import json
from pathlib import Path

import numpy as np
import pytest

from radlads.data.store import TokenStore
from radlads.tokenizer import Tokenizer


def test_files_become_tokens(radlads, teacher, tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n')
    files = tmp_path / "a.txt", tmp_path / "b.jsonl"
    words = ["--tokenizer", teacher, "--text-field", "body", "--output-dir", tmp_path / "out", "--json"]
    outcome = radlads("prepare", *files, *words)
    found = json.loads(outcome.out)
    encode = Tokenizer(teacher).encode
    expected = [*encode("one"), 0, *encode("two"), 0, *encode("three"), 0]
    assert TokenStore(tmp_path / "out").tokens.tolist() == expected
    assert found["tokens"] == len(expected) and found["documents"] == 3 and found["text"] is None


def rows(folder, *, tokens, seed, temp, seq_len, batch_size, prompt_ids, progress):
    """Stands for the sampling of the torch backend."""
    encode = Tokenizer(folder.path).encode
    assert (tokens, temp, seq_len, batch_size) == (6, 0.5, 3, 2)
    yield [*encode("ab"), 0, *encode(f"c{seed}")]
    yield [*prompt_ids, *encode("d")]


@pytest.mark.parametrize("prompt, texts", [((), ["ab", "c7", "d"]), (("--prompt", "x"), ["xab", "c7", "xxd"])])
def test_sampled_text_is_kept_beside_its_tokens(radlads, teacher, tmp_path, monkeypatch, prompt, texts):
    pytest.importorskip("torch")
    monkeypatch.setattr("radlads.backends.torch.sample.sample_texts", rows)
    words = ["--tokens", 6, "--seq-len", 3, "--batch-size", 9, "--temp", 0.5, "--seed", 7, "--output-dir", tmp_path / "out"]
    outcome = radlads("prepare", "--sample-from", teacher, *words, *prompt, "--json")
    found = json.loads(outcome.out)
    assert (tmp_path / "out/sampled.txt").read_text().split("<|endoftext|>\n") == [*texts, ""]
    encode = Tokenizer(teacher).encode
    assert TokenStore(found["store"]).tokens.tolist() == [token for text in texts for token in [*encode(text), 0]]
    assert "data.train" in radlads("prepare", "--sample-from", teacher, *words[:-1], tmp_path / "two", *prompt).out


def test_real_sampling_is_seeded(radlads, teacher, tmp_path):
    pytest.importorskip("torch")
    stores = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ["--tokens", 40, "--seq-len", 10, "--seed", seed, "--output-dir", tmp_path / name]
        assert radlads("prepare", "--sample-from", teacher, *words).status == 0
        stores.append((tmp_path / name / "sampled.txt").read_text())
    assert stores[0] == stores[1] != stores[2]


def test_conversations_are_sampled_by_the_template(radlads, teacher, tmp_path):
    pytest.importorskip("torch")
    words = ["--chat", "--tokens", 4000, "--seq-len", 400, "--temp", 1.2, "--json"]
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = radlads("prepare", "--sample-from", teacher, *words, "--seed", seed, "--output-dir", tmp_path / name)
        found.append(json.loads(done.out))
    first, again, other = (Path(result["text"]).read_text() for result in found)
    assert first == again != other
    talks = [json.loads(line)["messages"] for line in first.splitlines()]
    assert talks and all([m["role"] for m in talk] == ["user", "assistant"] * (len(talk) // 2) for talk in talks)
    store = TokenStore(found[0]["store"])
    assert 0 < found[0]["counted"] < found[0]["tokens"] and store.header["documents"] == len(talks)


def test_a_conversation_is_fed_as_the_template_writes_it(teacher, monkeypatch):
    torch = pytest.importorskip("torch")
    from radlads.backends.torch import sample
    from radlads.backends.torch.load import load_model
    from radlads.folder import open_folder

    model, said = load_model(open_folder(teacher)), iter([21, 22, 2, 99, 99, 31, 2, 99, 99, 41, 42, 2, 99, 51])
    turns = sample.Turns([5, 6], [2, 7], [2, 8], frozenset({0, 2}))
    fed = []
    monkeypatch.setattr(sample, "draw", lambda *_: torch.tensor([[next(said)]]))
    model.model.register_forward_pre_hook(lambda module, inputs: fed.extend(inputs[0][0].tolist()))
    (found,) = sample.converse(model, turns, 16, 1, 1.0, torch.Generator())
    # What is drawn while the template's tokens are due is passed over: 2 begins them, then comes the rest.
    assert fed == [5, 6, 21, 22, 2, 7, 99, 31, 2, 8, 99, 41, 42, 2, 7]
    assert found == [[21, 22], [99, 31], [99, 41, 42]]


@pytest.mark.parametrize(
    "words, code",
    [
        ((), "R101"),
        (("--sample-from", "TEACHER", "--chat", "--prompt", "x"), "R101"),
        (("--sample-from", "TEACHER", "--chat", "--seq-len", "5"), "R101"),
        (("a.txt", "--tokenizer", "TEACHER", "--take", "0"), "R101"),
        (("a.txt", "--sample-from", "m"), "R101"),
        (("a.txt",), "R101"),
        (("missing.txt", "--tokenizer", "TEACHER"), "R301"),
        (("--sample-from", "TEACHER", "--tokens", "0"), "R101"),
        (("--sample-from", "TEACHER", "--temp", "-1"), "R101"),
        (("--sample-from", "nowhere"), "R201"),
    ],
)
def test_bad_input_leaves_nothing_behind(radlads, teacher, tmp_path, monkeypatch, words, code):
    monkeypatch.chdir(tmp_path)
    given = [teacher if word == "TEACHER" else word for word in words]
    outcome = radlads("prepare", *given, "--output-dir", "out")
    assert outcome.status == 2 and f"error: {code}" in outcome.err and list(tmp_path.iterdir()) == []


def test_failed_sampling_leaves_nothing_behind(radlads, teacher, tmp_path, monkeypatch):
    pytest.importorskip("torch")

    def broken(*_, **__):
        yield list(np.arange(3, 9))
        raise MemoryError

    monkeypatch.setattr("radlads.backends.torch.sample.sample_texts", broken)
    assert radlads("prepare", "--sample-from", teacher, "--output-dir", tmp_path / "out").status == 1
    assert list(tmp_path.iterdir()) == []
