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


def rows(folder, openings, turns, *, tokens, seed, temp, seq_len, batch_size, seconds, progress):
    """Stands for the sampling of the torch backend."""
    from radlads.backends.torch.sample import Written

    encode = Tokenizer(folder.path).encode
    assert (tokens, temp, seq_len, batch_size, seconds) == (6, 0.5, 5, 9, None)
    for ids in ([*encode("ab"), 0, *encode(f"c{seed}")], encode("dede")):
        row = np.array([[*next(openings), *ids]])
        yield Written(row, np.zeros(row.shape, np.uint8))


@pytest.mark.parametrize("prompt, texts", [((), ["ab", "c7", "dede"]), (("--prompt", "x"), ["xab", "c7", "xdede"])])
def test_sampled_text_is_kept_beside_its_tokens(radlads, teacher, tmp_path, monkeypatch, prompt, texts):
    pytest.importorskip("torch")
    monkeypatch.setattr("radlads.backends.torch.sample.sample_rows", rows)
    words = ["--tokens", 6, "--seq-len", 5, "--batch-size", 9, "--temp", 0.5, "--seed", 7, "--output-dir", tmp_path / "out"]
    outcome = radlads("prepare", "--sample-from", teacher, *words, *prompt, "--json")
    found = json.loads(outcome.out)
    assert (tmp_path / "out/sampled.txt").read_text().split("<|endoftext|>\n") == [*texts, ""]
    encode = Tokenizer(teacher).encode
    begin = encode("x") if prompt else [0]
    expected = [*begin, *encode("ab"), 0, *encode("c7"), *begin, *encode("dede")]
    # Nothing is added and nothing made anew from the text: a sample of the training is a row as it was written.
    assert TokenStore(found["store"]).tokens.tolist() == expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sampled.txt", "store"]
    assert "data.train" in radlads("prepare", "--sample-from", teacher, *words[:-1], tmp_path / "two", *prompt).out


def test_paragraphs_of_a_text_begin_sampled_texts(radlads, teacher, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "p.txt").write_text("Once upon a time\nshort\nThe cat said: the sea\n")
    words = ["--prompts", tmp_path / "p.txt", "--prompt-tokens", 3, "--seq-len", 8, "--tokens", 80]
    assert radlads("prepare", "--sample-from", teacher, *words, "--output-dir", tmp_path / "out").status == 0
    found = TokenStore(tmp_path / "out/store").tokens.reshape(10, 8)[:, :4].tolist()
    encode = Tokenizer(teacher).encode
    wanted = [[0, *encode(line)[:3]] for line in ("Once upon a time", "The cat said: the sea", "short") if len(encode(line)) >= 3]
    assert {tuple(row) for row in found} == set(map(tuple, wanted))
    words[3] = 1000
    words[5] = 2000
    outcome = radlads("prepare", "--sample-from", teacher, *words, "--output-dir", tmp_path / "none")
    assert outcome.status == 2 and "R302" in outcome.err and not (tmp_path / "none").exists()


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
    # Every row as it was written, unfinished turns and the user's too: all of it is the model's own.
    assert found[0]["counted"] == found[0]["tokens"] == 4000 and store.header["documents"] == 10


@pytest.mark.parametrize(
    "words, code",
    [
        ((), "R101"),
        (("--sample-from", "TEACHER", "--chat", "--prompt", "x"), "R101"),
        (("--sample-from", "TEACHER", "--chat", "--seq-len", "5"), "R101"),
        (("--sample-from", "TEACHER", "--chat", "--prompts", "x.txt"), "R101"),
        (("--sample-from", "TEACHER", "--prompts", "missing.txt"), "R301"),
        (("--sample-from", "TEACHER", "--max-seconds", "0"), "R101"),
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
        yield Written(np.arange(3, 9)[None], np.zeros((1, 6), np.uint8))
        raise MemoryError

    from radlads.backends.torch.sample import Written

    monkeypatch.setattr("radlads.backends.torch.sample.sample_rows", broken)
    assert radlads("prepare", "--sample-from", teacher, "--output-dir", tmp_path / "out").status == 1
    assert list(tmp_path.iterdir()) == []
