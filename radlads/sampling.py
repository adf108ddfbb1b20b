"""From logits to the next token. The settings are named as in mlx-lm and mean the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from radlads.engine import Logits
from radlads.errors import fail

PENALTY_WINDOW = 64  # tokens the repetition penalty looks back


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; R101 when a value is out of range. `temp` 0 takes the most likely token."""

    temp: float = 0.0
    top_p: float = 1.0  # 0 or 1 = off
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # 0 = off
    repetition_penalty: float = 1.0  # 1 = off
    seed: int = 0

    def __post_init__(self) -> None:
        _check("--temp", self.temp, 0 <= self.temp <= 100, "a number from 0 to 100")
        _check("--top-p", self.top_p, 0 <= self.top_p <= 1, "a number from 0 to 1")
        _check("--top-k", self.top_k, self.top_k >= 0, "0 (off) or a number of tokens")
        _check("--min-p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1")
        penalty = self.repetition_penalty
        _check("--repetition-penalty", penalty, 0 < penalty <= 100, "a number above 0, at most 100")
        _check("--seed", self.seed, 0 <= self.seed < 2**63, "an integer from 0 to 2^63 - 1")

    def generator(self) -> np.random.Generator:
        """The random numbers of this seed: one is drawn for each sampled token, on every backend."""
        return np.random.default_rng(self.seed)


def pick(logits: Logits, sampling: Sampling, rng: np.random.Generator, recent: Sequence[int] = ()) -> tuple[int, float]:
    """The next token and its log-probability under the model (V,); `recent` feeds the repetition penalty.

    As in mlx-lm, top-p, min-p and top-k judge the model's own distribution and the temperature comes after them.
    R207 when the logits are not finite.
    """
    scores = _log_softmax(logits.astype(np.float64))
    judged = scores
    if sampling.repetition_penalty != 1 and len(recent):
        judged = _log_softmax(_penalised(logits.astype(np.float64), recent[-PENALTY_WINDOW:], sampling.repetition_penalty))
    if sampling.temp == 0:
        token = int(np.argmax(judged))
    else:
        kept = np.where(_kept(judged, sampling), judged, -np.inf) / sampling.temp
        # Inverse of the cumulative distribution in token order: logits that differ in the last bits give the same token.
        totals = np.cumsum(np.exp(kept - kept.max()))
        token = int(np.searchsorted(totals, rng.random() * totals[-1], side="right"))
        token = min(token, int(np.searchsorted(totals, totals[-1])))  # the draw may round up to the whole
    return token, float(scores[token])


def _kept(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Which tokens may be sampled, boolean (V,)."""
    keep = np.ones(len(scores), bool)
    if 0 < sampling.top_p < 1:
        order = np.argsort(-scores, kind="stable")
        before = np.cumsum(np.exp(scores[order])) - np.exp(scores[order])
        keep[order] = before < sampling.top_p  # the most likely token always stays
    if sampling.min_p > 0:
        keep &= scores >= scores.max() + math.log(sampling.min_p)
    if 0 < sampling.top_k < len(scores):
        order = np.argsort(-np.where(keep, scores, -np.inf), kind="stable")
        keep[order[sampling.top_k :]] = False
    return keep


def _penalised(logits: np.ndarray, recent: Sequence[int], penalty: float) -> np.ndarray:
    seen = np.unique(np.asarray(recent))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    if not np.isfinite(logits).all():
        fix = "Check the weights with `radlads inspect`, or use --dtype float32"
        raise fail("R207", where="logits", why="the model gave NaN or infinity", fix=fix)
    shifted = logits - logits.max()
    return np.asarray(shifted - math.log(np.exp(shifted).sum()))


def _check(flag: str, value: object, holds: bool, wanted: str) -> None:
    # NaN fails every comparison, so it ends here as well.
    if not holds:
        raise fail("R101", where=flag, why=f"{value} is out of range", fix=f"Give {wanted}")
