"""Every kind of source gives the same documents, and bad ones name the place."""

import json
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from radlads.data.documents import Piece
from radlads.data.prepare import prepare
from radlads.data.sources import Source
from radlads.errors import RadladsError
from tests.radlads.data.test_samples import Letters

TEXTS = ["first", "second\nline", "third"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def read(source: Source | str | Path) -> list[Piece]:
    given = source if isinstance(source, Source) else Source(str(source))
    return list(given.read(lambda done: None))


def contents(source: Source | str | Path) -> list[object]:
    return [piece.content for piece in read(source)]


def refused(source: Source | str | Path) -> RadladsError:
    with pytest.raises(RadladsError) as caught:
        given = source if isinstance(source, Source) else Source(str(source))
        given.files()
        read(given)
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2
    return caught.value


def table(folder: Path, rows: list[object], name: str = "a.parquet", column: str = "text") -> Path:
    parquet.write_table(pa.table({"id": range(len(rows)), column: rows}), folder / name, row_group_size=2)
    return folder / name


def binidx(folder: Path, sequences: list[list[int]], code: int = 8, dtype: str = "<u2", name: str = "a") -> Path:
    """Write a pair of token files, as protocol section 1.8 describes them."""
    sizes = [len(sequence) for sequence in sequences]
    flat = np.array([token for sequence in sequences for token in sequence], dtype)
    (folder / f"{name}.bin").write_bytes(flat.tobytes())
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes))
    pointers = (np.cumsum([0, *sizes[:-1]]) * flat.itemsize).astype("<i8")
    rest = np.array(sizes, "<i4").tobytes() + pointers.tobytes() + np.arange(len(sizes), dtype="<i8").tobytes()
    (folder / f"{name}.idx").write_bytes(head + rest)
    return folder / f"{name}.idx"


def test_parquet(tmp_path: Path) -> None:
    assert contents(table(tmp_path, TEXTS)) == TEXTS
    assert contents(table(tmp_path, [CHAT, CHAT], column="messages")) == [CHAT, CHAT]
    assert contents(Source(str(table(tmp_path, TEXTS, column="body")), "body")) == TEXTS
    assert "no column 'text', only id, body" in refused(tmp_path / "a.parquet").why
    error = refused(table(tmp_path, ["a", "b", None]))
    assert error.where.endswith("a.parquet: row 3") and "NoneType" in error.why
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not at all")
    assert "no readable Parquet file" in refused(tmp_path / "a.parquet").why


def test_zstd(tmp_path: Path) -> None:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 1000).encode())
    data = sink.getvalue().to_pybytes()
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert contents(tmp_path / "a.jsonl.zst") == TEXTS * 1000
    for broken in (data[:-9], b"not packed at all"):
        (tmp_path / "a.jsonl.zst").write_bytes(broken)
        assert "damaged" in refused(tmp_path / "a.jsonl.zst").why


def test_folders_patterns_and_choices(tmp_path: Path) -> None:
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/deep/b.txt").write_text("two")
    (tmp_path / "in/a.jsonl").write_text('{"text": "one"}\n{"text": "more"}\n')
    (tmp_path / "in/notes.md").write_text("not text for training")
    assert contents(tmp_path / "in") == ["one", "more", "two"]
    assert contents(f"{tmp_path}/in/*.jsonl") == ["one", "more"]
    assert contents(Source(str(tmp_path / "in"), skip=1, take=1)) == ["more"]
    assert contents(Source(str(tmp_path / "in"), skip=2)) == ["two"]
    assert "holds no file" in refused(f"{tmp_path}/in/*.xyz").why


def test_saved_and_streamed_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3]})
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"valid": made.select([2])}).save_to_disk(str(tmp_path / "both"))
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert contents(tmp_path / "saved") == TEXTS
    assert contents(Source(str(tmp_path / "both"), split="valid")) == ["third"]
    assert contents(Source(f"hf:{tmp_path}/repo", streaming=True)) == TEXTS
    assert "no field 'body'" in refused(Source(str(tmp_path / "saved"), "body")).why
    assert "cannot be opened" in refused(Source(str(tmp_path / "both"), split="nowhere")).why
    assert "cannot be opened" in refused(f"hf:{tmp_path}/nowhere").why
    store = prepare([tmp_path / "saved"], Letters(), tmp_path / "store", eos_id=0)
    assert store.header["documents"] == 3 and store.header["sources"][0]["split"] == "train"


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8"), (1, "<u1")])
def test_binidx_keeps_its_tokens_and_documents(tmp_path: Path, code: int, dtype: str) -> None:
    sequences = [[5, 6, 7, 0], [8, 0], [9, 10, 0]]
    store = prepare([binidx(tmp_path, sequences, code, dtype)], Letters(), tmp_path / "store", eos_id=0)
    assert store.tokens.tolist() == [token for sequence in sequences for token in sequence]  # no second end of text
    assert store.document_starts().tolist() == [0, 4, 6]
    assert [entry["name"] for entry in store.header["sources"]] == ["a.idx", "a.bin"]


def test_binidx_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    index = binidx(tmp_path, [[1, 2], [3, 200]])
    with pytest.raises(RadladsError, match=r"R206.*a.idx: sequence 2.*token 200, the vocabulary has 200"):
        prepare([index], Letters(), tmp_path / "store", eos_id=0)
    negative = binidx(tmp_path, [[1, -2]], 4, "<i4", "b")
    with pytest.raises(RadladsError, match="token -2"):
        prepare([negative], Letters(), tmp_path / "store", eos_id=0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda idx, data: data.unlink(), "No such file"),
        (lambda idx, data: data.write_bytes(data.read_bytes() + b"x"), "are not the 5 tokens"),
        (lambda idx, data: idx.write_bytes(b"MMIDIDX"), "no index"),
        (lambda idx, data: idx.write_bytes(idx.read_bytes()[:-1]), "does not fit"),
        (lambda idx, data: idx.write_bytes(idx.read_bytes()[:9] + struct.pack("<Q", 2) + idx.read_bytes()[17:]), "version 2"),
        (lambda idx, data: idx.write_bytes(idx.read_bytes()[:17] + b"\x07" + idx.read_bytes()[18:]), "type 7"),
        (lambda idx, data: idx.write_bytes(idx.read_bytes()[:18] + b"\xff" * 8 + idx.read_bytes()[26:]), "does not fit"),
        (lambda idx, data: idx.write_bytes(idx.read_bytes()[:42] + b"\x02" + idx.read_bytes()[43:]), "do not follow"),
    ],
)
def test_damaged_binidx_is_refused(tmp_path: Path, change: object, told: str) -> None:
    index = binidx(tmp_path, [[1, 2, 3], [4, 5]])
    change(index, index.with_suffix(".bin"))  # type: ignore[operator]
    error = refused(index)
    assert error.code == "R301" and told in error.why
