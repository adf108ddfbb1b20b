"""Documents out of text, JSON-lines and Parquet files, read as a stream in bounded memory.

Text and JSON lines may be packed with xz, gzip or zstd. A document is a text, or the messages of a conversation.
"""

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from radlads.errors import RadladsError, fail

MARKER = "<|endoftext|>"
MAX_LINE = 16 << 20
PIECE = 1 << 20
KINDS = (".txt", ".jsonl", ".parquet")
# Where a row keeps its document, unless the user says so.
FIELDS = ("text", "messages", "conversations")
# ShareGPT's names of the roles, beside the usual ones.
ROLES = {"human": "user", "gpt": "assistant"}
ROWS_AT_ONCE = 256

Message = dict[str, str]
Content = Any  # str, list[Message], or an array of tokens


class Piece(NamedTuple):
    """A document or a piece of a long text; `last` marks the end of the document, `where` its place for messages."""

    content: Content
    last: bool
    where: str


def zstd(raw: IO[bytes]) -> IO[bytes]:
    """A reader of zstd, which pyarrow brings."""
    try:
        import pyarrow
    except ImportError:
        raise fail("R104", where=".zst", why="pyarrow is not installed", fix="Run `pip install 'radlads[data]'`") from None
    return io.BufferedReader(cast(io.RawIOBase, pyarrow.CompressedInputStream(raw, "zstd")))


OPENERS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".xz": lambda raw: cast(IO[bytes], lzma.LZMAFile(raw)),
    ".gz": lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw)),
    ".zst": zstd,
}


def kind_of(path: Path) -> str:
    """Kind of a file, one of KINDS, by its name without .xz, .gz or .zst. Raises R301 for anything else."""
    if not path.exists():
        raise bad(path, "there is no such file", "Check the path")
    kind = Path(path.stem).suffix if path.suffix in OPENERS else path.suffix
    if kind not in KINDS:
        raise bad(path, f"a name ending in {kind!r} is not known", "Use .txt or .jsonl, also with .xz, .gz or .zst, or .parquet")
    if not path.is_file():
        raise bad(path, "it is no regular file", "Check the path")
    return kind


