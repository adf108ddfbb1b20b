"""Items of the tasks that come from files: LAMBADA (last words), BLiMP (minimal pairs) and held-out text (bits per byte)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radlads.data.documents import kind_of, read_documents, read_lines
from radlads.errors import fail
from radlads.tokenizer import Tokenizer


@dataclass(frozen=True)
class LocalTask:
    """A task whose file is recognised by the beginning of its name; `fields` are those every line of it must have."""

    name: str
    prefix: str
    fields: tuple[str, ...]
    chance: float


LOCAL_TASKS = {
    task.name: task
    for task in (LocalTask("lambada", "lambada", ("text",), 0.0), LocalTask("blimp", "blimp", ("good", "bad"), 0.5))
}


def find_file(task: LocalTask, paths: list[str]) -> Path:
    """The file of a task among files and folders. Raises R201 when there is none, or more than one."""
    places = [Path(path) for path in paths]
    files = [file for place in places for file in (sorted(place.iterdir()) if place.is_dir() else [place])]
    found = [file for file in files if file.name.startswith(task.prefix) and ".jsonl" in file.suffixes]
    if len(found) != 1:
        why = f"it holds {len(found) or 'no'} files named {task.prefix}*.jsonl (also .xz, .gz), and one is needed"
        raise fail("R201", where=f"--data {' '.join(paths)}".strip(), why=why, fix=f"Give the file of {task.name} with `--data`")
    return found[0]


def read_items(task: LocalTask, path: Path) -> list[dict[str, str]]:
    """All items of a task's file. Raises R301, naming file and line, for one that cannot be used."""
    kind_of(path)
    items = [item_of(line, task, f"{path}:{number}") for number, line in read_lines(path, lambda _: None) if line.strip()]
    if not items:
        raise fail("R302", where=path, why="it holds no items", fix=f"Give the file of {task.name} with `--data`")
    return items


def item_of(line: str, task: LocalTask, where: str) -> dict[str, str]:
    """The fields of one JSON line."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise fail("R301", where=where, why="it is no JSON object", fix="Correct the line")
    for name in task.fields:
        if not isinstance(record.get(name), str) or not record[name].strip():
            raise fail("R301", where=where, why=f"the field {name!r} is missing or empty", fix="Correct the line")
    return {name: record[name] for name in task.fields}


@dataclass(frozen=True)
class Window:
    """Token ids, each but the first scored given those before it, and the bytes of text that the scored ones spell."""

    ids: list[int]
    size: float


def windows(path: Path, tokenizer: Tokenizer, length: int) -> Iterator[Window]:
    """A text file, whole and once, in windows of `length` tokens of which the first is only context.

    That context is the token before, at the start of a document what stands there in training data. Raises R206 where the
    tokenizer has no such token, R301 for a file that is no text.
    """
    begin = tokenizer.begin_id
    if begin is None:
        raise fail("R206", where=tokenizer.path, why="it has no token that begins or ends a text", fix="Name one in its config")
    kind_of(path)
    before = begin
    for piece in read_documents(path, "text", lambda _: None):
        text = piece.content
        if not isinstance(text, str):
            raise fail("R301", where=piece.where, why="it is a conversation, not a text", fix="Give a text with `--text`")
        ids = tokenizer.encode(text)
        parts = [ids[first : first + length - 1] for first in range(0, len(ids), length - 1)]
        # A character may be cut in two: the windows share the bytes of the text, which are exact.
        shares = [len(tokenizer.decode(part, skip_special=False).encode()) for part in parts]
        scale = len(text.encode()) / max(1, sum(shares))
        for part, share in zip(parts, shares, strict=True):
            yield Window([before, *part], share * scale)
            before = part[-1]
        before = begin if piece.last else before
