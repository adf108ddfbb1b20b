"""Samples of stores: windows, documents, flags, and independence from how a batch is cut."""

from pathlib import Path

import numpy as np
import pytest

from radlads.data.prepare import prepare
from radlads.data.samples import FIRST, PAD, SILENT, TOKEN, Corpus, corpus_of
from radlads.data.store import TokenStore
from radlads.errors import RadladsError

EOS = 0


class Letters:
    """A tokenizer of one token a character."""

    vocab_size = 200

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]


def store_of(folder: Path, *documents: str, name: str = "a") -> TokenStore:
    (folder / f"{name}.txt").write_text("<|endoftext|>".join(documents))
    return prepare([folder / f"{name}.txt"], Letters(), folder / f"{name}.store", eos_id=EOS)


def text_of(sample: np.ndarray) -> str:
    return "".join("." if value & PAD else chr((value & TOKEN) or ord("|")) for value in sample)


def test_windows_are_the_stream_and_do_not_depend_on_how_they_are_cut(tmp_path: Path) -> None:
    store = store_of(tmp_path, "".join(chr(33 + i % 90) for i in range(500)))
    drawn = Corpus.of(store).samples(16, 3)
    whole = drawn.batch(0, 40)
    assert whole.shape == (40, 17) and whole.dtype == np.int64 and (whole <= TOKEN).all()
    assert np.array_equal(np.concatenate([drawn.batch(0, 7), drawn.batch(7, 33)]), whole)
    # Two processes that take turns see the same samples as one.
    ranks = [np.concatenate([drawn.batch(i, 1) for i in range(rank, 40, 2)]) for rank in (0, 1)]
    assert np.array_equal(np.stack(ranks, 1).reshape(40, 17), whole)
    start = drawn.orders[0].place(5) * 16
    assert np.array_equal(whole[5], store.tokens[start : start + 17])
    windows = {text_of(sample) for sample in drawn.batch(0, len(drawn))}
    assert windows == {text_of(store.tokens[16 * i : 16 * i + 17].astype(np.int64)) for i in range(len(drawn))}


def test_a_stream_shorter_than_a_sample(tmp_path: Path) -> None:
    corpus = Corpus.of(store_of(tmp_path, "x" * 16))
    assert len(corpus.samples(16, 0)) == 1
    with pytest.raises(RadladsError, match="R302"):
        corpus.samples(17, 0)


def test_reset_marks_the_beginnings_of_documents(tmp_path: Path) -> None:
    corpus = Corpus.of(store_of(tmp_path, "abcde", "fg", "hijklm"))
    plain, marked = (corpus.samples(4, 1, packing).batch(0, 3) for packing in ("stream", "reset"))
    assert np.array_equal(plain, marked & TOKEN)
    for sample in marked:
        for place, value in enumerate(sample.tolist()):
            begins = chr(value & TOKEN) in "afh"
            assert bool(value & FIRST) == bool(value & SILENT) == begins, place


def test_documents_stay_apart(tmp_path: Path) -> None:
    drawn = Corpus.of(store_of(tmp_path, "abcdefghij", "k", "", "xyz")).samples(4, 1, "document")
    found = sorted(text_of(sample) for sample in drawn.batch(0, len(drawn)))
    assert found == ["abcde", "efghi", "ij|..", "k|...", "xyz|."]
    for sample in drawn.batch(0, len(drawn)):
        assert ((sample & PAD != 0) == (sample & SILENT != 0)).all()


def test_a_mixture_draws_by_weight(tmp_path: Path) -> None:
    stores = [store_of(tmp_path, letter * 800, name=letter) for letter in "ab"]
    drawn = corpus_of(stores, [3.0, 1.0]).samples(8, 7)
    firsts = [chr(sample[0]) for sample in drawn.batch(0, 4096) if sample[0]]
    assert firsts.count("a") / len(firsts) == pytest.approx(0.75, abs=0.01)
    assert np.array_equal(drawn.batch(100, 5), corpus_of(stores, [3.0, 1.0]).samples(8, 7).batch(100, 5))


def test_without_weights_parts_count_by_their_size(tmp_path: Path) -> None:
    stores = [store_of(tmp_path, "a" * 799, name="a"), store_of(tmp_path, "b" * 1599, name="b")]
    drawn = corpus_of(stores, None).samples(8, 7)
    assert len(drawn) == 99 + 199
    found = "".join(chr(sample[0]) for sample in drawn.batch(0, len(drawn)))
    assert found.count("a") / len(found) == pytest.approx(1 / 3, abs=0.06)


def test_the_published_order_needs_no_seed(tmp_path: Path) -> None:
    store = store_of(tmp_path, "".join(chr(33 + i % 90) for i in range(340)))
    one, other = (corpus_of([store], None, "magic_prime").samples(17, seed).batch(0, 17) for seed in (1, 2))
    assert np.array_equal(one, other)
    assert np.array_equal(one[0], store.tokens[170:188])  # (10 * 1^3 mod 17) * 17, P = 17 of 20 windows
