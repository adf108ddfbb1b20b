"""`radlads prepare`: tokens for training, from files and datasets or from text that a model writes."""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from radlads.cli.options import arg, opt
from radlads.cli.render import Table, progress, size
from radlads.errors import fail

if TYPE_CHECKING:
    from radlads.data.store import TokenStore
    from radlads.folder import ModelFolder
    from radlads.tokenizer import Tokenizer

STORE = "store"
DATASETS = "Hugging Face datasets"


@dataclass(kw_only=True)
class PrepareOptions:
    """Where the text comes from, and where the tokens go."""

    sources: list[str] = arg(
        "Files (.txt, .jsonl, also packed with xz, gzip or zstd; .parquet; .idx of RWKV and Megatron), folders of them, "
        "patterns, saved datasets, or hf:owner/name.",
        metavar="SOURCE",
        default=[],
    )
    tokenizer: str | None = opt(None, "Model folder whose tokenizer is used.", metavar="DIR")
    output_dir: str = opt(MISSING, "Folder to write.", metavar="DIR")
    text_field: str | None = opt(
        None, "Field of a row that holds its text or its messages; without it text, messages or conversations.", metavar="NAME"
    )
    skip: int = opt(0, "Documents of each source to pass over.")
    take: int | None = opt(None, "Documents of each source to read at most.")
    num_proc: int | None = opt(None, "Processes that tokenise; without it one for each processor, for large input.")
    subset: str | None = opt(None, "Subset (configuration) of a dataset.", panel=DATASETS, metavar="NAME")
    split: str = opt("train", "Split of a dataset.", panel=DATASETS)
    revision: str | None = opt(None, "Commit, tag or branch of a dataset.", panel=DATASETS, metavar="REV")
    streaming: bool = opt(False, "Read a dataset as it comes, without a copy on disk.", "--streaming", panel=DATASETS)
    sample_from: str | None = opt(None, "Model folder that writes the text.", panel="Sampled text", metavar="MODEL")
    chat: bool = opt(
        False, "Sample conversations: the model writes both sides, by its chat template.", "--chat", panel="Sampled text"
    )
    tokens: int = opt(1_000_000, "Tokens to sample.", panel="Sampled text")
    seq_len: int = opt(512, "Tokens of one sampled text.", panel="Sampled text")
    batch_size: int = opt(64, "Texts written at once.", panel="Sampled text")
    temp: float = opt(1.0, "Temperature; 1 samples from the model's own distribution.", panel="Sampled text")
    prompt: str | None = opt(None, "How each text begins; without it, as a new document.", panel="Sampled text", metavar="TEXT")
    seed: int = opt(0, "Seed of the random numbers.", panel="Sampled text")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class PrepareResult:
    """The store that was written; `text` is the sampled text, if any. `counted` tokens are learnt, the rest is context."""

    store: str
    text: str | None
    tokens: int
    counted: int
    documents: int
    shards: int
    bytes: int
    sha256: str

    def blocks(self) -> list[Table | str]:
        """What was made, and how to train on it."""
        rows = [("store", self.store), *([("text", self.text)] if self.text else [])]
        rows += [("tokens", f"{self.tokens:,}"), ("documents", f"{self.documents:,}")]
        rows += [("learnt", f"{self.counted:,} tokens of the assistant")] if self.counted < self.tokens else []
        rows += [("shards", f"{self.shards}"), ("size", size(self.bytes))]
        return [Table(("", ""), rows), f"Next: `radlads train --set data.train=[{self.store}]`"]


