"""Examples out of mlx-lm's data folders: train, valid and test, each a file of texts, completions or conversations.

A line is {"text"}, {"prompt", "completion"} or {"messages"}; a token store of `radlads prepare` does as well. Batches hold
examples of like length, in an order that depends on seed and place alone, so that a run can be taken up anywhere.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from radlads.data.chat import Segment, documents_of
from radlads.data.documents import OPENERS, Piece, bad, checked, document_of, kind_of, parse_line, read_documents, read_lines
from radlads.errors import fail
from radlads.tokenizer import Tokenizer

SPLITS = ("train", "valid", "test")
KINDS = (".jsonl", ".txt", ".parquet")
PAD_TO = 32

Ints = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
Report = Callable[[int, int | None], None]


class Example(NamedTuple):
    """Tokens (T,), at least two, and which of them are to be predicted (T,)."""

    tokens: Ints
    counted: Flags


class Batch(NamedTuple):
    """inputs (B, T), the next tokens (B, T), and which of those count (B, T); what fills a row counts nowhere."""

    inputs: Ints
    targets: Ints
    counted: Flags


@dataclass
class Examples:
    """The examples of one split, and what was done to those longer than the limit."""

    items: list[Example]
    cut: int = 0  # texts that became several examples
    truncated: int = 0  # conversations that lost their end


def find_split(folder: Path, split: str) -> Path | None:
    """The file or token store of a split; a folder that is none itself holds one for each. None where there is none."""
    if folder.is_file() or (folder / "store.json").is_file():
        return folder if split == "train" else None
    names = [split, *(f"{split}{kind}{packed}" for kind in KINDS for packed in ("", *OPENERS))]
    found = [folder / name for name in names if (folder / name).exists()]
    if len(found) > 1:
        why = f"{found[0].name} and {found[1].name} are both there"
        raise bad(folder, why, "Keep one of them")
    return found[0] if found else None


def check_data(data: str) -> Path:
    """The folder or file of the data. Raises R301 when it is not there or holds nothing of what is looked for."""
    path = Path(data)
    if not path.exists():
        fix = "Give a folder with train.jsonl; `radlads prepare` makes a token store of any data set"
        raise bad(path, "there is no such folder", fix)
    if not any(find_split(path, split) for split in SPLITS):
        raise bad(path, "it holds no train.jsonl, valid.jsonl or test.jsonl", "Name the files so, or give one file")
    return path


def load_examples(path: Path, tokenizer: Tokenizer, limit: int, *, mask_prompt: bool, report: Report | None = None) -> Examples:
    """The examples of a split, none longer than `limit` tokens; texts are cut into pieces, conversations at their end.

    With `mask_prompt` only the assistant's turns, or the completions, are to be predicted. Raises R301, naming file and
    line, for what cannot be used, R302 when nothing is left.
    """
    found = Examples([])
    documents = stored_documents(path, tokenizer) if path.is_dir() else file_documents(path, tokenizer, mask_prompt, report)
    for tokens, counted, is_text in documents:
        if len(tokens) > limit:
            found.cut += is_text
            found.truncated += not is_text
        # The last token of a piece begins the next one, so that every token is predicted once.
        starts = range(0, max(1, len(tokens) - 1), limit - 1) if is_text else range(1)
        for start in starts:
            piece = Example(tokens[start : start + limit], counted[start : start + limit])
            if piece.counted[1:].any():
                found.items.append(piece)
    if not found.items:
        raise fail("R302", where=path, why="it holds no example with a token to predict", fix="Add text")
    return found


def stored_documents(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[Ints, Flags, bool]]:
    """The documents of a token store. Raises R206 when it was made with another tokenizer."""
    from radlads.data.corpus import open_store

    store = open_store(path, tokenizer)
    starts = [*map(int, store.document_starts()), len(store)]
    for start, end in pairwise(starts):
        tokens, counted = store.read(start, end)
        yield tokens.astype(np.int32), np.ones(len(tokens), bool) if counted is None else counted, counted is None


def file_documents(
    path: Path, tokenizer: Tokenizer, mask_prompt: bool, report: Report | None
) -> Iterator[tuple[Ints, Flags, bool]]:
    """(tokens, counted, whether it is plain text) of every document of a file."""
    size = path.stat().st_size
    text: list[str] = []
    for piece in pieces(path, lambda done: report(done, size) if report else None):
        if isinstance(piece.content, str):
            text.append(piece.content)
            if piece.last:
                if mask_prompt:
                    why = "it is plain text, which has no prompt to mask"
                    raise bad(piece.where, why, "Leave out --mask-prompt, or give prompts and completions")
                yield (*encoded([Segment("".join(text), True)], tokenizer, add_special=True, ends=True), True)
                text = []
            continue
        for segments, ends in conversation(piece, tokenizer):
            known = segments if mask_prompt else [Segment(part.text, True) for part in segments]
            yield (*encoded(known, tokenizer, add_special=ends, ends=ends), False)


def pieces(path: Path, progress: Callable[[int], None]) -> Iterator[Piece]:
    """The documents of a file; {"prompt", "completion"} comes as two messages under the roles of a conversation."""
    if kind_of(path) != ".jsonl":
        yield from read_documents(path, None, progress)
        return
    for number, line in read_lines(path, progress):
        where = f"{path}:{number}"
        row = parse_line(line, where) if line.strip() else None
        if row is None:
            continue
        if isinstance(row, dict) and "tools" in row:
            raise bad(where, "it has tools, which are not supported", "Write what they add into the messages")
        if isinstance(row, dict) and "prompt" in row and "completion" in row:
            yield completion(row, where)
        else:
            yield from document_of(row, None, where)


def completion(row: dict[str, Any], where: str) -> Piece:
    """A prompt and its completion as a conversation. Raises R301 unless both are texts."""
    said = [row["prompt"], row["completion"]]
    if not all(isinstance(text, str) for text in said):
        raise bad(where, "prompt or completion is no text", "Correct the line")
    roles = ("user", "assistant")
    return Piece([{"role": role, "content": checked(text, where)} for role, text in zip(roles, said, strict=True)], True, where)


def conversation(piece: Piece, tokenizer: Tokenizer) -> Iterator[tuple[list[Segment], bool]]:
    """The segments of a conversation, and whether an end of text is to follow: only without a template, for two messages."""
    messages = piece.content
    if tokenizer.has_chat_template:
        for segments in documents_of(messages, tokenizer.chat, piece.where):
            yield segments, False
    elif len(messages) == 2:
        yield [Segment(messages[0]["content"], False), Segment(messages[1]["content"], True)], True
    else:
        raise bad(piece.where, "it is a conversation, and the model has no chat template", "Give texts, or prompt and completion")


def encoded(segments: Sequence[Segment], tokenizer: Tokenizer, *, add_special: bool, ends: bool) -> tuple[Ints, Flags]:
    """Tokens of the segments and which of them count; `add_special` and `ends` put begin and end of text around them."""
    tokens: list[int] = []
    counted: list[bool] = []
    for number, segment in enumerate(segments):
        ids = tokenizer.encode(segment.text, add_special=add_special and number == 0)
        tokens += ids
        counted += [segment.counted] * len(ids)
    if ends and tokenizer.eos_id is not None and tokens[-1:] != [tokenizer.eos_id]:
        tokens.append(tokenizer.eos_id)
        counted.append(True)
    return np.array(tokens, np.int32), np.array(counted, bool)


class Batches:
    """Batches of `size` examples of like length; which one comes at a place depends on seed and place alone.

    To measure with, `whole` keeps the last, smaller batch as well. Raises R302 when there are fewer examples than one batch
    to train on holds.
    """

    def __init__(self, examples: Sequence[Example], size: int, seed: int, where: object, whole: bool = False) -> None:
        if len(examples) < size and not whole:
            why = f"it has {len(examples)} examples, fewer than a batch of {size}"
            raise fail("R302", where=where, why=why, fix="Add examples or lower --batch-size")
        self.examples, self.seed = examples, seed
        order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
        end = len(order) if whole else len(order) - size + 1
        self.rows = [order[first : first + size] for first in range(0, end, size)]

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, place: int) -> Batch:
        """The batch at a place of the run; every pass over the data has an order of its own."""
        epoch, number = divmod(place, len(self))
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self))
        return collated([self.examples[row] for row in self.rows[order[number]]])

    def spread(self, count: int) -> Iterator[Batch]:
        """`count` batches from the shortest to the longest, always the same; -1 stands for all."""
        count = len(self) if count == -1 else min(count, len(self))
        for place in np.linspace(0, len(self) - 1, count).round().astype(int):
            yield collated([self.examples[row] for row in self.rows[place]])


def collated(examples: Sequence[Example]) -> Batch:
    """Examples as one batch, filled up to a multiple of 32 tokens: fewer shapes to compile for."""
    longest = max(len(example.tokens) for example in examples) - 1
    width = longest + -longest % PAD_TO
    tokens = np.zeros((len(examples), width + 1), np.int32)
    counted = np.zeros((len(examples), width + 1), bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        counted[row, : len(example.tokens)] = example.counted
    return Batch(tokens[:, :-1], tokens[:, 1:], counted[:, 1:])
