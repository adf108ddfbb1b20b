"""Text written by a model in large batches, as training data: plain sampling at a temperature, seeded."""

from collections.abc import Callable, Iterator, Sequence

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
        logits = F.linear(hidden[:, -1], model.head).float()
        if temp == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            tokens = torch.multinomial((logits / temp).softmax(-1), 1, generator=generator)
        written.append(tokens)
    return torch.cat(written, 1)
