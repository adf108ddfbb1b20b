"""The token store: one stream of tokens in Arrow files, memory-mapped, and the record of what it was made from.

A store is a folder of `shard-NNNNN.arrow` (Arrow IPC files, uncompressed) and `store.json`, which is written last. A row is
a document, or a piece of a long one: `tokens` (list of uint16, or uint32 for vocabularies over 65,536), `last` (the document
ends here) and, where some tokens do not count as labels, `counted` (list of uint8).
"""

from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from radlads.errors import RadladsError, fail
from radlads.files import read_json

try:
    import pyarrow as pa
except ImportError:
    raise fail("R104", where="training data", why="pyarrow is not installed", fix="Run `pip install 'radlads[data]'`") from None

HEADER = "store.json"
SCHEMA = 2
# Shards mapped at once; a mapping holds a file open.
OPEN_SHARDS = 256

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Flags = npt.NDArray[np.bool_]


class TokenStore:
    """A prepared token stream; nothing of it is in memory but what is read."""

    def __init__(self, path: str | Path) -> None:
        """Open the folder `path`. Raises R301 when it is no whole store."""
        self.path = Path(path)
        self.header = read_header(self.path)
        self.shards = [self.path / shard["file"] for shard in self.header["shards"]]
        for shard, file in zip(self.header["shards"], self.shards, strict=True):
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                raise damaged(file, "it is missing or has another size than store.json says")
        self.begins = list(accumulate((shard["tokens"] for shard in self.header["shards"]), initial=0))
        if self.begins[-1] != self.header["tokens"]:
            raise damaged(self.path / HEADER, "the tokens of its shards do not add up")

    def __len__(self) -> int:
        return int(self.header["tokens"])

    @property
    def tokens(self) -> Tokens:
        """All tokens in memory, shape (len,)."""
        return self.read(0, len(self))[0]

    @property
    def counted(self) -> Flags | None:
        """All flags in memory, shape (len,): whether a token counts as a label; None where all do."""
        return self.read(0, len(self))[1]

    def read(self, start: int, end: int) -> tuple[Tokens, Flags | None]:
        """Tokens start .. end - 1, and whether each counts as a label (None: all do). Raises R301 for a damaged shard."""
        tokens, flags = [], []
        for batch, low, high in self._pieces(start, end):
            tokens.append(batch.tokens[low:high])
            flags.append(np.ones(high - low, bool) if batch.counted is None else batch.counted[low:high] != 0)
        found = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
        if len(found) and found.max() >= self.header["vocab_size"]:
            raise damaged(self.path, f"it holds token {found.max()}, the vocabulary has {self.header['vocab_size']}")
        return found, np.concatenate(flags) if self.header["masked"] else None

    def document_starts(self) -> npt.NDArray[np.int64]:
        """First token of every document, ascending."""
        found, place, begins = [], 0, True
        for file, shard in zip(self.shards, self.header["shards"], strict=True):
            for batch in open_shard(file, shard["tokens"], shard["sha256"]):
                rows = np.flatnonzero(np.concatenate([[begins], batch.last[:-1]]))
                found.append(place + batch.offsets[rows].astype(np.int64))
                begins = bool(batch.last[-1])
                place += len(batch.tokens)
        starts = np.unique(np.concatenate(found))  # an empty row begins where the next one does
        return starts[starts < len(self)]

    def _pieces(self, start: int, end: int) -> Iterator[tuple["Batch", int, int]]:
        """The stretches of record batches that make up tokens start .. end - 1."""
        if not 0 <= start < end <= len(self):
            raise ValueError(f"tokens {start} to {end} of {len(self)}")
        for number in range(bisect_right(self.begins, start) - 1, len(self.shards)):
            place = self.begins[number]
            if place >= end:
                return
            shard = self.header["shards"][number]
            for batch in open_shard(self.shards[number], shard["tokens"], shard["sha256"]):
                low, high = max(start - place, 0), min(end - place, len(batch.tokens))
                if low < high:
                    yield batch, low, high
                place += len(batch.tokens)


