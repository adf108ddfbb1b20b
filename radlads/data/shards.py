"""One shard of a token store: the tokens of a unit of documents, as an Arrow file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from radlads.data.chat import documents_of
from radlads.data.documents import Piece
from radlads.data.store import schema
from radlads.errors import fail
from radlads.files import new_file, sha256

# Characters handed to the tokenizer at once.
BATCH = 4 << 20


class TokenizerLike(Protocol):
    """What `prepare` needs; `encode_batch(texts) -> list of token lists` is used too where there is one."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens."""


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