def prepare(options: PrepareOptions) -> PrepareResult:
    """Tokenise sources, or sample text and tokenise it; R1xx, R2xx, R3xx or R4xx for what cannot be used."""
    if bool(options.sources) == bool(options.sample_from):
        why = "give either files or --sample-from" if options.sources else "there is nothing to tokenise"
        raise fail("R101", where="radlads prepare", why=why, fix="Name text files, or a model with --sample-from")
    if options.sample_from is not None:
        return _from_model(options)
    if options.tokenizer is None:
        raise fail("R101", where="--tokenizer", why="it is missing", fix="Name the folder of the model to train with")
    from radlads.data.prepare import prepare as prepare_store
    from radlads.data.sources import Source
    from radlads.tokenizer import Tokenizer

    if options.skip < 0 or (options.take is not None and options.take < 1):
        why = f"{options.skip} and {options.take} choose no documents"
        raise fail("R101", where="--skip, --take", why=why, fix="Give numbers of documents")
    tokenizer = Tokenizer(options.tokenizer)
    rest = (options.subset, options.split, options.revision, options.streaming, options.skip, options.take)
    sources = [Source(name, options.text_field, *rest) for name in options.sources]
    out, processes = options.output_dir, options.num_proc
    with progress("tokenising") as report:
        store = prepare_store(sources, tokenizer, out, eos_id=tokenizer.eos_id, processes=processes, progress=report)
    return _result(store, store.path, None)


def _from_model(options: PrepareOptions) -> PrepareResult:
    from radlads.backends import choose_backend
    from radlads.data.prepare import prepare as prepare_store
    from radlads.data.store import TokenStore
    from radlads.files import new_folder
    from radlads.folder import open_folder
    from radlads.tokenizer import Tokenizer

    choose_backend("torch")
    for flag, value in (("--tokens", options.tokens), ("--seq-len", options.seq_len), ("--batch-size", options.batch_size)):
        if value < 1:
            raise fail("R101", where=flag, why=f"{value} is not above 0", fix="Give a number above 0")
    if not 0 <= options.temp <= 100:
        raise fail("R101", where="--temp", why=f"{options.temp} is out of range", fix="Give a number from 0 to 100")
    if options.chat and options.prompt is not None:
        raise fail("R101", where="--chat", why="it cannot be combined with --prompt", fix="Leave one of them out")
    model = open_folder(str(options.sample_from))
    tokenizer = Tokenizer(options.tokenizer or model.path, vocab_size=model.spec.V)
    final, name = Path(options.output_dir), "sampled.jsonl" if options.chat else "sampled.txt"
    with new_folder(final) as folder:
        with (folder / name).open("w", encoding="utf-8") as file:
            for text in (_conversations if options.chat else _documents)(model, tokenizer, options):
                file.write(text)
        with progress("tokenising") as report:
            prepare_store([folder / name], tokenizer, folder / STORE, eos_id=tokenizer.eos_id, progress=report)
    return _result(TokenStore(final / STORE), final / STORE, final / name)


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


def _conversations(model: "ModelFolder", tokenizer: "Tokenizer", options: PrepareOptions) -> Iterator[str]:
    """The sampled conversations as lines of JSON; an unfinished turn and what is empty are left out."""
    import json

    from radlads.backends.torch.sample import Turns, sample_conversations
    from radlads.data.chat import script_of

    script = script_of(tokenizer.chat, model.path)
    opening, answer, again = map(tokenizer.encode, script)
    turns = Turns(opening, answer, again, tokenizer.eos_ids)
    if len(turns.opening) + len(turns.answer) + 2 > options.seq_len:
        why = f"{options.seq_len} tokens hold no conversation: the template alone takes {len(turns.opening) + len(turns.answer)}"
        raise fail("R101", where="--seq-len", why=why, fix="Give a larger number")
    with progress("sampling") as report:
        found = sample_conversations(
            model,
            turns,
            tokens=options.tokens,
            seed=options.seed,
            temp=options.temp,
            seq_len=options.seq_len,
            batch_size=min(options.batch_size, -(-options.tokens // options.seq_len)),
            progress=report,
        )
        for said in found:
            texts = [tokenizer.decode(ids).strip() for ids in said]
            whole = next((number for number, text in enumerate(texts) if not text), len(texts)) // 2 * 2
            messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts[:whole])]
            if messages:
                yield json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


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


def _result(store: "TokenStore", path: Path, text: Path | None) -> PrepareResult:
    header = store.header
    size_of = sum(shard["bytes"] for shard in header["shards"])
    counts = (header["tokens"], header["counted"], header["documents"], len(header["shards"]))
    return PrepareResult(str(path), str(text) if text else None, *counts, size_of, header["sha256"])