class Batch:
    """One record batch as arrays over the mapped file: tokens, offsets of the rows, last, and counted or None."""

    def __init__(self, batch: "pa.RecordBatch") -> None:
        rows = batch.column("tokens")
        self.offsets = rows.offsets.to_numpy()
        self.tokens: Tokens = rows.values.to_numpy()
        self.last = batch.column("last").to_numpy(zero_copy_only=False)
        masked = "counted" in batch.schema.names
        self.counted: npt.NDArray[np.uint8] | None = batch.column("counted").values.to_numpy() if masked else None


@lru_cache(maxsize=OPEN_SHARDS)
def open_shard(path: Path, tokens: int, sha256: str) -> tuple[Batch, ...]:
    """The checked record batches of a shard of `tokens` tokens; `sha256` tells it from an older one there. Raises R301."""
    try:
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        width = file.schema.field("tokens").type.value_type
        if file.schema not in (schema(width, False), schema(width, True)) or width not in (pa.uint16(), pa.uint32()):
            raise ValueError(f"its columns are {', '.join(file.schema.names)}")
        batches = []
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            batch.validate(full=True)
            batches.append(whole(batch))
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise damaged(path, str(error).splitlines()[0]) from None
    if sum(len(batch.tokens) for batch in batches) != tokens:
        raise damaged(path, "it holds another number of tokens than store.json says")
    return tuple(batches)


def whole(batch: "pa.RecordBatch") -> Batch:
    """The arrays of a batch whose lists fill their buffers from the first value to the last, without nulls."""
    found = Batch(batch)
    if any(column.null_count for column in batch.columns) or batch.num_rows == 0:
        raise ValueError("it has empty rows")
    if found.offsets[0] != 0 or found.offsets[-1] != len(found.tokens):
        raise ValueError("its lists do not fill their buffer")
    if found.counted is not None and not np.array_equal(batch.column("counted").offsets.to_numpy(), found.offsets):
        raise ValueError("tokens and flags differ in length")
    return found


def schema(width: "pa.DataType", masked: bool) -> "pa.Schema":
    """The columns of a shard."""
    fields = [pa.field("tokens", pa.list_(width)), pa.field("last", pa.bool_())]
    return pa.schema([*fields, *([pa.field("counted", pa.list_(pa.uint8()))] if masked else [])])


def existing_store(folder: Path) -> TokenStore | None:
    """The store in `folder`; None when there is none, or a damaged one that must be made again."""
    try:
        return TokenStore(folder)
    except RadladsError:
        return None


def is_store(path: Path) -> bool:
    """Whether a path looks like a token store."""
    return (path / HEADER).is_file()


def read_header(folder: Path) -> dict[str, Any]:
    """Checked `store.json` of a store. Raises R301."""
    path = folder / HEADER
    try:
        header: dict[str, Any] = read_json(path, code="R301", limit=64 << 20)
        usable = (
            header["schema"] == SCHEMA
            and type(header["masked"]) is bool
            and all(type(header[key]) is int and header[key] > 0 for key in ("tokens", "documents", "vocab_size"))
            and all(is_shard(shard) for shard in header["shards"])
        )
    except (RadladsError, KeyError, TypeError):
        usable = False
    if not usable:
        raise damaged(path, "it is no record of a token store")
    return header


def is_shard(shard: dict[str, Any], count: str = "tokens") -> bool:
    """Whether an entry of a record of shards can be used: a plain file name and two sizes, `count` and bytes."""
    name = shard["file"]
    sizes = all(type(shard[key]) is int and shard[key] > 0 for key in (count, "bytes"))
    plain = isinstance(name, str) and name == Path(name).name and name.endswith(".arrow")
    return plain and isinstance(shard["sha256"], str) and sizes


def damaged(where: object, why: str) -> RadladsError:
    """R301 at a part of a store."""
    return fail("R301", where=where, why=why, fix="Prepare the data again")
