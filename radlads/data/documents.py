"""Documents out of text and JSON-lines files, plain or packed with xz or gzip, read as a stream in bounded memory."""

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from radlads.errors import RadladsError, fail

MARKER = "<|endoftext|>"
MAX_LINE = 16 << 20
PIECE = 1 << 20
KINDS = (".txt", ".jsonl")
OPENERS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".xz": lambda raw: cast(IO[bytes], lzma.LZMAFile(raw)),
    ".gz": lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw)),
}


def kind_of(path: Path) -> str:
    """Kind of a file, ".txt" or ".jsonl", by its name without .xz or .gz. Raises R301 for anything else."""
    kind = Path(path.stem).suffix if path.suffix in OPENERS else path.suffix
    if kind not in KINDS:
        raise bad(path, f"a name ending in {kind!r} is not known", "Use .txt or .jsonl, also with .xz or .gz")
    if not path.is_file():
        raise bad(path, "there is no such file" if not path.exists() else "it is no regular file", "Check the path")
    return kind


def read_documents(path: Path, text_field: str, progress: Callable[[int], None]) -> Iterator[tuple[str, bool]]:
    """(text, last) of every piece of every document; `last` marks the end of a document.

    A long document comes in pieces of about a million characters, cut at the start of a line. `progress` gets the bytes of
    the file read so far. Raises R301, naming file and line, for a line that cannot be used.
    """
    kind = kind_of(path)
    lines = read_lines(path, progress)
    if kind == ".jsonl":
        for number, line in lines:
            text = text_of(line, text_field, f"{path}:{number}") if line.strip() else ""
            if text:
                yield text, True
    else:
        yield from split_text(line for _, line in lines)


def split_text(lines: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """(text, last) of the documents in the lines of a text file, which MARKER separates."""
    pieces: list[str] = []
    size = 0
    begun = False
    for line in lines:
        *ended, rest = line.split(MARKER)
        for text in ended:
            document = "".join([*pieces, text]).rstrip("\n")
            if document or begun:
                yield document, True
            pieces, size, begun = [], 0, False
        if ended:
            rest = rest.removeprefix("\n")
        # A piece must not end inside what a tokenizer takes as one unit: white space belongs to the text before it.
        if size > PIECE and (line[:1].strip() or size > MAX_LINE):
            yield "".join(pieces), False
            pieces, size, begun = [], 0, True
        if rest:
            pieces.append(rest)
            size += len(rest)
    document = "".join(pieces).rstrip("\n")
    if document or begun:
        yield document, True


def text_of(line: str, text_field: str, where: str) -> str:
    """The text in one JSON line. Raises R301."""
    try:
        record = json.loads(line)
    except RecursionError:
        raise bad(where, "the JSON is nested too deeply", "Correct the line") from None
    except ValueError as error:
        raise bad(where, f"it is not JSON ({getattr(error, 'msg', error)})", "Correct the line") from None
    if not isinstance(record, dict) or text_field not in record:
        raise bad(where, f"it has no field {text_field!r}", "Name the field with `--set data.text_field=...`")
    text = record[text_field]
    if not isinstance(text, str):
        raise bad(where, f"the field {text_field!r} is {type(text).__name__}, not text", "Correct the line")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise bad(where, "the text holds half a surrogate pair", "Correct the line")
    return text


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
