"""Large outputs, complete or absent: written piece by piece into a hidden folder, with a journal that a killed run continues.

The folder `.NAME.convert.partial` stands beside the final name. Its journal says which segments are safely on the disk;
whatever lies behind them is written again, so that the bytes do not depend on where a run was stopped.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from radlads.errors import RadladsError, fail
from radlads.files import as_output_error, check_free, check_space, hold, make_parent, swap_in, sync_folder, sync_tree, write_file
from radlads.tensors import Raw

Checks = dict[str, int]  # label of a finished segment -> CRC-32 of its bytes
Piece = Raw | bytes
Report = Callable[[int, int], None]  # bytes done, bytes in all

JOURNAL = "journal.jsonl"
SYNC_BYTES = 2**28  # at most twice this much is written again after a kill
READ_BYTES = 2**24


@dataclass(frozen=True)
class Segment:
    """A run of bytes of an output file: a header or a tensor. `pieces` sees the checks of the segments before it."""

    label: str
    nbytes: int
    pieces: Callable[[Checks], Iterable[Piece]]


def fixed(label: str, data: bytes) -> Segment:
    """A segment whose bytes are known."""
    return Segment(label, len(data), lambda checks: (data,))


@dataclass(frozen=True)
class OutputFile:
    """A large file: its name in the output folder and its segments; `checks` asks for the CRC-32 of each segment."""

    name: str
    segments: Sequence[Segment]
    checks: bool = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(segment.nbytes for segment in self.segments)


@dataclass
class Finished:
    """What is on the disk already of one file."""

    segments: int = 0
    nbytes: int = 0
    checks: Checks = field(default_factory=dict)


def write_output(
    final: Path,
    files: Sequence[OutputFile],
    *,
    key: str,
    small_files: Callable[[Mapping[str, str]], Mapping[str, bytes | Path]],
    single: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> None:
    """Write `files` and then `small_files(hashes of the large ones)` under `final`, complete or not at all.

    `key` identifies the work: a partial folder with the same key is continued, another one is thrown away. With
    `single` the one large file itself takes the name `final`. Interrupted work stays for the next run; after an error
    (R2xx of the input, R401, R402) nothing stays.
    """
    partial = partial_of(final)
    total = sum(file.nbytes for file in files)
    with as_output_error(final, total):
        check_final(final, single, overwrite)
        make_parent(final)
        with locked(partial):
            try:
                done = resume(partial, key)
                there = sum(found.nbytes for found in done.values())
                check_space(final.parent, total - there)
                meter = Meter(report, total)
                with open(partial / JOURNAL, "a", encoding="utf-8") as journal:
                    hashes = {
                        file.name: write_one(partial, file, done.get(file.name, Finished()), journal, meter) for file in files
                    }
                small = small_files(hashes)
                if single:
                    os.replace(partial / files[0].name, final)
                    sync_folder(final.parent)
                    shutil.rmtree(partial)
                    return
                write_small(partial, small)
                (partial / JOURNAL).unlink()
                sync_tree(partial)
                swap_in(partial, final, overwrite)
            except (OSError, RadladsError, ValueError):
                shutil.rmtree(partial, ignore_errors=True)
                raise


def partial_of(final: Path) -> Path:
    """The folder in which an output is written."""
    return final.with_name(f".{final.name}.convert.partial")


def clear(final: Path) -> None:
    """Remove what stands beside a whole output, left by a run that was killed after it had given it its name."""
    with as_output_error(final, 0):
        make_parent(final)
        partial = partial_of(final)
        if partial.is_dir():
            with suppress(RadladsError), locked(partial):
                shutil.rmtree(partial)


def write_small(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    """Write or copy the small files; what an interrupted run left of them is replaced."""
    for name, content in files.items():
        write_file(folder / name, content if isinstance(content, bytes) else content.read_bytes())


def check_final(final: Path, single: bool, overwrite: bool) -> None:
    """R401 if something stands at `final` that may not be replaced."""
    if single and overwrite and final.is_file() and not final.is_symlink():
        return
    check_free(final, overwrite)
    if single and final.exists():
        raise fail("R401", where=final, why="a folder of that name exists", fix="Choose another name")


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """The partial folder, made if need be and locked for as long as this process lives; R401 if another one writes it."""
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = "another conversion is writing it"
            raise fail("R401", where=partial, why=why, fix="Wait for it, or choose another output") from None
        except OSError:
            hold(lock)  # a file system without locks
        yield
    finally:
        os.close(lock)


def resume(partial: Path, key: str) -> dict[str, Finished]:
    """What the journal says is on the disk; a folder of other work, or a damaged journal, is emptied."""
    found: dict[str, Finished] = {}
    path = partial / JOURNAL
    try:
        text = path.read_text(encoding="utf-8")
        text = text[: text.rfind("\n") + 1]
        os.truncate(path, len(text.encode()))  # a line cut by a kill
        lines = [json.loads(line) for line in text.splitlines()]
        if lines[0] != {"key": key}:
            raise ValueError("other work")
        for line in lines[1:]:
            entry = found.setdefault(line["file"], Finished())
            entry.segments, entry.nbytes = line["segments"], line["bytes"]
            entry.checks |= line["checks"]
        for name, entry in found.items():
            if (partial / name).stat().st_size < entry.nbytes:
                raise ValueError("the file is shorter than its journal")
        return found
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        for child in partial.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        path.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
        return {}


class Meter:
    """Counts bytes for whoever draws the bar."""

    def __init__(self, report: Report | None, total: int) -> None:
        self.report, self.total, self.done = report, total, 0

    def add(self, count: int) -> None:
        """`count` more bytes are done."""
        self.done += count
        if self.report:
            self.report(self.done, self.total)


class Hasher:
    """SHA-256 in a thread beside the writing; at most one piece waits, so memory stays bounded."""

    def __init__(self) -> None:
        self.hash, self.pool = hashlib.sha256(), ThreadPoolExecutor(1)
        self.last: Future[None] | None = None

    def __enter__(self) -> "Hasher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.pool.shutdown()

    def update(self, data: memoryview) -> None:
        """Take in one piece, which must not change afterwards."""
        if self.last is not None:
            self.last.result()
        self.last = self.pool.submit(self.hash.update, data)

    def hexdigest(self) -> str:
        """The digest of all pieces."""
        if self.last is not None:
            self.last.result()
        return self.hash.hexdigest()


def write_one(partial: Path, file: OutputFile, done: Finished, journal: IO[str], meter: Meter) -> str:
    """Write the segments of one file that are not there yet, and return the SHA-256 of the whole."""
    mode = "r+b" if done.nbytes else "w+b"
    # The disk takes what is there while the next pieces are made; the journal follows it, one line at a time.
    with open(partial / file.name, mode, buffering=0) as out, Hasher() as hasher, ThreadPoolExecutor(1) as syncing:
        out.truncate(done.nbytes)
        while data := out.read(min(READ_BYTES, done.nbytes - out.tell())):
            hasher.update(memoryview(data))
            meter.add(len(data))
        checks, since = dict(done.checks), time.monotonic()
        fresh: Checks = {}
        synced, pending = done.nbytes, Future[None]()
        pending.set_result(None)
        for number, segment in enumerate(file.segments[done.segments :], done.segments + 1):
            check = write_segment(out, segment, checks, hasher, meter, file.checks)
            if file.checks:
                checks[segment.label] = fresh[segment.label] = check
            last = number == len(file.segments)
            if last or out.tell() - synced >= SYNC_BYTES or time.monotonic() - since > 10:
                pending.result()
                synced, since = out.tell(), time.monotonic()
                line = {"file": file.name, "segments": number, "bytes": synced, "checks": fresh}
                pending, fresh = syncing.submit(note_synced, out.fileno(), journal, line), {}
        pending.result()
        return hasher.hexdigest()


def note_synced(out: int, journal: IO[str], line: dict[str, Any]) -> None:
    """Bring to the disk what was written, and then the line that says so."""
    os.fsync(out)
    journal.write(json.dumps(line) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def write_segment(out: Any, segment: Segment, checks: Checks, hasher: Hasher, meter: Meter, check: bool) -> int:
    """Write one segment and return its CRC-32 (0 where it is not asked for); ValueError if it has another size than planned."""
    count = crc = 0
    for piece in segment.pieces(checks):
        data = memoryview(piece).cast("B") if isinstance(piece, bytes) else as_bytes(piece)
        view = data
        while view:
            view = view[out.write(view) :]
        hasher.update(data)
        crc = zlib.crc32(data, crc) if check else 0
        count += len(data)
        meter.add(len(data))
    if count != segment.nbytes:
        raise ValueError(f"{segment.label}: {count} bytes came where {segment.nbytes} were planned")
    return crc


def as_bytes(piece: Raw) -> memoryview:
    """The bytes of an array in C order."""
    return np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
