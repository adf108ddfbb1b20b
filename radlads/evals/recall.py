"""Recall over a distance: a passkey among filler, and one value among many key-value pairs.

An item is right when every token of the answer is the likeliest after the prompt, as greedy generation would write it.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from radlads.engine import Engine
from radlads.errors import fail
from radlads.tokenizer import Tokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
TASKS = ("passkey", "key-value")


@dataclass(frozen=True)
class RecallItem:
    """Token ids of a prompt and of the answer that continues it."""

    prompt: list[int]
    answer: list[int]


def recall_items(task: str, tokenizer: Tokenizer, length: int, count: int, seed: int) -> list[RecallItem]:
    """`count` items whose prompt and answer have at most `length` tokens together, and nearly as many. R101 where none fits."""
    rng = random.Random(f"{seed}:{task}:{length}")
    make = {"passkey": passkey, "key-value": key_value}[task]
    return [make(tokenizer, length, rng, (index + 0.5) / count) for index in range(count)]


def passkey(tokenizer: Tokenizer, length: int, rng: random.Random, depth: float) -> RecallItem:
    """A five-digit key, told at the relative `depth` (0 to 1) of a prompt of filler, and asked for at its end."""
    key = f"{rng.randrange(10_000, 100_000)}"
    told, asked = f"The pass key is {key}. Remember it. {key} is the pass key. ", "What is the pass key? The pass key is"

    def make(fillers: int) -> tuple[str, str]:
        before = round(fillers * depth)
        return FILLER * before + told + FILLER * (fillers - before) + asked, f" {key}"

    return longest(tokenizer, make, length)


def key_value(tokenizer: Tokenizer, length: int, rng: random.Random, depth: float) -> RecallItem:
    """Lines "key = value" of four digits each; the value of the line at the relative `depth` is asked for."""
    keys = rng.sample(range(1000, 10_000), min(length, 9000))
    pairs = [(key, rng.randrange(1000, 10_000)) for key in keys]

    def make(lines: int) -> tuple[str, str]:
        shown = pairs[: lines + 1]
        key, value = shown[int(len(shown) * depth)]
        return "".join(f"{k} = {v}\n" for k, v in shown) + f"{key} =", f" {value}"

    return longest(tokenizer, make, length)


def longest(tokenizer: Tokenizer, make: Callable[[int], tuple[str, str]], length: int) -> RecallItem:
    """The item of (prompt, answer) = make(n) with the greatest n that fits in `length` tokens."""

    def tokens(size: int) -> int:
        return len(tokenizer.encode("".join(make(size)), add_special=True))

    shortest = tokens(0)
    if shortest > length:
        raise fail("R101", where="--lengths", why=f"{length} tokens hold no item", fix="Give a greater length")
    # Every unit of an item takes about as many tokens: the first guess is nearly right, and long texts are encoded a few times.
    unit = max(1.0, (tokens(16) - shortest) / 16)
    size = min(length, int((length - shortest) / unit))
    while (over := tokens(size) - length) > 0:
        size -= max(1, int(over / unit))
    while size < length and tokens(size + 1) <= length:
        size += 1
    prompt, answer = make(size)
    ids = tokenizer.encode(prompt, add_special=True)
    return RecallItem(ids, tokenizer.encode(prompt + answer, add_special=True)[len(ids) :])


def recalled(engine: Engine, items: list[RecallItem]) -> list[bool]:
    """Whether the model recalls each item."""
    scored = engine.score([item.prompt + item.answer for item in items])
    return [bool(found.likeliest[len(item.prompt) - 1 :].all()) for item, found in zip(items, scored, strict=True)]
