"""`radlads prepare --sample-from`: text or conversations that a model writes, tokens and all."""

from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from radlads.cli.prepare import PrepareOptions, PrepareResult
from radlads.cli.render import progress
from radlads.errors import fail

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from radlads.backends.torch.sample import Turns, Written
    from radlads.folder import ModelFolder
    from radlads.tokenizer import Tokenizer

STORE = "store"
# Characters read of a paragraph for each token wanted of it, and paragraphs tokenised at once.
CHARACTERS, PROMPTS_AT_ONCE = 16, 1024


def sampled(options: PrepareOptions) -> PrepareResult:
    """Sample text from a model and tokenise it. R101 for options that do not fit, R206 without a template for --chat, R4xx."""
    from radlads.backends import choose_backend
    from radlads.data.binidx import write_binidx
    from radlads.data.prepare import prepare as prepare_store
    from radlads.data.store import TokenStore
    from radlads.demo import resolve
    from radlads.files import new_folder
    from radlads.folder import open_folder
    from radlads.tokenizer import Tokenizer

    choose_backend("torch")
    check(options)
    model = open_folder(resolve(str(options.sample_from)))
    tokenizer = Tokenizer(options.tokenizer or model.path, vocab_size=model.spec.V)
    opening, turns = conversation(model, tokenizer, options) if options.chat else plain_text(tokenizer, options)
    shortest = len(opening) + len(turns.answer) + 2 if options.chat else len(opening) + 1
    shortest += options.prompt_tokens if options.prompts else 0
    if shortest > options.seq_len:
        why = f"{options.seq_len} tokens hold no text: its beginning alone takes {shortest - 1}"
        raise fail("R101", where="--seq-len", why=why, fix="Give a larger number")
    final, name = Path(options.output_dir), "sampled.jsonl" if options.chat else "sampled.txt"
    with new_folder(final) as folder:
        index = folder / "sampled.idx"
        with (folder / name).open("w", encoding="utf-8") as file, progress("sampling") as report:
            write_binidx(index, rows(model, tokenizer, options, opening, turns, file, report), model.spec.V)
        with progress("storing") as report:
            prepare_store([index], tokenizer, folder / STORE, eos_id=tokenizer.eos_id, progress=report)
        # The store holds the tokens now.
        index.unlink()
        index.with_suffix(".bin").unlink()
    return PrepareResult.of(TokenStore(final / STORE), final / name)


def check(options: PrepareOptions) -> None:
    """R101 for options of sampling that cannot work."""
    asked = {"--tokens": options.tokens, "--seq-len": options.seq_len, "--batch-size": options.batch_size}
    for flag, value in (asked | {"--prompt-tokens": options.prompt_tokens, "--max-seconds": options.max_seconds}).items():
        if value is not None and value <= 0:
            raise fail("R101", where=flag, why=f"{value} is not above 0", fix="Give a number above 0")
    if not 0 <= options.temp <= 100:
        raise fail("R101", where="--temp", why=f"{options.temp} is out of range", fix="Give a number from 0 to 100")
    beginnings = {"--chat": options.chat, "--prompt": options.prompt is not None, "--prompts": options.prompts is not None}
    given = [flag for flag, there in beginnings.items() if there]
    if len(given) > 1:
        raise fail("R101", where=given[0], why=f"it cannot be combined with {given[1]}", fix="Leave one of them out")


def plain_text(tokenizer: "Tokenizer", options: PrepareOptions) -> "tuple[list[int], Turns]":
    """How each text begins, and what ends a document: the text then goes on as the model likes."""
    from radlads.backends.torch.sample import Turns

    if options.prompt:
        return tokenizer.encode(options.prompt, add_special=True), Turns()
    if tokenizer.begin_id is None:
        raise fail("R101", where="--prompt", why="the tokenizer has no token that begins a text", fix="Give a prompt")
    return [tokenizer.begin_id], Turns()


def conversation(model: "ModelFolder", tokenizer: "Tokenizer", options: PrepareOptions) -> "tuple[list[int], Turns]":
    """The tokens before the first question, and the template's around the turns."""
    from radlads.backends.torch.sample import Turns
    from radlads.data.chat import script_of

    opening, answer, again = map(tokenizer.encode, script_of(tokenizer.chat, model.path))
    return opening, Turns(answer, again, tokenizer.eos_ids | tokenizer.turn_ids)


def openings(tokenizer: "Tokenizer", options: PrepareOptions, opening: list[int]) -> Iterator[list[int]]:
    """How each text begins, one after another without end."""
    if options.prompts is None:
        yield from repeat(opening)
    import numpy as np

    from radlads.data.documents import read_documents

    assert options.prompts is not None
    count, lines = options.prompt_tokens, []
    for piece in read_documents(Path(options.prompts), "text", lambda _: None):
        # No token is longer than its text: what is shorter cannot give as many.
        lines += [line[: count * CHARACTERS] for line in piece.content.splitlines() if len(line) >= count]
    draw = np.random.default_rng(options.seed)
    while True:
        chosen = [lines[place] for place in draw.integers(len(lines), size=PROMPTS_AT_ONCE)] if lines else []
        found = [ids[:count] for ids in tokenizer.encode_batch(chosen) if len(ids) >= count]
        if not found:
            why = f"no paragraph in it has {count} tokens"
            raise fail("R302", where=options.prompts, why=why, fix="Lower --prompt-tokens or give another text")
        yield from ([*opening, *ids] for ids in found)


def rows(
    model: "ModelFolder",
    tokenizer: "Tokenizer",
    options: PrepareOptions,
    opening: list[int],
    turns: "Turns",
    file: IO[str],
    report: Callable[[int, int | None], None],
) -> "Iterator[npt.NDArray[np.integer[Any]]]":
    """The sampled rows of tokens, whose text goes to `file` as they come."""
    from radlads.backends.torch.sample import sample_rows

    found = sample_rows(
        model,
        openings(tokenizer, options, opening),
        turns,
        tokens=options.tokens,
        seed=options.seed,
        temp=options.temp,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        seconds=options.max_seconds,
        progress=report,
    )
    for written in found:
        file.writelines((conversations if options.chat else documents)(written, tokenizer))
        yield from written.tokens


def documents(written: "Written", tokenizer: "Tokenizer") -> Iterator[str]:
    """The texts of sampled rows, each document followed by the marker that `data.documents` knows."""
    from radlads.data.documents import MARKER

    ends = tokenizer.eos_ids | {tokenizer.eos_id}
    pieces = [piece for row in written.tokens.tolist() for piece in split(row, ends)]
    yield from (f"{text}{MARKER}\n" for text in tokenizer.decode_batch(pieces) if text.strip())


def conversations(written: "Written", tokenizer: "Tokenizer") -> Iterator[str]:
    """The sampled conversations as lines of JSON; an unfinished turn and what is empty are left out."""
    import json

    from radlads.backends.torch.sample import said

    talks = [said(*row) for row in zip(written.tokens.tolist(), written.origin.tolist(), strict=True)]
    texts = iter(tokenizer.decode_batch([turn for talk in talks for turn in talk]))
    for talk in talks:
        turns = [next(texts).strip() for _ in talk]
        whole = next((number for number, text in enumerate(turns) if not text), len(turns)) // 2 * 2
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns[:whole])]
        if messages:
            yield json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def split(row: list[int], ends: "frozenset[int | None]") -> Iterator[list[int]]:
    """The pieces of a row between the tokens that end one."""
    piece: list[int] = []
    for token in row:
        if token in ends:
            yield piece
            piece = []
        else:
            piece.append(token)
    yield piece
