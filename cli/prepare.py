"""`radlads prepare`: tokens for training, from text and JSONL files or from text that a model writes."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from radlads.cli.options import arg, opt
from radlads.cli.render import Table, progress, size
from radlads.errors import fail

if TYPE_CHECKING:
    from radlads.folder import ModelFolder
    from radlads.tokenizer import Tokenizer

SAMPLED = "sampled.txt"
STORE = "store"


@dataclass(kw_only=True)
class PrepareOptions:
    """Where the text comes from, and where the tokens go."""

    sources: list[str] = arg("Files: .txt or .jsonl, also with .xz or .gz.", metavar="FILE", default=[])
    tokenizer: str | None = opt(None, "Model folder whose tokenizer is used.", metavar="DIR")
    output_dir: str = opt(MISSING, "Folder to write.", metavar="DIR")
    text_field: str = opt("text", "Field of a JSONL line that holds the text.")
    sample_from: str | None = opt(None, "Model folder that writes the text.", panel="Sampled text", metavar="MODEL")
    tokens: int = opt(1_000_000, "Tokens to sample.", panel="Sampled text")
    seq_len: int = opt(512, "Tokens of one sampled text.", panel="Sampled text")
    batch_size: int = opt(64, "Texts written at once.", panel="Sampled text")
    temp: float = opt(1.0, "Temperature; 1 samples from the model's own distribution.", panel="Sampled text")
    prompt: str | None = opt(None, "How each text begins; without it, as a new document.", panel="Sampled text", metavar="TEXT")
    seed: int = opt(0, "Seed of the random numbers.", panel="Sampled text")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class PrepareResult:
    """The store that was written; `text` is the sampled text, if any."""

    store: str
    text: str | None
    tokens: int
    documents: int
    bytes: int

    def blocks(self) -> list[Table | str]:
        """What was made, and how to train on it."""
        rows = [("store", self.store), *([("text", self.text)] if self.text else [])]
        rows += [("tokens", f"{self.tokens:,}"), ("documents", f"{self.documents:,}"), ("size", size(self.bytes))]
        hint = f"Next: `radlads train --set data.train=[{self.text}]`" if self.text else ""
        return [Table(("", ""), rows), *([hint] if hint else [])]


def prepare(options: PrepareOptions) -> PrepareResult:
    """Tokenise files, or sample text and tokenise it; R1xx, R2xx, R3xx or R4xx, and then nothing is left behind."""
    from radlads.data.store import prepare as prepare_store
    from radlads.tokenizer import Tokenizer

    if bool(options.sources) == bool(options.sample_from):
        why = "give either files or --sample-from" if options.sources else "there is nothing to tokenise"
        raise fail("R101", where="radlads prepare", why=why, fix="Name text files, or a model with --sample-from")
    if options.sample_from is not None:
        return _from_model(options)
    if options.tokenizer is None:
        raise fail("R101", where="--tokenizer", why="it is missing", fix="Name the folder of the model to train with")
    tokenizer = Tokenizer(options.tokenizer)
    out, field = options.output_dir, options.text_field
    with progress("tokenising") as report:
        store = prepare_store(options.sources, tokenizer, out, eos_id=tokenizer.eos_id, text_field=field, progress=report)
    return _result(store.path, store.header, None)


def _from_model(options: PrepareOptions) -> PrepareResult:
    from radlads.backends import choose_backend
    from radlads.data.store import prepare as prepare_store
    from radlads.files import new_folder
    from radlads.folder import open_folder
    from radlads.tokenizer import Tokenizer

    choose_backend("torch")
    for flag, value in (("--tokens", options.tokens), ("--seq-len", options.seq_len), ("--batch-size", options.batch_size)):
        if value < 1:
            raise fail("R101", where=flag, why=f"{value} is not above 0", fix="Give a number above 0")
    if not 0 <= options.temp <= 100:
        raise fail("R101", where="--temp", why=f"{options.temp} is out of range", fix="Give a number from 0 to 100")
    model = open_folder(str(options.sample_from))
    tokenizer = Tokenizer(options.tokenizer or model.path, vocab_size=model.spec.V)
    final = Path(options.output_dir)
    with new_folder(final) as folder:
        with (folder / SAMPLED).open("w", encoding="utf-8") as file:
            for text in _documents(model, tokenizer, options):
                file.write(text)
        with progress("tokenising") as report:
            store = prepare_store([folder / SAMPLED], tokenizer, folder / STORE, eos_id=tokenizer.eos_id, progress=report)
        header = store.header
    return _result(final / STORE, header, final / SAMPLED)


def _documents(model: "ModelFolder", tokenizer: "Tokenizer", options: PrepareOptions) -> Iterator[str]:
    """The sampled texts, each document followed by the marker that `data.documents` knows."""
    from radlads.backends.torch.sample import sample_texts
    from radlads.data.documents import MARKER

    prompt_ids = tokenizer.encode(options.prompt, add_special=True) if options.prompt else _beginning(tokenizer)
    begin = options.prompt or ""
    with progress("sampling") as report:
        rows = sample_texts(
            model,
            tokens=options.tokens,
            seed=options.seed,
            temp=options.temp,
            seq_len=min(options.seq_len, options.tokens),
            batch_size=min(options.batch_size, -(-options.tokens // options.seq_len)),
            prompt_ids=prompt_ids,
            progress=report,
        )
        for row in rows:
            for number, ids in enumerate(_split(row, tokenizer.eos_ids)):
                text = tokenizer.decode(ids)
                text = begin + text if number == 0 else text
                if text.strip():
                    yield f"{text}{MARKER}\n"


def _beginning(tokenizer: "Tokenizer") -> list[int]:
    """The ids after which a new document begins."""
    begin = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if begin is None:
        raise fail("R101", where="--prompt", why="the tokenizer has no token that begins a text", fix="Give a prompt")
    return [begin]


def _split(row: list[int], eos_ids: frozenset[int]) -> Iterator[list[int]]:
    piece: list[int] = []
    for token in row:
        if token in eos_ids:
            yield piece
            piece = []
        else:
            piece.append(token)
    yield piece


def _result(store: Path, header: dict[str, object], text: Path | None) -> PrepareResult:
    size_of = sum(file.stat().st_size for file in store.iterdir())
    tokens, documents = header["tokens"], header["documents"]
    return PrepareResult(str(store), str(text) if text else None, int(str(tokens)), int(str(documents)), size_of)
