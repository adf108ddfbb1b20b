"""Times of the recurrence on this machine: our forms beside the form of mlx-lm's rwkv7.py and a loop over tokens."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from mlx_lm.models.rwkv7 import _wkv7_step_ops, wkv7_kernel

from radlads.backends.mlx.kernels import zero_state
from radlads.backends.mlx.kernels.gpu import has_kernels
from radlads.backends.mlx.kernels.step import fused_step7
from radlads.backends.mlx.kernels.wkv7 import wkv7
from radlads.backends.mlx.layers import RWKV7_MIN_LOG_W, unit_keys
from radlads.spec import MixerOptions

Form = Callable[[], Any]


def draw(B: int, T: int, H: int, N: int, dtype: mx.Dtype, seed: int = 0) -> list[mx.array]:
    """r, log_w, k, v, a, b (B, T, H, N) as a layer would make them, and a float32 state; log_w, a, b float32."""
    mx.random.seed(seed)
    r, k, v, kappa, d, rate = (mx.random.normal((B, T, H, N)) for _ in range(6))
    kappa = unit_keys(kappa)
    log_w = RWKV7_MIN_LOG_W * mx.sigmoid(d)
    arrays = [r.astype(dtype), log_w, k.astype(dtype), v.astype(dtype), -kappa, kappa * mx.sigmoid(rate), zero_state(r)]
    mx.eval(arrays)
    return arrays


def forms(arrays: list[mx.array]) -> dict[str, Form]:
    """The same recurrence in each form; a token loop only where mlx-lm itself has a kernel to offer beside it."""
    r, log_w, k, v, a, b, state = arrays
    w = mx.exp(log_w).astype(r.dtype)
    short = [x.astype(r.dtype) for x in (a, b, state)]  # mlx-lm keeps all of them in the type of the activations
    mx.eval(w, short)
    found: dict[str, Form] = {
        "radlads": lambda: wkv7(r, log_w, k, v, a, b, state, min_log_w=RWKV7_MIN_LOG_W),
        "token loop": lambda: token_loop(r, w, k, v, *short),
    }
    if mx.metal.is_available() and mx.default_device() == mx.gpu:
        found["mlx-lm kernel"] = lambda: wkv7_kernel(r, w, k, v, *short)
    return found


def gradient_forms(arrays: list[mx.array]) -> dict[str, Form]:
    """The gradients of all inputs, ours and through a token loop."""
    r, log_w, *rest = arrays
    w = mx.exp(log_w)
    mx.eval(w)

    def gradient(op: Callable[..., Any], inputs: list[mx.array]) -> Form:
        slope = mx.grad(lambda *x: op(*x)[0].astype(mx.float32).sum(), argnums=list(range(len(inputs))))
        return lambda: slope(*inputs)

    own = gradient(lambda *x: wkv7(*x, min_log_w=RWKV7_MIN_LOG_W), arrays)
    return {"radlads": own, "token loop": gradient(token_loop, [r, w, *rest])}


def token_loop(
    r: mx.array, w: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """What mlx-lm does without its kernel: its step, once per token."""
    out = []
    for t in range(r.shape[1]):
        y, state = _wkv7_step_ops(r[:, t], w[:, t], k[:, t], v[:, t], a[:, t], b[:, t], state)
        out.append(y)
    return mx.stack(out, axis=1), state


def interleaved(forms: Mapping[str, Form], rounds: int = 7) -> dict[str, float]:
    """Median seconds of each form, the forms taking turns; one round before counts for nothing."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            mx.eval(form())
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_bytes(form: Form) -> int:
    """Bytes that MLX holds at most while a form runs, above what it held before."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(form())
    return mx.get_peak_memory() - before


def steps(B: int, H: int, N: int, dtype: mx.Dtype, nbytes: int) -> tuple[dict[str, Form], int]:
    """One token for each of several layers' states, as many as fill `nbytes`: a decode step in each form, and their number.

    As in a model, a state has left every cache before its turn comes again, and launches follow each other without a wait.
    """
    count = max(1, nbytes // (4 * B * H * N * N))
    layers = []
    for seed in range(count):
        arrays = draw(B, 1, H, N, dtype, seed)
        layers.append(forms(arrays) | ({"radlads, fused": fused(arrays)} if has_kernels(N) else {}))

    def all_layers(name: str) -> Form:
        return lambda: [layer[name]() for layer in layers]

    return {name: all_layers(name) for name in layers[0]}, count


def fused(arrays: list[mx.array]) -> Form:
    """The kernel of a whole RAD-RWKV7 step (7.2-7.9): besides the recurrence, decay, rate, keys and gate of the token."""
    r, log_w, k, v, _, b, state = arrays
    B, _, H, N = r.shape
    d, rate = (x.astype(r.dtype).reshape(B, 1, H * N) for x in (log_w, b))
    key = mx.ones((1, 1, H * N), r.dtype)
    mx.eval(d, rate, key)
    options = MixerOptions()
    return lambda: fused_step7(r, k, v, d, rate, (key, key), None, d, None, None, state, options, RWKV7_MIN_LOG_W)


def copy_bandwidth(megabytes: int, rounds: int = 7) -> float:
    """Bytes read and written per second by a copy of an array of this size."""
    x = mx.zeros((megabytes * 2**18,), mx.float32)
    mx.eval(x)
    return 2 * x.nbytes / interleaved({"copy": lambda: x + 1}, rounds)["copy"]


def product_rate(n: int = 512, rounds: int = 3) -> float:
    """Floating-point operations per second of a product of two float32 matrices (n, n)."""
    x = mx.random.normal((n, n))
    mx.eval(x)
    return 2 * n**3 / interleaved({"product": lambda: x @ x}, rounds)["product"]
