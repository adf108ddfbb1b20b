"""Work that goes on after a kill: a hidden folder beside its output, and a journal of the pieces that are finished."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from radlads.errors import fail
from radlads.files import write_file

JOURNAL = "journal.jsonl"


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """The hidden folder beside `out` that holds finished shards (.arrow); it stays after a failure if there are any.

    Raises R401 when another process works there.
    """
    folder = out.with_name(f".{out.name}.work")
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise fail("R401", where=out, why="another process is preparing it", fix="Wait for it to end") from None
        try:
            yield folder
        finally:
            if not any(folder.glob("*.arrow")):
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


class Journal:
    """Which units are finished: a line of JSON for each, after a first one with the options that all have in common."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.path, self.records = folder / JOURNAL, dict[str, dict[str, Any]]()
        self.file: IO[str] | None = None
        known, *lines = self._lines() or [None]
        if known != options:
            for stale in folder.glob("*.arrow"):
                stale.unlink()
            write_file(self.path, json.dumps(options) + "\n")
            lines = []
        for record in lines:
            shard = folder / record["file"]
            if shard.is_file() and shard.stat().st_size == record["bytes"]:
                self.records[record["key"]] = record

    def _lines(self) -> list[Any]:
        """The whole lines; a last one cut short by a kill is left out."""
        try:
            return [json.loads(line) for line in self.path.read_bytes().split(b"\n")[:-1]]
        except (OSError, ValueError):
            return []

    def __enter__(self) -> "Journal":
        # What a kill left of a last line is ended, so that the next stands on a line of its own.
        write_file(self.path, self.path.read_bytes().rpartition(b"\n")[0] + b"\n")
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def add(self, record: dict[str, Any]) -> dict[str, Any]:
        """Note a finished unit."""
        assert self.file is not None
        self.records[record["key"]] = record
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        return record

    def result(self, task: "Future[dict[str, Any]] | dict[str, Any]") -> dict[str, Any]:
        """The record of a unit, noted once it is finished."""
        if isinstance(task, dict):
            return task
        record = task.result()
        return record if record["key"] in self.records else self.add(record)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
