"""The token store: one flat stream of tokens on disk, and the record of what it was made from.

A store is a folder with `tokens.bin` (little-endian uint16, or uint32 for vocabularies over 65,536) and `store.json`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from radlads.data.documents import kind_of, read_documents
from radlads.errors import RadladsError, fail
from radlads.files import new_folder, sha256, write_file

TOKENS, HEADER = "tokens.bin", "store.json"
# Characters handed to the tokenizer at once.
BATCH = 4 << 20
PROBE = (
    "Aa zZ 0123 .,;:!?'\"()[]{}<>|\\/@#$%^&*-_=+~`\n\t  \n\nthe quick brown fox äöüß éèê 中文 日本語 한국어 русский العربية 🙂🚀"
)


class TokenizerLike(Protocol):
    """What `prepare` needs; `encode_batch(texts) -> list of token lists` is used too where there is one."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special tokens."""


class TokenStore:
    """A prepared token stream, memory-mapped; `tokens` is read-only, shape (count,)."""

    def __init__(self, path: str | Path) -> None:
        """Open the folder `path`. Raises R301 when it is no whole store."""
        self.path = Path(path)
        self.header = read_header(self.path)
        size = (self.path / TOKENS).stat().st_size if (self.path / TOKENS).is_file() else -1
        dtype = np.dtype(self.header["dtype"]).newbyteorder("<")
        if size != self.header["tokens"] * dtype.itemsize:
            raise fail(
                "R301", where=self.path / TOKENS, why="its size differs from what store.json says", fix="Prepare the data again"
            )
        self.tokens: npt.NDArray[np.unsignedinteger[Any]] = np.memmap(self.path / TOKENS, dtype, "r")

    def __len__(self) -> int:
        return int(self.header["tokens"])


def prepare(
    sources: Sequence[str | Path],
    tokenizer: TokenizerLike,
    out: str | Path,
    *,
    eos_id: int | None,
    text_field: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Tokenize `sources` into the store `out`; one made earlier from the very same input is used as it is.

    Every document is followed by `eos_id` (None: by nothing). `progress` gets (bytes read, bytes in all). Raises R301 for
    input that cannot be used, R302 when there is no text, R206 for a token outside the vocabulary; nothing is left behind.
    """
    paths, out = [Path(source) for source in sources], Path(out)
    for path in paths:
        kind_of(path)
    before = [signature(path) for path in paths]
    origin = {
        "sources": [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths],
        "tokenizer": tokenizer_hash(tokenizer),
        "eos_id": eos_id,
        "text_field": text_field,
    }
    found = existing_store(out)
    if found is not None and origin.items() <= found.header.items():
        return found
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65536 else "<u4")
    # Only a store may be replaced: `out` could be any folder of the user.
    with new_folder(out, overwrite=(out / HEADER).is_file()) as folder:
        count, documents, digest = 0, 0, hashlib.sha256()
        with (folder / TOKENS).open("wb") as file:
            for tokens, ended in encode_all(read_all(paths, text_field, progress), tokenizer, eos_id):
                data = np.asarray(tokens, dtype).tobytes()
                file.write(data)
                digest.update(data)
                count, documents = count + len(tokens), documents + ended
        if not count:
            raise fail("R302", where=", ".join(map(str, paths)) or out, why="there is no text", fix="Give files that hold text")
        if before != [signature(path) for path in paths]:
            raise fail("R301", where=out, why="a source changed while it was read", fix="Prepare the data again")
        header = {"schema": 1, "dtype": f"uint{dtype.itemsize * 8}", "tokens": count, "documents": documents}
        header |= {"vocab_size": tokenizer.vocab_size, "sha256": digest.hexdigest(), **origin}
        write_file(folder / HEADER, json.dumps(header, indent=2) + "\n")
    return TokenStore(out)


def read_all(paths: list[Path], text_field: str, progress: Callable[[int, int], None] | None) -> Iterator[tuple[str, bool]]:
    """(text, last) of the pieces of all documents of all files."""
    total, done = sum(path.stat().st_size for path in paths), 0
    for path in paths:
        start = done

        def report(position: int, start: int = start) -> None:
            if progress is not None:
                progress(start + position, total)

        yield from read_documents(path, text_field, report)
        done += path.stat().st_size


def encode_all(
    pieces: Iterator[tuple[str, bool]], tokenizer: TokenizerLike, eos_id: int | None
) -> Iterator[tuple[list[int], int]]:
    """(tokens, documents ended) of batches of pieces, with `eos_id` after each document."""
    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH:
            yield encode_batch(batch, tokenizer, eos_id)
            batch, size = [], 0
    yield encode_batch(batch, tokenizer, eos_id)


def encode_batch(batch: list[tuple[str, bool]], tokenizer: TokenizerLike, eos_id: int | None) -> tuple[list[int], int]:
    """(tokens, documents ended) of one batch. Raises R206 for a token outside the vocabulary."""
    texts = [text for text, _ in batch]
    many = getattr(tokenizer, "encode_batch", None)
    encoded = many(texts) if many is not None else [tokenizer.encode(text) for text in texts]
    tokens: list[int] = []
    for ids, (_, last) in zip(encoded, batch, strict=True):
        tokens.extend(ids)
        if last and eos_id is not None:
            tokens.append(eos_id)
    if tokens and not (0 <= min(tokens) and max(tokens) < tokenizer.vocab_size):
        why = f"it gives token {max(tokens)}, the vocabulary has {tokenizer.vocab_size}"
        raise fail("R206", where="tokenizer", why=why, fix="Use the tokenizer that belongs to the model")
    return tokens, sum(last for _, last in batch)


def tokenizer_hash(tokenizer: TokenizerLike) -> str:
    """sha256 of the tokenizer's file, or of its tokens of a probe text when it comes from no model folder."""
    path = getattr(tokenizer, "path", None)
    if isinstance(path, Path) and (path / "tokenizer.json").is_file():
        return sha256(path / "tokenizer.json")
    return hashlib.sha256(json.dumps([tokenizer.vocab_size, tokenizer.encode(PROBE)]).encode()).hexdigest()


def existing_store(folder: Path) -> TokenStore | None:
    """The store in `folder`; None when there is none, or a damaged one that must be made again."""
    try:
        return TokenStore(folder)
    except RadladsError:
        return None


def signature(path: Path) -> tuple[int, int, int]:
    """Size, time and identity of a file, to notice a change."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def read_header(folder: Path) -> dict[str, Any]:
    """Checked `store.json` of a store. Raises R301."""
    path = folder / HEADER
    try:
        header: dict[str, Any] = json.loads(path.read_bytes())
        usable = (
            header["schema"] == 1
            and header["dtype"] in ("uint16", "uint32")
            and type(header["tokens"]) is int
            and header["tokens"] > 0
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        usable = False
    if not usable:
        raise fail("R301", where=path, why="it is no record of a token store", fix="Prepare the data again")
    return header
