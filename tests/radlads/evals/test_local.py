"""Items from files: what is found, what is refused, and that no byte of a text is counted twice or left out."""

import lzma
from itertools import pairwise
from pathlib import Path

import pytest

from radlads.errors import RadladsError
from radlads.evals.local import LOCAL_TASKS, find_file, read_items, windows
from radlads.tokenizer import Tokenizer
from tests.models import tiny_teacher


def test_items_of_a_packed_file(tmp_path: Path) -> None:
    file = tmp_path / "blimp_small.jsonl.xz"
    file.write_bytes(lzma.compress(b'{"good": "a cat sits", "bad": "a cat sit", "uid": "x"}\n\n'))
    task = LOCAL_TASKS["blimp"]
    assert find_file(task, [str(tmp_path)]) == file
    assert read_items(task, file) == [{"good": "a cat sits", "bad": "a cat sit"}]


@pytest.mark.parametrize(
    ("line", "why"),
    [('{"good": "x"}', r":1: the field 'bad'"), ("[1]", "no JSON object"), ("{", "no JSON object"), ("", "no items")],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, why: str) -> None:
    file = tmp_path / "blimp.jsonl"
    file.write_text(line)
    with pytest.raises(RadladsError, match=why):
        read_items(LOCAL_TASKS["blimp"], file)


def test_a_missing_or_doubtful_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RadladsError, match=r"no files named lambada\*"):
        find_file(LOCAL_TASKS["lambada"], [str(tmp_path)])
    for name in ("lambada1.jsonl", "lambada2.jsonl.gz"):
        (tmp_path / name).write_text("")
    with pytest.raises(RadladsError, match="2 files"):
        find_file(LOCAL_TASKS["lambada"], [str(tmp_path)])


def test_windows_cover_a_text_once(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_teacher(tmp_path / "teacher"))
    documents = ["Älter wird man täglich. " * 9, "A second one, shorter."]
    file = tmp_path / "text.txt"
    file.write_text("<|endoftext|>".join(documents), encoding="utf-8")
    found = list(windows(file, tokenizer, 32))
    assert sum(window.size for window in found) == pytest.approx(sum(len(text.encode()) for text in documents))
    assert all(2 <= len(window.ids) <= 32 for window in found)
    scored = [token for window in found for token in window.ids[1:]]
    assert scored == [token for text in documents for token in tokenizer.encode(text)]
    follows = [b.ids[0] == a.ids[-1] for a, b in pairwise(found)]
    assert found[0].ids[0] == tokenizer.eos_id and follows.count(False) == 1
