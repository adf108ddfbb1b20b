"""Sources to a token store: tokenised by several processes, one shard at a time, and taken up again after a kill.

The documents are cut into units of some 32 million characters in their order; each becomes one shard, whoever makes it. What
is finished lies in a hidden folder beside the store and is known by a hash of its text, so that a second call makes only what
is missing, even where another line was corrected in between.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa

from radlads.data.chat import documents_of
from radlads.data.documents import Piece
from radlads.data.sources import Source, payload
from radlads.data.store import HEADER, SCHEMA, TokenStore, existing_store, is_store, schema
from radlads.errors import fail
from radlads.files import as_output_error, check_free, make_parent, new_file, new_folder, sha256, write_file
from radlads.tokenizer import Tokenizer

# Characters of a unit, and characters handed to the tokenizer at once.
UNIT = 32 << 20
BATCH = 4 << 20
# Bytes of input from which on further processes are worth their start.
WORTH_PROCESSES = 32 << 20
JOURNAL = "journal.jsonl"
PROBE = (
    "Aa zZ 0123 .,;:!?'\"()[]{}<>|\\/@#$%^&*-_=+~`\n\t  \n\nthe quick brown fox äöüß éèê 中文 日本語 한국어 русский العربية 🙂🚀"
)

Progress = Callable[[int, int | None], None]


class TokenizerLike(Protocol):
    """What `prepare` needs; `encode_batch(texts) -> list of token lists` is used too where there is one."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens."""


def prepare(
    sources: Sequence[Source | str | Path],
    tokenizer: TokenizerLike,
    out: str | Path,
    *,
    eos_id: int | None,
    processes: int | None = None,
    progress: Progress | None = None,
) -> TokenStore:
    """Tokenize `sources` into the store `out`; one made earlier from the very same input is used as it is.

    Every document is followed by `eos_id` (None: by nothing), but for those of token files, which bring their own.
    `processes` None is as many as there are processors, for large input; more than one need a `Tokenizer` from a folder. The
    result does not depend on their number. `progress` gets (bytes read, bytes in all), for datasets (rows read, None).
    Raises R301 for input that cannot be used, R302 when there is no text, R206 for a token outside the vocabulary.
    """
    given, out = [source if isinstance(source, Source) else Source(str(source)) for source in sources], Path(out)
    files = [file for source in given for file in source.files()]
    before = [signature(file) for file in files]
    origin = {
        "sources": [entry for source in given for entry in source.origin()],
        "tokenizer": tokenizer_hash(tokenizer),
        "template": template_hash(tokenizer),
        "eos_id": eos_id,
        "chosen": [[source.field, source.skip, source.take] for source in given],
    }
    found = existing_store(out)
    if found is not None and origin.items() <= found.header.items():
        return found
    with as_output_error(out, 0):
        # Only a store may be replaced: `out` could be any folder of the user.
        check_free(out, is_store(out))
        make_parent(out)
        # A shard depends on these and on its text alone.
        options = {key: origin[key] for key in ("tokenizer", "template", "eos_id")} | {"vocab_size": tokenizer.vocab_size}
        with work_folder(out) as folder, Journal(folder, options) as journal:
            workers = count_of(processes, given, tokenizer)
            records = list(shards(read_all(given, progress), tokenizer, eos_id, folder, journal, workers))
            if not any(record["tokens"] for record in records):
                where = ", ".join(source.path for source in given) or out
                raise fail("R302", where=where, why="there is no text", fix="Give files that hold text")
            if before != [signature(file) for file in files]:
                raise fail("R301", where=out, why="a source changed while it was read", fix="Prepare the data again")
            publish(folder, out, records, {"vocab_size": tokenizer.vocab_size, **origin})
    return TokenStore(out)


