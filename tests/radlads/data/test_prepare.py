"""From sources to a token store: documents, errors that name file and line, shards, work that goes on after a kill."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from radlads.data import documents
from radlads.data.prepare import prepare
from radlads.data.store import TokenStore
from radlads.errors import RadladsError
from radlads.tokenizer import Tokenizer
from tests.models import tiny_teacher

EOS = 256


class Bytes:
    """A tokenizer of bytes; counts its calls."""

    vocab_size = 257

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return list(text.encode())


def file(folder: Path, name: str, data: str | bytes) -> Path:
    packed = data.encode() if isinstance(data, str) else data
    path = folder / name
    path.write_bytes({".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, bytes)(packed))
    return path


def texts(store: TokenStore) -> list[str]:
    assert store.tokens[-1] == EOS
    return "".join(chr(token) if token < EOS else "|" for token in store.tokens).split("|")[:-1]


def prepared(folder: Path, *sources: Path) -> TokenStore:
    return prepare(sources, Bytes(), folder / "store", eos_id=EOS)


def refused(folder: Path, *sources: Path) -> RadladsError:
    with pytest.raises(RadladsError) as caught:
        prepared(folder, *sources)
    assert not list(folder.glob("*store*")) and "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one line", ["one line"]),
        ("one\ntwo\n", ["one\ntwo"]),
        ("a\n<|endoftext|>\nb\n<|endoftext|>\n", ["a", "b"]),
        ("a<|endoftext|>b", ["a", "b"]),
        ("<|endoftext|>\n\n<|endoftext|>a", ["a"]),
        ("\ufeffa\r\nb\r\n<|endoftext|>\r\nc", ["a\nb", "c"]),
        ("a\n\n  b", ["a\n\n  b"]),
    ],
)
def test_documents_of_a_text(tmp_path: Path, text: str, expected: list[str]) -> None:
    store = prepared(tmp_path, file(tmp_path, "a.txt", text))
    assert texts(store) == expected
    assert store.header["documents"] == len(expected)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.xz", "a.jsonl.gz"])
def test_documents_of_json_lines(tmp_path: Path, name: str) -> None:
    store = prepared(tmp_path, file(tmp_path, name, '{"text": "a\\nb", "id": 1}\n\n{"text": ""}\r\n{"text": "c"}'))
    assert texts(store) == ["a\nb", "c"]


def test_sources_follow_each_other(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    sources = [file(tmp_path, "a.txt.xz", "first"), file(tmp_path, "b.txt.gz", "second")]
    store = prepare(sources, Bytes(), tmp_path / "store", eos_id=EOS, progress=lambda done, total: seen.append((done, total)))
    assert texts(store) == ["first", "second"]
    size = sum(path.stat().st_size for path in sources)
    assert seen[-1] == (size, size) and seen == sorted(seen)


def test_without_eos_documents_run_together(tmp_path: Path) -> None:
    store = prepare([file(tmp_path, "a.txt", "a<|endoftext|>b")], Bytes(), tmp_path / "store", eos_id=None)
    assert bytes(store.tokens.astype(np.uint8)) == b"ab"


def test_a_long_document_comes_in_pieces_with_one_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 40)
    text = "".join(f"line {n}\n  indented\n" for n in range(50)).rstrip("\n")
    tokenizer = Bytes()
    store = prepare([file(tmp_path, "a.txt", text)], tokenizer, tmp_path / "store", eos_id=EOS)
    assert texts(store) == [text]
    assert tokenizer.calls > 10


def test_a_document_without_a_good_place_to_cut_is_cut_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 10)
    monkeypatch.setattr(documents, "MAX_LINE", 100)
    tokenizer = Bytes()
    store = prepare([file(tmp_path, "a.txt", "  indented\n" * 50)], tokenizer, tmp_path / "store", eos_id=EOS)
    assert texts(store) == [("  indented\n" * 50).rstrip("\n")]
    assert tokenizer.calls > 3


def test_a_document_that_ends_right_after_a_piece_keeps_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 3)
    store = prepared(tmp_path, file(tmp_path, "a.txt", "abcd\nx<|endoftext|>efgh\n<|endoftext|>\n"))
    assert texts(store) == ["abcd\nx", "efgh"]


@pytest.mark.parametrize(
    ("name", "data", "place", "told"),
    [
        ("a.txt", b"fine\nbro\xffken\n", "a.txt:2", "byte 4 of the line is not UTF-8"),
        ("a.txt", "fine".encode("utf-16"), "a.txt:1", "not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl:2", "not JSON"),
        ("a.jsonl", '["text"]\n', "a.jsonl:1", "no field 'text'"),
        ("a.jsonl", '\n{"body": "x"}\n', "a.jsonl:2", "no field 'text'"),
        ("a.jsonl", '{"text": 3}\n', "a.jsonl:1", "is int, not text or messages"),
        ("a.jsonl", '{"text": "\\ud800"}\n', "a.jsonl:1", "surrogate"),
        ("a.jsonl", "[" * 100_000, "a.jsonl:1", "nested"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "a.jsonl:1", "not JSON"),
        ("a.csv", "x", "a.csv", "'.csv' is not known"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, data: str | bytes, place: str, told: str) -> None:
    error = refused(tmp_path, file(tmp_path, name, data))
    assert (error.code, error.exit_status) == ("R301", 2)
    assert error.where.endswith(place)
    assert told in error.why


def test_a_bad_line_leaves_an_older_store_as_it_was(tmp_path: Path) -> None:
    source = file(tmp_path, "a.txt", "good")
    before = prepared(tmp_path, source).header
    source.write_bytes(b"\xff")
    with pytest.raises(RadladsError):
        prepared(tmp_path, source)
    assert TokenStore(tmp_path / "store").header == before


def test_damaged_packed_files(tmp_path: Path) -> None:
    for name in ("a.txt.xz", "b.txt.gz"):
        path = file(tmp_path, name, "some text\n" * 1000)
        path.write_bytes(path.read_bytes()[:-30])
        assert "damaged" in refused(tmp_path, path).why
        path.write_bytes(b"not packed at all")
        assert "damaged" in refused(tmp_path, path).why


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path, tmp_path / "no.txt").why
    (tmp_path / "dir.txt").mkdir()
    assert "no file to read" in refused(tmp_path, tmp_path / "dir.txt").why


def test_no_text_at_all(tmp_path: Path) -> None:
    for data in ("", "\n\n", "<|endoftext|>\n<|endoftext|>"):
        assert refused(tmp_path, file(tmp_path, "a.txt", data)).code == "R302"


def test_a_huge_line_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b"first\n")
        for _ in range(100):
            stream.write(bytes(1 << 20))
    tracemalloc.start()
    error = refused(tmp_path, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.where.endswith("a.txt.gz:2") and "longer than 16 MB" in error.why
    assert peak < 100 << 20


def test_the_same_input_is_not_prepared_twice(tmp_path: Path) -> None:
    source, tokenizer = file(tmp_path, "a.txt", "some text"), Bytes()
    prepare([source], tokenizer, tmp_path / "store", eos_id=EOS)
    made = (tmp_path / "store" / "shard-00000.arrow").stat().st_ino
    again = prepare([source], tokenizer, tmp_path / "store", eos_id=EOS)
    assert (again.path / "shard-00000.arrow").stat().st_ino == made
    file(tmp_path, "a.txt", "other text")
    assert texts(prepare([source], tokenizer, tmp_path / "store", eos_id=EOS)) == ["other text"]
    assert len(prepare([source], tokenizer, tmp_path / "store", eos_id=None)) == len("other text")


def test_another_tokenizer_or_a_damaged_store_is_prepared_anew(tmp_path: Path) -> None:
    class Shifted(Bytes):
        def encode(self, text: str) -> list[int]:
            return [byte ^ 1 for byte in text.encode()]

    source = file(tmp_path, "a.txt", "abc")
    first = prepared(tmp_path, source)
    second = prepare([source], Shifted(), tmp_path / "store", eos_id=EOS)
    assert first.header["tokenizer"] != second.header["tokenizer"]
    assert texts(second) == ["`cb"]
    (tmp_path / "store" / "shard-00000.arrow").write_bytes(b"x")
    with pytest.raises(RadladsError, match="R301"):
        TokenStore(tmp_path / "store")
    assert texts(prepared(tmp_path, source)) == ["abc"]


def test_a_folder_that_is_no_store_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("mine")
    with pytest.raises(RadladsError, match="R401"):
        prepared(tmp_path, file(tmp_path, "a.txt", "text"))
    assert (tmp_path / "store" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "header", ["", "[]", "{}", '{"schema": 3}', '{"schema": 2, "masked": false, "tokens": true}', "[" * 100_000]
)
def test_a_hostile_header_is_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "store.json").write_text(header)
    with pytest.raises(RadladsError, match="R301"):
        TokenStore(tmp_path)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_width_follows_the_vocabulary(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    class Last(Bytes):
        vocab_size = vocabulary

        def encode(self, text: str) -> list[int]:
            return [vocabulary - 1]

    store = prepare([file(tmp_path, "a.txt", "x")], Last(), tmp_path / "store", eos_id=0)
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [vocabulary - 1, 0]
    assert json.loads((tmp_path / "store" / "store.json").read_text())["dtype"] == dtype


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    class Wrong(Bytes):
        def encode(self, text: str) -> list[int]:
            return [257]

    with pytest.raises(RadladsError, match="R206"):
        prepare([file(tmp_path, "a.txt", "x")], Wrong(), tmp_path / "store", eos_id=EOS)


def test_batches_of_texts_are_used_where_the_tokenizer_has_them(tmp_path: Path) -> None:
    class Batched(Bytes):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [list(text.upper().encode()) for text in texts]

    store = prepare([file(tmp_path, "a.txt", "a<|endoftext|>b")], Batched(), tmp_path / "store", eos_id=EOS)
    assert texts(store) == ["A", "B"]


def corpus(folder: Path, lines: int = 400) -> Path:
    """A text of many documents for a real tokenizer."""
    return file(
        folder, "many.jsonl", "".join(json.dumps({"text": f"story {n}: " + "the cat " * (n % 40)}) + "\n" for n in range(lines))
    )


def test_shards_do_not_depend_on_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radlads.data.prepare.UNIT", 20_000)
    source, tokenizer = corpus(tmp_path), Tokenizer(tiny_teacher(tmp_path / "teacher"))
    stores = [prepare([source], tokenizer, tmp_path / str(n), eos_id=0, processes=n) for n in (1, 2)]
    one, two = (store.header for store in stores)
    assert one == two and len(one["shards"]) > 2
    monkeypatch.setattr("radlads.data.prepare.UNIT", 1 << 30)
    whole = prepare([source], tokenizer, tmp_path / "whole", eos_id=0)
    assert len(whole.header["shards"]) == 1
    assert np.array_equal(whole.tokens, stores[0].tokens)
    assert np.array_equal(whole.document_starts(), stores[0].document_starts())
    assert [whole.read(a, a + 100)[0].tolist() for a in (0, 777, 9001)] == [
        stores[1].read(a, a + 100)[0].tolist() for a in (0, 777, 9001)
    ]


def test_an_error_in_another_process_arrives_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "assistant", "content": "x"}]}\n')
    teacher = tiny_teacher(tmp_path / "teacher")
    (teacher / "chat_template.jinja").unlink()
    with pytest.raises(RadladsError, match=r"R206.*a.jsonl:1.*no chat template"):
        prepare([tmp_path / "a.jsonl"], Tokenizer(teacher), tmp_path / "store", eos_id=0, processes=2)


def test_work_goes_on_after_a_failure_and_a_corrected_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radlads.data.prepare.UNIT", 5000)
    lines = [json.dumps({"text": f"document {n} " * 20}) for n in range(100)]
    source, tokenizer = file(tmp_path, "a.jsonl", "\n".join([*lines, "{"])), Bytes()
    with pytest.raises(RadladsError, match=r"a\.jsonl:101"):
        prepared_with(tokenizer, tmp_path, source)
    done = tokenizer.calls
    assert done > 60 and not (tmp_path / "store").exists()
    file(tmp_path, "a.jsonl", "\n".join([*lines, '{"text": "the end"}']))
    store = prepared_with(tokenizer, tmp_path, source)
    assert tokenizer.calls - done < 30
    assert not list(tmp_path.glob(".store*"))
    assert np.array_equal(store.tokens, prepare([source], Bytes(), tmp_path / "fresh", eos_id=EOS).tokens)


def prepared_with(tokenizer: Bytes, folder: Path, source: Path) -> TokenStore:
    return prepare([source], tokenizer, folder / "store", eos_id=EOS)


def test_killed_at_any_moment_it_goes_on_to_the_same_store(tmp_path: Path) -> None:
    source, teacher = corpus(tmp_path, 3000), tiny_teacher(tmp_path / "teacher")
    code = (
        "import sys, radlads.data.prepare as p; from radlads.tokenizer import Tokenizer; p.UNIT = 20_000;"
        "p.prepare([sys.argv[1]], Tokenizer(sys.argv[2]), sys.argv[3], eos_id=0, processes=2)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [
        sys.executable,
        "-c",
        f"if __name__ == '__main__':\n exec({code!r})",
        str(source),
        str(teacher),
        str(tmp_path / "out"),
    ]
    journal = tmp_path / ".out.work" / "journal.jsonl"
    for lines in (3, 12):
        process = subprocess.Popen(command, env=environment)
        until = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < until:
            if journal.is_file() and len(journal.read_bytes().splitlines()) >= lines:
                break
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert not (tmp_path / "out").exists(), "finished before it was killed"
    kept = len(journal.read_bytes().splitlines()) - 1
    assert kept >= 11
    assert subprocess.run(command, env=environment, timeout=120).returncode == 0
    assert not list(tmp_path.glob(".out*"))
    fresh = prepare([source], Tokenizer(teacher), tmp_path / "fresh", eos_id=0)
    assert np.array_equal(TokenStore(tmp_path / "out").tokens, fresh.tokens)


def test_a_shard_with_other_contents_is_refused(tmp_path: Path) -> None:
    store = prepared(tmp_path, file(tmp_path, "a.txt", "some text here"))
    shard = store.shards[0]
    data = shard.read_bytes()
    tokens = pa.ListArray.from_arrays(pa.array([0, 2]), pa.array([1, 2], pa.uint16()))
    for columns, told in (
        ({"tokens": tokens, "last": pa.array([True])}, "another number of tokens"),
        ({"tokens": pa.array([[1, None]], pa.list_(pa.uint16())), "last": pa.array([True])}, ""),
        ({"tokens": pa.array([[1.0]]), "last": pa.array([True])}, "columns"),
        ({"other": pa.array([1])}, ""),
        (None, ""),
    ):
        if columns is None:
            shard.write_bytes(data[:40] + bytes(len(data) - 40))
        else:
            with shard.open("wb") as sink, pa.ipc.new_file(sink, pa.table(columns).schema) as writer:
                writer.write_table(pa.table(columns))
        header = {**store.header, "shards": [{**store.header["shards"][0], "bytes": shard.stat().st_size, "sha256": told}]}
        (store.path / "store.json").write_text(json.dumps(header))
        with pytest.raises(RadladsError, match=f"R301.*{told}"):
            TokenStore(store.path).read(0, 3)


def test_a_store_whose_tokens_pass_the_vocabulary_is_refused(tmp_path: Path) -> None:
    store = prepared(tmp_path, file(tmp_path, "a.txt", "zzz"))
    (store.path / "store.json").write_text(json.dumps({**store.header, "vocab_size": 100}))
    with pytest.raises(RadladsError, match="token 256"):
        TokenStore(store.path).read(0, len(store))
