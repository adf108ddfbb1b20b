"""`radlads prepare`: tokens for training, from files and datasets or from text that a model writes."""

import time
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from radlads.cli.options import arg, opt
from radlads.cli.render import Table, progress, size
from radlads.errors import fail

if TYPE_CHECKING:
    from radlads.data.store import TokenStore

DATASETS, TARGETS = "Hugging Face datasets", "A teacher's predictions (also --seq-len, --batch-size and --temp)"


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
    seq_len: int = opt(512, "Tokens of one sampled text, its beginning included.", panel="Sampled text")
    batch_size: int | None = opt(None, "Texts written at once; 1024 on a GPU, 64 elsewhere.", panel="Sampled text")
    temp: float = opt(1.0, "Temperature; 1 samples from the model's own distribution.", panel="Sampled text")
    prompt: str | None = opt(None, "How each text begins; without it, as a new document.", panel="Sampled text", metavar="TEXT")
    prompts: str | None = opt(
        None, "Text of whose paragraphs one, drawn by lot, begins each sampled text.", panel="Sampled text", metavar="FILE"
    )
    prompt_tokens: int = opt(16, "Tokens taken of a paragraph of --prompts.", panel="Sampled text")
    max_seconds: float | None = opt(None, "Stop sampling in time, with what there is.", panel="Sampled text", metavar="SECONDS")
    seed: int = opt(0, "Seed of the random numbers.", panel="Sampled text")
    teacher_cache: str | None = opt(
        None, "Model folder whose predictions for every token of one prepared store are kept, for step 2.", panel=TARGETS,
        metavar="MODEL",
    )  # fmt: skip
    top_k: int = opt(64, "Likeliest tokens kept of each prediction; the mass of all others is one number.", panel=TARGETS)
    packing: Literal["stream", "reset", "document"] = opt("stream", "What a sample is, as in the recipe's stage.", panel=TARGETS)
    dtype: Literal["bfloat16", "float32"] | None = opt(
        None, "What the model computes in; without it bfloat16 on a GPU, float32 elsewhere.", panel=TARGETS
    )
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class TargetsResult:
    """The cache that was made: rows are tokens of the store, `asked` of them stand in samples; tails are shares of mass."""

    cache: str
    rows: int
    asked: int
    top_k: int
    mean_tail: float
    most_tail: float
    bytes: int
    bytes_per_token: float
    seconds: float

    def blocks(self) -> list[Table | str]:
        """Size, what the tails hold, how far the loss can be off, and how to train on it."""
        rows = [("cache", self.cache), ("tokens", f"{self.asked:,} with {self.top_k} predictions each")]
        rows += [("size", f"{size(self.bytes)}, {self.bytes_per_token:.0f} bytes a token")]
        rows += [("time", f"{self.seconds:.0f} s, {self.asked / max(self.seconds, 1e-9):,.0f} tokens/s")]
        rows += [("mass in the tails", f"{self.mean_tail:.3%} in the mean, {self.most_tail:.1%} at most")]
        bound = (
            "The gradient of a token's logits differs from the whole teacher's by at most twice its tail (L1), "
            f"{2 * self.mean_tail:.2g} in the mean. The loss leaves out how student and teacher differ inside the tail."
        )
        return [Table(("", ""), rows), bound, f"Next: `radlads train --set data.teacher_cache=[{self.cache}]`"]


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

    @classmethod
    def of(cls, store: "TokenStore", text: Path | None = None) -> "PrepareResult":
        """The result for a store that was written."""
        header = store.header
        counts = (header["tokens"], header["counted"], header["documents"], len(header["shards"]))
        nbytes = sum(shard["bytes"] for shard in header["shards"])
        return cls(str(store.path), str(text) if text else None, *counts, nbytes, header["sha256"])

    def blocks(self) -> list[Table | str]:
        """What was made, and how to train on it."""
        rows = [("store", self.store), *([("text", self.text)] if self.text else [])]
        rows += [("tokens", f"{self.tokens:,}"), ("documents", f"{self.documents:,}")]
        rows += [("learnt", f"{self.counted:,} tokens of the assistant")] if self.counted < self.tokens else []
        rows += [("shards", f"{self.shards}"), ("size", size(self.bytes))]
        return [Table(("", ""), rows), f"Next: `radlads train --set data.train=[{self.store}]`"]


def prepare(options: PrepareOptions) -> PrepareResult | TargetsResult:
    """Tokenise sources, sample text and tokenise it, or keep predictions; R1xx to R4xx for what cannot be used."""
    if options.teacher_cache is not None:
        return keep_predictions(options, options.teacher_cache)
    if bool(options.sources) == bool(options.sample_from):
        why = "give either files or --sample-from" if options.sources else "there is nothing to tokenise"
        raise fail("R101", where="radlads prepare", why=why, fix="Name text files, or a model with --sample-from")
    if options.sample_from is not None:
        from radlads.cli.prepare_sampled import sampled

        return sampled(options)
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
    return PrepareResult.of(store)


def keep_predictions(options: PrepareOptions, teacher: str) -> TargetsResult:
    """Keep what a teacher predicts on one token store."""
    from radlads.backends import choose_backend
    from radlads.data.store import TokenStore, is_store
    from radlads.demo import resolve
    from radlads.folder import open_folder
    from radlads.tokenizer import Tokenizer

    if len(options.sources) != 1 or not is_store(resolve(options.sources[0])):
        why = f"{', '.join(options.sources) or 'nothing'} is no single token store"
        raise fail("R101", where="--teacher-cache", why=why, fix="Make one with `radlads prepare` first, and name it")
    for flag, value in (("--seq-len", options.seq_len), ("--batch-size", options.batch_size or 1), ("--top-k", options.top_k)):
        if value < 1:
            raise fail("R101", where=flag, why=f"{value} is not above 0", fix="Give a number above 0")
    if not 0 < options.temp < 1e6:
        raise fail("R101", where="--temp", why=f"{options.temp} is no temperature", fix="Give a number above 0")
    choose_backend("torch")
    import torch

    from radlads.backends.torch.targets import make_targets
    from radlads.data.corpus import open_store

    folder = open_folder(resolve(teacher))
    store = open_store(resolve(options.sources[0]), Tokenizer(folder.path, vocab_size=folder.spec.V))
    assert isinstance(store, TokenStore)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = options.dtype or ("bfloat16" if device == "cuda" else "float32")
    began = time.perf_counter()
    with progress("predicting") as report:
        cache = make_targets(
            folder, store, options.output_dir, k=options.top_k, seq_len=options.seq_len, packing=options.packing,
            temperature=options.temp, batch_size=options.batch_size or 16, device=device, dtype=dtype, progress=report,
        )  # fmt: skip
    header, took = cache.header, time.perf_counter() - began
    sizes = sum(shard["bytes"] for shard in header["shards"])
    counts = cache.rows, header["asked"], cache.k
    return TargetsResult(str(cache.path), *counts, header["mean_tail"], header["most_tail"], sizes, sizes / cache.rows, took)
