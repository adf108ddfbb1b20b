"""The sources of a recipe as token stores: prepared ones are opened where they lie, the others are made in the run folder."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from radlads.data.prepare import Progress, prepare, tokenizer_hash
from radlads.data.samples import Corpus, OrderName, corpus_of
from radlads.data.sources import Source
from radlads.data.store import TokenStore, is_store
from radlads.demo import resolve
from radlads.errors import fail
from radlads.recipe import Data, DataSource
from radlads.tokenizer import Tokenizer


def check_sources(data: Data, tokenizer: Tokenizer) -> None:
    """Every source of a recipe is there and fits, before anything is written. Raises R301, R206."""
    for given in (*data.train, *data.valid):
        path = resolve(given.path)
        if is_store(path):
            open_store(path, tokenizer)
        else:
            source_of(given, data).files()


def open_corpus(
    given: Sequence[DataSource], data: Data, tokenizer: Tokenizer, folder: Path, progress: Progress | None = None
) -> Corpus:
    """The corpus of `data.train` or `data.valid`; what is yet to be tokenised goes to `folder`, or beside it as `folder`-N.

    Files without weights run together as one stream; with weights, or where a token store is among them, each source is a
    part of its own. Raises R206, R301, R302.
    """
    eos_id = tokenizer.eos_id if data.eos else None
    order: OrderName = data.order if given is data.train else "shuffled"
    weights = None if given[0].weight is None else [source.weight or 0.0 for source in given]
    if weights is None and not any(is_store(resolve(source.path)) for source in given):
        sources = [source_of(source, data) for source in given]
        return corpus_of([prepare(sources, tokenizer, folder, eos_id=eos_id, progress=progress)], None, order)
    stores = []
    for number, source in enumerate(given):
        path = resolve(source.path)
        if is_store(path):
            stores.append(open_store(path, tokenizer))
        else:
            part = folder.with_name(f"{folder.name}-{number}")
            stores.append(prepare([source_of(source, data)], tokenizer, part, eos_id=eos_id, progress=progress))
    return corpus_of(stores, weights, order)


def source_of(given: DataSource, data: Data) -> Source:
    """What a recipe's source says, for reading."""
    fields = given.model_dump(include={"subset", "split", "revision", "streaming", "skip", "take"})
    return replace(Source(str(resolve(given.path)), given.text_field or data.text_field), **fields)


def open_store(path: Path, tokenizer: Tokenizer) -> TokenStore:
    """A prepared store, made with this tokenizer. Raises R301, R206."""
    store = TokenStore(path)
    if store.header.get("tokenizer") != tokenizer_hash(tokenizer):
        why = "it was made with another tokenizer than the model's"
        raise fail("R206", where=path, why=why, fix="Prepare the data again with --tokenizer and the model's folder")
    return store