def publish(folder: Path, out: Path, records: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Move the shards of `folder` to the store `out` and write its record."""
    used = [record for record in records if record["tokens"]]
    width = 2 if about["vocab_size"] <= 65536 else 4
    names = [f"shard-{number:05d}.arrow" for number in range(len(used))]
    header = {
        "schema": SCHEMA,
        "dtype": f"uint{width * 8}",
        **{key: sum(record[key] for record in records) for key in ("tokens", "counted", "documents")},
        "masked": any(record["masked"] for record in used),
        "sha256": hashlib.sha256("".join(record["sha256"] for record in used).encode()).hexdigest(),
        **about,
        "shards": [
            {"file": name, **{key: record[key] for key in ("tokens", "documents", "bytes", "sha256")}}
            for name, record in zip(names, used, strict=True)
        ],
    }
    with new_folder(out, overwrite=is_store(out)) as final:
        for name, record in zip(names, used, strict=True):
            # A unit that stands twice in the input is one file here.
            link_or_copy(folder / record["file"], final / name)
        write_file(final / HEADER, json.dumps(header, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def shards(
    pieces: Iterator[Piece], tokenizer: TokenizerLike, eos_id: int | None, folder: Path, journal: "Journal", workers: int
) -> Iterator[dict[str, Any]]:
    """The records of all shards in order; those of the journal are not made again."""
    pending: deque[Future[dict[str, Any]] | dict[str, Any]] = deque()
    with pool(tokenizer, workers) as executor:
        try:
            for unit in units(pieces):
                key = unit_key(unit)
                known = journal.records.get(key)
                if known is not None:
                    pending.append(known)
                elif executor is None:
                    pending.append(journal.add(make_shard(unit, tokenizer, eos_id, folder / f"{key}.arrow")))
                else:
                    pending.append(executor.submit(in_worker, unit, eos_id, folder / f"{key}.arrow"))
                while pending and (len(pending) > workers + 1 or isinstance(pending[0], dict)):
                    yield journal.result(pending.popleft())
            while pending:
                yield journal.result(pending.popleft())
        except BrokenProcessPool:
            why = "a process that tokenised was killed, most likely for want of memory"
            raise fail("R403", where="radlads prepare", why=why, fix="Lower --num-proc and run it again: it goes on") from None
        finally:
            for task in pending:
                if isinstance(task, Future):
                    task.cancel()


def units(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """The pieces in groups of about UNIT characters (or tokens), in order."""
    unit: list[Piece] = []
    size = 0
    for piece in pieces:
        unit.append(piece)
        size += length_of(piece)
        if size >= UNIT:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def length_of(piece: Piece) -> int:
    """Characters or tokens of a piece."""
    if isinstance(piece.content, list):
        return sum(len(message["content"]) for message in piece.content)
    return len(piece.content)


def unit_key(unit: list[Piece]) -> str:
    """sha256 over the content of a unit."""
    digest = hashlib.sha256()
    for content, last, _ in unit:
        kind = b"a" if isinstance(content, np.ndarray) else b"m" if isinstance(content, list) else b"t"
        if isinstance(content, np.ndarray):
            data = content.astype("<i8").tobytes()
        else:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
        digest.update(kind + (b"1" if last else b"0") + len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def make_shard(unit: list[Piece], tokenizer: TokenizerLike, eos_id: int | None, path: Path) -> dict[str, Any]:
    """Tokenise one unit into the file `path`; returns its record. Raises R206, R301."""
    masked = any(isinstance(piece.content, list) for piece in unit)
    width = pa.uint16() if tokenizer.vocab_size <= 65536 else pa.uint32()
    record: dict[str, Any] = {"key": path.stem, "file": path.name, "masked": masked, "tokens": 0, "counted": 0, "documents": 0}
    with new_file(path) as file, pa.ipc.new_file(file, schema(width, masked)) as writer:
        for rows in rows_of(unit, tokenizer, eos_id):
            tokens = np.concatenate([row.tokens for row in rows])
            counted = np.concatenate([row.counted for row in rows])
            check_tokens(tokens, tokenizer.vocab_size, rows)
            offsets = pa.array(np.cumsum([0, *(len(row.tokens) for row in rows)]), pa.int32())
            values = pa.array(tokens.astype(width.to_pandas_dtype()))
            columns = [pa.ListArray.from_arrays(offsets, values), pa.array([row.last for row in rows])]
            if masked:
                columns.append(pa.ListArray.from_arrays(offsets, pa.array(counted.astype(np.uint8))))
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema(width, masked)))
            record["tokens"] += len(tokens)
            record["counted"] += int(counted.sum())
            record["documents"] += sum(row.last for row in rows)
    return {**record, "bytes": path.stat().st_size, "sha256": sha256(path)}


class Row:
    """A row of a shard in the making."""

    def __init__(self, last: bool, where: str) -> None:
        self.last, self.where = last, where
        self.parts: list[np.ndarray[Any, Any]] = []
        self.flags: list[np.ndarray[Any, Any]] = []

    def add(self, tokens: Sequence[int] | np.ndarray[Any, Any], counted: bool) -> None:
        """Append tokens, all of which count as labels or none."""
        self.parts.append(np.asarray(tokens, np.int64))
        self.flags.append(np.full(len(tokens), counted))

    @property
    def tokens(self) -> np.ndarray[Any, Any]:
        """All tokens, int64."""
        return np.concatenate([np.zeros(0, np.int64), *self.parts])

    @property
    def counted(self) -> np.ndarray[Any, Any]:
        """Which of them count as labels."""
        return np.concatenate([np.zeros(0, bool), *self.flags])


def rows_of(unit: list[Piece], tokenizer: TokenizerLike, eos_id: int | None) -> Iterator[list[Row]]:
    """The rows of a unit, in groups of about BATCH characters."""
    rows: list[Row] = []
    texts: list[str] = []
    places: list[tuple[Row, bool]] = []
    for content, last, where in unit:
        if isinstance(content, list):
            documents = [[(part.text, part.counted) for part in found] for found in chats(content, tokenizer, where)]
        else:
            documents = [[(content, True)]]
        for document in documents:
            row = Row(last, where)
            rows.append(row)
            if isinstance(content, np.ndarray):
                row.add(content, True)
                continue
            for text, counted in document:
                texts.append(text)
                places.append((row, counted))
        if sum(map(len, texts)) >= BATCH or len(rows) >= 4096:
            yield filled(rows, texts, places, tokenizer, eos_id)
            rows, texts, places = [], [], []
    if rows:
        yield filled(rows, texts, places, tokenizer, eos_id)


def filled(
    rows: list[Row], texts: list[str], places: list[tuple[Row, bool]], tokenizer: TokenizerLike, eos_id: int | None
) -> list[Row]:
    """The rows with the tokens of their texts, and `eos_id` at the end of each document."""
    many = getattr(tokenizer, "encode_batch", None)
    encoded = many(texts) if many is not None else [tokenizer.encode(text) for text in texts]
    chat = {id(row) for row, counted in places if not counted}
    ends: frozenset[int] = getattr(tokenizer, "eos_ids", frozenset())
    for ids, (row, counted) in zip(encoded, places, strict=True):
        if id(row) in chat and counted:
            # The answer ends with the token that ends a turn; what the template adds behind it nobody writes.
            cut = max((place + 1 for place, token in enumerate(ids) if token in ends), default=len(ids))
            row.add(ids[:cut], True)
            row.add(ids[cut:], False)
        else:
            row.add(ids, counted)
    if eos_id is not None:
        for row in {id(row): row for row, _ in places}.values():
            if row.last:
                row.add([eos_id], id(row) not in chat)
    return rows


def chats(messages: list[dict[str, str]], tokenizer: TokenizerLike, where: str) -> Iterator[list[Any]]:
    """The documents of a conversation by the tokenizer's template. Raises R301, R206."""
    if not getattr(tokenizer, "has_chat_template", False):
        why = "it holds conversations, and the tokenizer has no chat template"
        raise fail("R206", where=where, why=why, fix="Use the tokenizer of a chat model, or data with plain text")
    return documents_of(messages, tokenizer.chat, where)  # type: ignore[attr-defined]


def check_tokens(tokens: np.ndarray[Any, Any], vocab_size: int, rows: list[Row]) -> None:
    """R206, naming the document, for a token outside the vocabulary."""
    if len(tokens) == 0 or (tokens.min() >= 0 and tokens.max() < vocab_size):
        return
    row = next(row for row in rows if len(row.tokens) and not (row.tokens.min() >= 0 and row.tokens.max() < vocab_size))
    token = int(row.tokens.max() if row.tokens.max() >= vocab_size else row.tokens.min())
    why = f"it gives token {token}, the vocabulary has {vocab_size}"
    raise fail("R206", where=row.where, why=why, fix="Use the tokenizer that belongs to the model")


def read_all(sources: list[Source], progress: Progress | None) -> Iterator[Piece]:
    """The pieces of all documents of all sources."""
    sizes = [source.size() for source in sources]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    done = 0
    for source, size in zip(sources, sizes, strict=True):

        def report(position: int, start: int = done) -> None:
            if progress is not None:
                progress(start + position, total)

        yield from source.read(report)
        done += size or 0


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """The hidden folder beside `out` that holds finished shards; it stays after a failure if there are any.

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


def count_of(processes: int | None, sources: list[Source], tokenizer: TokenizerLike) -> int:
    """Processes to use. Raises R101 for a number that is not above 0."""
    if processes is not None and processes < 1:
        raise fail("R101", where="--num-proc", why=f"{processes} is not above 0", fix="Give a number above 0")
    if not isinstance(tokenizer, Tokenizer):
        return 1
    if processes is not None:
        return processes
    sizes = [source.size() for source in sources]
    small = None not in sizes and sum(size or 0 for size in sizes) < WORTH_PROCESSES
    return 1 if small else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pool(tokenizer: TokenizerLike, workers: int) -> "ProcessPoolExecutor | nullcontext[None]":
    """Processes that each hold the tokenizer; none for one worker, which is this process."""
    if workers == 1:
        return nullcontext(None)
    assert isinstance(tokenizer, Tokenizer)
    arguments = (str(tokenizer.path), tokenizer.vocab_size)
    return ProcessPoolExecutor(workers, get_context("spawn"), begin_worker, arguments)


def begin_worker(path: str, vocab_size: int) -> None:
    """Set up a process: its tokenizer, one thread, and an end when the first process ends."""
    global TOKENIZER
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    TOKENIZER = Tokenizer(path, vocab_size)


TOKENIZER: Tokenizer


def end_with_parent() -> None:
    """Leave when the process that asked for the work is gone, even if it was killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def in_worker(unit: list[Piece], eos_id: int | None, path: Path) -> dict[str, Any]:
    """`make_shard` in a process of the pool."""
    return make_shard(unit, TOKENIZER, eos_id, path)


def tokenizer_hash(tokenizer: TokenizerLike) -> str:
    """sha256 of the tokenizer's file, or of its tokens of a probe text when it comes from no model folder."""
    path = getattr(tokenizer, "path", None)
    if isinstance(path, Path) and (path / "tokenizer.json").is_file():
        return sha256(path / "tokenizer.json")
    return hashlib.sha256(json.dumps([tokenizer.vocab_size, tokenizer.encode(PROBE)]).encode()).hexdigest()


def template_hash(tokenizer: TokenizerLike) -> str | None:
    """sha256 of the chat template; None where there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def signature(path: Path) -> tuple[int, int, int]:
    """Size, time and identity of a file and of what it points to, to notice a change."""
    stat = payload(path).stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
