"""Text written by a model in large batches, as training data: plain sampling at a temperature, seeded."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from radlads.backends.torch.load import load_model
from radlads.backends.torch.model import Model
from radlads.folder import ModelFolder


def sample_texts(
    folder: ModelFolder,
    *,
    tokens: int,
    seed: int,
    temp: float = 1.0,
    seq_len: int = 512,
    batch_size: int = 64,
    prompt_ids: Sequence[int] = (),
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[int]]:
    """Token lists of `seq_len` sampled tokens each, after `prompt_ids`, until there are `tokens` of them.

    `progress` gets (tokens so far, tokens in all). The same seed gives the same texts on the same kind of device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder, device=device, dtype="float32" if device == "cpu" else None)
    generator = torch.Generator(device).manual_seed(seed)
    done = 0
    while done < tokens:
        rows = sample_batch(model, prompt_ids or (0,), seq_len, batch_size, temp, generator)
        for row in rows.tolist():
            yield row
            done += seq_len
            if done >= tokens:
                break
        if progress is not None:
            progress(min(done, tokens), tokens)


class Turns(NamedTuple):
    """The tokens of a chat template around what is said, and those that end a turn."""

    opening: Sequence[int]
    answer: Sequence[int]
    again: Sequence[int]
    ends: frozenset[int]


def sample_conversations(
    folder: ModelFolder,
    turns: Turns,
    *,
    tokens: int,
    seed: int,
    temp: float = 1.0,
    seq_len: int = 512,
    batch_size: int = 64,
    device: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[list[list[int]]]:
    """Conversations of which the model writes both sides: the tokens of each finished turn, question and answer in turn.

    Each takes at most `seq_len` tokens, the template's included; `tokens` counts all that the model was fed or wrote.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(folder, device=device, dtype="float32" if device == "cpu" else None)
    generator = torch.Generator(device).manual_seed(seed)
    done = 0
    while done < tokens:
        for said in converse(model, turns, seq_len, batch_size, temp, generator):
            yield said
            done += seq_len
            if done >= tokens:
                break
        if progress is not None:
            progress(min(done, tokens), tokens)


@torch.no_grad()
def converse(
    model: Model, turns: Turns, length: int, rows: int, temp: float, generator: torch.Generator
) -> list[list[list[int]]]:
    """Per row the finished turns of one conversation of `length` tokens."""
    device = next(model.parameters()).device
    said: list[list[list[int]]] = [[[]] for _ in range(rows)]
    forced: list[deque[int]] = [deque() for _ in range(rows)]
    tokens = torch.tensor([list(turns.opening)], device=device).expand(rows, -1)
    state = None
    for _ in range(length - len(turns.opening)):
        hidden, state = model.model(tokens, state)
        drawn = draw(F.linear(hidden[:, -1], model.head), temp, generator).flatten().tolist()
        for row, token in enumerate(drawn):
            if not forced[row] and token in turns.ends:
                # The template's own tokens follow, the end of the turn being the first of them.
                forced[row].extend(turns.answer if len(said[row]) % 2 else turns.again)
                said[row].append([])
            if forced[row]:
                drawn[row] = forced[row].popleft()
            else:
                said[row][-1].append(token)
        tokens = torch.tensor(drawn, device=device)[:, None]
    return [finished[:-1] for finished in said]


def draw(logits: torch.Tensor, temp: float, generator: torch.Generator) -> torch.Tensor:
    """One token for each row of logits (B, V), shape (B, 1); temperature 0 is greedy."""
    if temp == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits.float() / temp).softmax(-1), 1, generator=generator)


@torch.no_grad()
def sample_batch(
    model: Model, prompt: Sequence[int], length: int, rows: int, temp: float, generator: torch.Generator
) -> torch.Tensor:
    """`rows` continuations (rows, length) of one prompt, sampled at `temp`; 0 is greedy."""
    device = next(model.parameters()).device
    tokens = torch.tensor([list(prompt)], device=device).expand(rows, -1)
    state, written = None, []
    for _ in range(length):
        hidden, state = model.model(tokens, state)
        tokens = draw(F.linear(hidden[:, -1], model.head), temp, generator)
        written.append(tokens)
    return torch.cat(written, 1)
