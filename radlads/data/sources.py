"""Where documents come from: files, folders of files, token files, and Hugging Face datasets."""

import glob
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from radlads.data.binidx import read_binidx
from radlads.data.documents import Piece, bad, document_of, kind_of, read_documents
from radlads.errors import RadladsError, fail
from radlads.files import sha256

HUB = "hf:"
INDEX = ".idx"
# Files that datasets' save_to_disk leaves.
SAVED = ("dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """A file, a pattern such as "books/*.jsonl", a folder of such files, a saved dataset, or "hf:owner/name".

    `field` names the field of a row that holds the text or the messages; without it text, messages or conversations.
    `skip` passes over the first documents, `take` bounds how many are read. The rest is for datasets: subset, split,
    revision, and whether to stream instead of downloading first.
    """

    path: str
    field: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    skip: int = 0
    take: int | None = None

    def files(self) -> list[Path]:
        """The files of the source in order, none for a dataset. Raises R301 for one that is missing or unknown."""
        if self.is_dataset:
            return []
        path = Path(self.path)
        if path.is_dir():
            found = sorted(item for item in path.rglob("*") if item.is_file() and is_known(item))
        elif not path.exists() and any(sign in self.path for sign in "*?["):
            found = [Path(name) for name in sorted(glob.glob(self.path, recursive=True))]
        else:
            found = [path]
        if not found:
            raise bad(self.path, "it holds no file to read", "Name text, JSONL, Parquet or .idx files")
        for item in found:
            if item.suffix != INDEX:
                kind_of(item)
        return found

    @property
    def is_dataset(self) -> bool:
        """Whether the datasets library reads it."""
        return self.path.startswith(HUB) or any((Path(self.path) / name).is_file() for name in SAVED)

    def size(self) -> int | None:
        """Bytes that reading passes through; None where it is not known before."""
        if self.is_dataset:
            return None
        return sum(payload(item).stat().st_size if payload(item).exists() else 0 for item in self.files())

    def origin(self) -> list[dict[str, Any]]:
        """What the tokens are made from, for the record: files with their hashes, or a dataset with its revision."""
        if self.is_dataset:
            return [{"name": self.path, **{key: value for key, value in asdict(self).items() if key not in ("path", "field")}}]
        paths = [item for file in self.files() for item in dict.fromkeys((file, payload(file))) if item.exists()]
        return [{"name": item.name, "bytes": item.stat().st_size, "sha256": sha256(item)} for item in paths]

    def read(self, progress: Callable[[int], None]) -> Iterator[Piece]:
        """The chosen documents; `progress` gets the bytes read so far, or for a dataset the rows. Raises R301."""
        number = 0
        end = None if self.take is None else self.skip + self.take
        for piece in self.read_all(progress):
            if end is not None and number >= end:
                return
            if number >= self.skip:
                yield piece
            number += piece.last

    def read_all(self, progress: Callable[[int], None]) -> Iterator[Piece]:
        """All documents."""
        if self.is_dataset:
            yield from self.rows(progress)
            return
        before = 0
        for item in self.files():

            def report(position: int, before: int = before) -> None:
                progress(before + position)

            yield from read_binidx(item, report) if item.suffix == INDEX else read_documents(item, self.field, report)
            before += payload(item).stat().st_size

    def rows(self, progress: Callable[[int], None]) -> Iterator[Piece]:
        """The documents of a dataset. Raises R301, R104."""
        rows, number = iter(self.dataset()), 0
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # as above
                raise bad(f"{self.path}: row {number + 1}", f"it cannot be read ({one_line(error)})", "Try again") from None
            number += 1
            yield from document_of(row, self.field, f"{self.path}: row {number}")
            progress(number)

    def dataset(self) -> Any:
        """The opened split. Raises R104 without the datasets library, R301 when it cannot be opened."""
        try:
            import datasets
        except ImportError:
            raise fail(
                "R104", where=self.path, why="datasets is not installed", fix="Run `pip install 'radlads[data]'`"
            ) from None
        datasets.disable_progress_bars()
        try:
            if self.path.startswith(HUB):
                name = self.path.removeprefix(HUB)
                return datasets.load_dataset(
                    name, self.subset, split=self.split, revision=self.revision, streaming=self.streaming
                )
            found = datasets.load_from_disk(self.path)
            return found[self.split] if isinstance(found, dict) else found
        except Exception as error:  # the library and the network fail in every way Python can
            why = f"the dataset cannot be opened ({one_line(error)})"
            raise bad(self.path, why, "Check name, subset, split and connection") from None


def one_line(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def payload(path: Path) -> Path:
    """The file whose bytes are read: for an index its .bin."""
    return path.with_suffix(".bin") if path.suffix == INDEX else path


def is_known(path: Path) -> bool:
    """Whether a file in a folder is one to read."""
    if path.suffix == INDEX:
        return True
    try:
        return bool(kind_of(path))
    except RadladsError:
        return False
