"""Sources to a token store: tokenised by several processes, one shard at a time, and taken up again after a kill.

The documents are cut into units of some 32 million characters in their order; each becomes one shard, whoever makes it. What
is finished lies in a hidden folder beside the store and is known by a hash of its text, so that a second call makes only what
is missing, even where another line was corrected in between.
"""

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
from contextlib import nullcontext
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from radlads.data.documents import Piece
from radlads.data.journal import Journal, link_or_copy, work_folder
from radlads.data.shards import TokenizerLike, make_shard
from radlads.data.sources import Source, payload
from radlads.data.store import HEADER, SCHEMA, TokenStore, existing_store, is_store
from radlads.errors import fail
from radlads.files import as_output_error, check_free, make_parent, new_folder, sha256, write_file
from radlads.tokenizer import Tokenizer

# Characters of a unit.
UNIT = 32 << 20
# Bytes of input from which on further processes are worth their start.
WORTH_PROCESSES = 32 << 20
PROBE = (
    "Aa zZ 0123 .,;:!?'\"()[]{}<>|\\/@#$%^&*-_=+~`\n\t  \n\nthe quick brown fox äöüß éèê 中文 日本語 한국어 русский العربية 🙂🚀"
)

Progress = Callable[[int, int | None], None]


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
