"""Making a teacher's targets: its predictions for every token of a store, cut down to the likeliest tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radlads.backends.torch.load import load_model
from radlads.backends.torch.losses import add_product
from radlads.backends.torch.model import Model
from radlads.backends.torch.objectives import unpack
from radlads.data.samples import Corpus, Packing, Samples
from radlads.data.store import TokenStore
from radlads.data.targets import Rows, TargetCache, nothing, write_targets
from radlads.errors import fail
from radlads.folder import ModelFolder
from radlads.states import model_fingerprint

# Bytes of float32 logits that exist at once.
LOGITS_BYTES = 512 * 2**20


def make_targets(
    teacher: ModelFolder,
    store: TokenStore,
    out: str | Path,
    *,
    k: int,
    seq_len: int,
    packing: Packing = "stream",
    temperature: float = 1.0,
    batch_size: int = 16,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> TargetCache:
    """The cache `out` of what `teacher` predicts on `store`; see data.targets.write_targets. R101 for a k that is none."""
    if not 1 <= k < teacher.spec.V:
        raise fail("R101", where="--top-k", why=f"{k} of {teacher.spec.V} tokens", fix="Give a smaller number, above 0")
    samples = Corpus.of(store).samples(seq_len, 0, packing)
    about: dict[str, Any] = {"k": k, "seq_len": seq_len, "packing": packing, "temperature": float(temperature)}
    about |= {"teacher": model_fingerprint(teacher), "dtype": dtype or "stored"}
    starts = np.array([samples.place(0, place)[0] for place in range(samples.counts[0])])
    model: list[Model] = []

    def compute(start: int, end: int) -> Rows:
        if not model:
            model.append(load_model(teacher, device=device, dtype=dtype))
        # The sample before may reach into these tokens.
        first = max(0, int(np.searchsorted(starts, start, "right")) - 1)
        last = int(np.searchsorted(starts, end))
        found = nothing(end - start, k)
        for place in range(first, last, batch_size):
            places = range(place, min(place + batch_size, last))
            fill(found, start, predictions(model[0], samples, places, k, temperature), samples, places)
        return found

    return write_targets(out, store, about, compute, progress)


def fill(found: Rows, start: int, rows: Rows, samples: Samples, places: range) -> None:
    """Put the targets of samples (n, T, ...) at their tokens of `found`, which begins at token `start`."""
    for number, place in enumerate(places):
        begin, end = samples.place(0, place)
        # The last token of a sample is only a label.
        low, high = max(begin, start), min(end - 1, start + len(found.ids))
        if low < high:
            here, there = slice(low - start, high - start), slice(low - begin, high - begin)
            found.ids[here], found.log_p[here] = rows.ids[number, there], rows.log_p[number, there]
            found.log_tail[here] = rows.log_tail[number, there]


@torch.no_grad()
def predictions(model: Model, samples: Samples, places: range, k: int, temperature: float) -> Rows:
    """Targets of some samples: (n, T, K) and (n, T)."""
    device = next(model.parameters()).device
    sample = torch.from_numpy(np.stack([samples.at(0, place) for place in places])).to(device)
    tokens, _, _, cu_seqlens = unpack(sample, samples.packing)
    hidden, _ = model.model(tokens, cu_seqlens=cu_seqlens)
    shape = (len(places), samples.seq_len)
    rows = max(1, LOGITS_BYTES // (4 * len(model.head)))
    parts = [likeliest(part, model.head, k, temperature) for part in hidden.flatten(0, 1).split(rows)]
    ids, log_p, log_tail = (torch.cat(values).cpu().numpy() for values in zip(*parts, strict=True))
    return Rows(ids.reshape(*shape, k), log_p.reshape(*shape, k), log_tail.reshape(shape))


def likeliest(hidden: Tensor, head: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """ids (n, K), log-probabilities (n, K) and the log of the rest's mass (n,), from float32 logits."""
    logits = torch.zeros(len(hidden), len(head), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    add_product(logits, hidden, head.T, first=True)
    logits /= temperature
    top, ids = logits.topk(k)
    rest = logits.scatter_(1, ids, -torch.inf).logsumexp(1)
    total = torch.logaddexp(top.logsumexp(1), rest)
    return ids, (top - total[:, None]).float(), (rest - total).float()
