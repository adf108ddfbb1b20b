"""The self-test of `radlads doctor`: kernels against golden files, fused steps against unfused ones, speeds.

`python -m radlads.backends.mlx.selftest` prints the same lines without the rest of the report.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from radlads.backends.mlx.kernels.gpu import LANES, has_kernels
from radlads.backends.mlx.kernels.wkv6 import wkv6
from radlads.backends.mlx.kernels.wkv7 import wkv7
from radlads.backends.mlx.measure import copy_bandwidth, draw, forms, interleaved, steps
from radlads.backends.mlx.model import Model, ModelArgs
from radlads.spec import ModelSpec

Arrays = dict[str, npt.NDArray[np.float32]]

GOLDENS = Path(__file__).with_name("goldens")
OPS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "wkv6": (wkv6, ("q", "k", "v", "log_w", "state")),
    "wkv7": (wkv7, ("r", "log_w", "k", "v", "a", "b", "state")),
}
TOKENS, SCALE = 19, 0.5  # a whole block of 16 and a part, also of blocks of 8
GOLDEN_BOUND = 1e-5  # largest error over largest value
STEP_BOUND = 1e-4
STUDENT = ModelSpec("qwen3", 64, 64, 2, 2, 1, 64, 64, qk_norm=True)
STUDENTS = {
    "rwkv6": STUDENT.as_student("rwkv6"),
    "rwkv6 with norm": STUDENT.as_student("rwkv6", gate="lowrank", groupnorm=True),
    "rwkv7 A": STUDENT.as_student("rwkv7", variant="A"),
    "rwkv7 B": STUDENT.as_student("rwkv7", variant="B"),
    "rwkv7 C": replace(STUDENT, head_dim=128).as_student("rwkv7"),
    "hxa079": STUDENT.as_student("hxa079"),
    "hxa07c": STUDENT.as_student("hxa07c"),
}


@dataclass(frozen=True)
class Check:
    """One comparison: `error` is the largest error over the largest value."""

    name: str
    error: float
    bound: float

    @property
    def good(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound


def golden_inputs(op: str, head_size: int) -> Arrays:
    """The inputs of a golden file, made from a stream of numbers that numpy keeps the same, and the slopes of its results."""
    bits = np.random.Generator(np.random.PCG64(head_size))
    token, matrix = (1, TOKENS, 1, head_size), (1, 1, head_size, head_size)
    arrays = {name: 2 * bits.random(matrix if name == "state" else token) - 1 for name in OPS[op][1]}
    arrays["log_w"] = -np.exp(5 * arrays["log_w"] - 2)  # from -20 to -0.001
    if op == "wkv7":
        arrays["a"] /= np.linalg.norm(arrays["a"], axis=-1, keepdims=True)
        arrays["b"] = -arrays["a"] * bits.random(token)
    arrays |= {"slope of p": 2 * bits.random(token) - 1, "slope of last": 2 * bits.random(matrix) - 1}
    return {name: x.astype(np.float32) for name, x in arrays.items()}


def condensed(results: Arrays) -> Arrays:
    """Results as a golden file holds them: of a matrix per head only its products with a fixed vector from either side."""
    kept: Arrays = {}
    for name, x in results.items():
        if x.shape[1] != TOKENS:
            probe = np.cos(np.arange(x.shape[-1], dtype=np.float64))
            kept[f"{name}, rows"], kept[f"{name}, columns"] = (x @ probe).astype(np.float32), (probe @ x).astype(np.float32)
        else:
            kept[name] = x
    return kept


def results_here(op: str, head_size: int) -> Arrays:
    """p, the last state and every gradient, on the default device."""
    run, names = OPS[op]
    inputs = {name: mx.array(x) for name, x in golden_inputs(op, head_size).items()}
    slopes = [inputs.pop("slope of p"), inputs.pop("slope of last")]
    results, gradients = mx.vjp(lambda *arrays: run(*arrays, scale=SCALE), [inputs[name] for name in names], slopes)
    found = dict(zip(("p", "last"), results, strict=True)) | dict(zip((f"d {name}" for name in names), gradients, strict=True))
    return {name: np.array(x) for name, x in found.items()}


def golden_check(op: str, head_size: int) -> Check:
    """Forward and gradients of a recurrence against its golden file."""
    with np.load(GOLDENS / f"{op}-{head_size}.npz", allow_pickle=False) as golden:
        found = condensed(results_here(op, head_size))
        error = max(float(np.abs(found[name] - golden[name]).max() / np.abs(golden[name]).max()) for name in golden)
    return Check(f"{op}, heads of {head_size}, with gradients", error, GOLDEN_BOUND)


def step_check(name: str) -> Check:
    """One token at a time through the fused step, against the same model in training mode, which has none."""
    mx.random.seed(0)
    model = Model(ModelArgs(radlads=STUDENTS[name].to_dict()))
    model.load_weights([(key, 0.2 * mx.random.normal(row.shape)) for key, row in STUDENTS[name].tensors().items()])
    logits = []
    for training in (True, False):
        model.train(training)
        cache = model.make_cache()
        logits.append(mx.concatenate([model(mx.array([[token]]), cache) for token in (3, 1, 4, 1, 5)]))
    error = mx.abs(logits[0] - logits[1]).max() / mx.abs(logits[0]).max()
    return Check(f"step of {name}", float(error), STEP_BOUND)


def checks() -> dict[str, Callable[[], Check]]:
    """Every comparison by name, each to be run for itself: a kernel that does not compile says nothing of the others."""
    goldens = {f"{op}, heads of {size}": partial(golden_check, op, size) for op in OPS for size in LANES}
    steps = {f"step of {name}": partial(step_check, name) for name, spec in STUDENTS.items() if has_kernels(spec.N)}
    return {**goldens, **steps}


@dataclass(frozen=True)
class Speed:
    """One thing timed: how often a second, in `unit`; of a decoding step also its share of the bandwidth of a copy."""

    what: str
    form: str
    rate: float
    unit: str
    of_copy: float | None = None


def speeds() -> Iterator[Speed]:
    """Bandwidth, and tokens per second of one layer's recurrence in each form, prompt and decoding."""
    on_gpu = mx.default_device() == mx.gpu
    nbytes = 2**28 if on_gpu else 2**24
    copy = copy_bandwidth(nbytes >> 20, 3)
    yield Speed("memory", "copy", copy, "bytes/s")
    H, N, T = (28, 128, 1024) if on_gpu else (2, 64, 128)
    dtype = mx.bfloat16 if on_gpu else mx.float32
    for name, s in interleaved(forms(draw(1, T, H, N, dtype)), 3).items():
        yield Speed(f"prompt of {T} tokens, {H} heads of {N}", name, T / s, "tokens/s")
    for B in (1, 16) if on_gpu else (1,):
        candidates, count = steps(B, H, N, dtype, nbytes)
        for name, s in interleaved(candidates, 3).items():
            share = 8 * B * H * N * N * count / s / copy
            yield Speed(f"decoding {B} at once, {H} heads of {N}", name, B * count / s, "tokens/s", share)


if __name__ == "__main__":
    for check in checks().values():
        done = check()
        print(f"{'ok' if done.good else 'WRONG':6s} {done.name}: {done.error:.1e}")
    print(*speeds(), sep="\n")