def read_documents(path: Path, field: str | None, progress: Callable[[int], None]) -> Iterator[Piece]:
    """The pieces of every document of a file.

    A long text comes in pieces of about a million characters, cut at the start of a line. `progress` gets the bytes of
    the file read so far. Raises R301, naming file and line, for a line that cannot be used.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        yield from read_parquet(path, field, progress)
    elif kind == ".jsonl":
        for number, line in read_lines(path, progress):
            if line.strip():
                yield from document_of(parse_line(line, f"{path}:{number}"), field, f"{path}:{number}")
    else:
        yield from split_text(str(path), (line for _, line in read_lines(path, progress)))


def split_text(where: str, lines: Iterator[str]) -> Iterator[Piece]:
    """The documents in the lines of a text file, which MARKER separates."""
    pieces: list[str] = []
    size = 0
    begun = False
    for line in lines:
        *ended, rest = line.split(MARKER)
        for text in ended:
            document = "".join([*pieces, text]).rstrip("\n")
            if document or begun:
                yield Piece(document, True, where)
            pieces, size, begun = [], 0, False
        if ended:
            rest = rest.removeprefix("\n")
        # A piece must not end inside what a tokenizer takes as one unit: white space belongs to the text before it.
        if size > PIECE and (line[:1].strip() or size > MAX_LINE):
            yield Piece("".join(pieces), False, where)
            pieces, size, begun = [], 0, True
        if rest:
            pieces.append(rest)
            size += len(rest)
    document = "".join(pieces).rstrip("\n")
    if document or begun:
        yield Piece(document, True, where)


def parse_line(line: str, where: str) -> Any:
    """The value of one JSON line. Raises R301."""
    try:
        return json.loads(line)
    except RecursionError:
        raise bad(where, "the JSON is nested too deeply", "Correct the line") from None
    except ValueError as error:
        raise bad(where, f"it is not JSON ({getattr(error, 'msg', error)})", "Correct the line") from None


def document_of(row: Any, field: str | None, where: str) -> Iterator[Piece]:
    """The document of one row, none where it is empty; the field holds a text or a list of messages. Raises R301."""
    names = FIELDS if field is None else (field,)
    name = next((name for name in names if isinstance(row, dict) and name in row), None)
    if name is None:
        raise bad(where, f"it has no field {names[0]!r}", "Name the field (text_field in a recipe, --text-field)")
    value = row[name]
    if isinstance(value, list):
        yield Piece(messages_of(value, where), True, where)
    elif not isinstance(value, str):
        raise bad(where, f"the field {name!r} is {type(value).__name__}, not text or messages", "Correct the line")
    elif value:
        yield Piece(checked(value, where), True, where)


def messages_of(values: list[Any], where: str) -> list[Message]:
    """Messages as {"role", "content"}, also out of ShareGPT's {"from", "value"}. Raises R301."""
    messages = []
    for number, value in enumerate(values, 1):
        found = value if isinstance(value, dict) else {}
        role, content = found.get("role", found.get("from")), found.get("content", found.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise bad(where, f"message {number} has no role or no text", "Give role and content of every message")
        messages.append({"role": ROLES.get(role, role), "content": checked(content, where)})
    if not any(message["role"] == "assistant" for message in messages):
        raise bad(where, "the conversation has no message of the assistant", "Remove it: there is nothing to learn from it")
    return messages


def checked(text: str, where: str) -> str:
    """A text that UTF-8 can hold. Raises R301."""
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise bad(where, "the text holds half a surrogate pair", "Correct the line")
    return text


def read_parquet(path: Path, field: str | None, progress: Callable[[int], None]) -> Iterator[Piece]:
    """The documents in the rows of a Parquet file. Raises R301, R104."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise fail("R104", where=path, why="pyarrow is not installed", fix="Run `pip install 'radlads[data]'`") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = FIELDS if field is None else (field,)
            column = next((name for name in names if name in file.schema_arrow.names), None)
            if column is None:
                why = f"it has no column {names[0]!r}, only {', '.join(file.schema_arrow.names)}"
                raise bad(path, why, "Name the column (text_field in a recipe, --text-field)")
            total, size, number = max(1, file.metadata.num_rows), path.stat().st_size, 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from document_of({column: value}, column, f"{path}: row {number}")
                progress(size * number // total)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise bad(path, f"it is no readable Parquet file ({str(error).splitlines()[0]})", "Get the file again") from None


def read_lines(path: Path, progress: Callable[[int], None]) -> Iterator[tuple[int, str]]:
    """(number, line) of a UTF-8 file, without its byte order mark, with CRLF read as LF. Raises R301."""
    number = 0
    try:
        with path.open("rb") as raw:
            stream = OPENERS[path.suffix](raw) if path.suffix in OPENERS else raw
            while data := stream.readline(MAX_LINE + 1):
                number += 1
                yield number, decode(data, number, f"{path}:{number}")
                progress(raw.tell())
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise bad(f"{path}:{number + 1}", f"the packed file is damaged ({error})", "Get the file again") from None
    except OSError as error:
        if path.suffix == ".zst":  # pyarrow has no error of its own for this
            raise bad(f"{path}:{number + 1}", f"the packed file is damaged ({error})", "Get the file again") from None
        raise bad(path, str(error.strerror or error), "Check the file and its permissions") from None


def decode(data: bytes, number: int, where: str) -> str:
    """Text of one line. Raises R301 when it is too long or not UTF-8."""
    if len(data) > MAX_LINE:
        raise bad(where, f"the line is longer than {MAX_LINE >> 20} MB", "Split the text into lines or documents")
    if number == 1:
        data = data.removeprefix(b"\xef\xbb\xbf")
    if data.endswith(b"\r\n"):
        data = data[:-2] + b"\n"
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise bad(where, f"byte {error.start + 1} of the line is not UTF-8", "Save the file as UTF-8") from None


def bad(where: Any, why: str, fix: str) -> RadladsError:
    """R301 at a file or line."""
    return fail("R301", where=where, why=why, fix=fix)
