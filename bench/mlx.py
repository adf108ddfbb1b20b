"""Times the RAD-RWKV7 recurrence on MLX against mlx-lm's rwkv7 kernel and its loop over tokens, interleaved in one process.

Run: python bench/mlx.py [--tokens 2048] [--heads 28] [--head-size 128] [--batches 1,32] [--rounds 7] [--json]
On Metal all three forms run; on CUDA and on the CPU mlx-lm has only the loop. MLX's wheel for Linux multiplies matrices with the
reference BLAS; LD_PRELOAD=libopenblas.so.0 puts a fast one in its place. Prints milliseconds (median), tokens per second,
peak memory and, for decoding, the share of the bandwidth of a large copy that reading and writing the states reaches: a step goes
through as many states as fill 1 GiB, as the layers of a model do, and is divided by their number.

MLX on an NVIDIA card: the wheels mlx, mlx-cuda-13 and mlx-lm (0.32) with `pip install --no-deps --target DIR`, the libraries of
the installed `nvidia` packages on LD_LIBRARY_PATH, then with PYTHONPATH=DIR:.
    python bench/mlx.py --layers 4             the figures above, and a decode step of four layers with and without our kernels
    python -m radlads.backends.mlx.selftest    errors of every kernel and of its gradient
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, whose mlx.py would hide the package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mlx.core as mx
import mlx_lm

from radlads.backends.mlx.engine import MlxEngine
from radlads.backends.mlx.kernels import gpu
from radlads.backends.mlx.measure import copy_bandwidth, draw, forms, gradient_forms, interleaved, peak_bytes, product_rate, steps
from radlads.backends.mlx.model import Model, ModelArgs
from radlads.spec import ModelSpec


def prefill(T: int, H: int, N: int, dtype: mx.Dtype, rounds: int, gradient: bool = False) -> list[dict[str, Any]]:
    """A prompt of one sequence in every form, forward or forward and backward."""
    candidates = (gradient_forms if gradient else forms)(draw(1, T, H, N, dtype))
    memory = {name: peak_bytes(form) for name, form in candidates.items()}
    seconds = interleaved(candidates, rounds)
    kind = "gradient" if gradient else "prefill"
    return [
        {"kind": kind, "shape": [1, T, H, N], "form": name, "ms": 1e3 * s, "tokens_per_s": T / s, "peak_bytes": memory[name]}
        for name, s in seconds.items()
    ]


def decode(B: int, H: int, N: int, dtype: mx.Dtype, rounds: int, nbytes: int) -> list[dict[str, Any]]:
    """One token of a batch in every form; bytes counted are those of the states, read and written."""
    candidates, count = steps(B, H, N, dtype, nbytes)
    memory = {name: peak_bytes(form) // count for name, form in candidates.items()}
    return [
        {"kind": "decode", "shape": [B, 1, H, N], "form": name, "ms": 1e3 * s / count, "tokens_per_s": B * count / s,
         "peak_bytes": memory[name], "state_bytes_per_s": 8 * B * H * N * N * count / s}
        for name, s in interleaved(candidates, rounds).items()
    ]  # fmt: skip


def model_step(B: int, layers: int, rounds: int) -> dict[str, float]:
    """Seconds of a decode step of a RAD-RWKV7 model of a few 7B-shaped layers: our kernels or plain operations, each as
    separate operations and fused by mx.compile, which the engine uses on a GPU.
    """
    spec = ModelSpec("qwen2", 3584, 18944, layers, 28, 4, 128, 256, qkv_bias=True).as_student("rwkv7")
    model = Model(ModelArgs(radlads=spec.to_dict()))
    model.set_dtype(mx.bfloat16)
    model.eval()
    own = gpu.dialect

    def step(kernels: bool, compiled: bool) -> Callable[[], Any]:
        """A step whose next call goes on from its state."""
        engine = MlxEngine(model, compiled=compiled)
        held = {"layers": [{"wkv": mx.zeros((B, spec.H, spec.N, spec.N))} for _ in range(layers)]}
        tokens, seen = mx.zeros((B, 1), mx.int32), mx.full((B,), 8, mx.int32)

        def one() -> Any:
            gpu.dialect = own if kernels else lambda: None
            try:
                logits, held["layers"] = engine._decode(tokens, seen, held["layers"])
            finally:
                gpu.dialect = own
            return logits, held["layers"]

        return one

    kinds = {"kernels": True, "plain": False}
    forms = {f"{kind}{', compiled' * compiled}": step(own, compiled) for kind, own in kinds.items() for compiled in (False, True)}
    if own() is None:  # a CPU: no kernels, and no fusing without a C++ compiler
        forms = {"plain": forms["plain"]}
    return interleaved(forms, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--batches", default="1,32", help="batch sizes of the decode step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gradient", action="store_true", help="also forward and backward; a token loop keeps every state")
    parser.add_argument("--layers", type=int, default=0, help="also a decode step of a model of so many 7B layers")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    on_gpu = mx.default_device() == mx.gpu
    dtype = mx.bfloat16 if on_gpu else mx.float32
    nbytes = 2**30 if on_gpu else 2**24
    device = mx.device_info().get("device_name", platform.processor()) if on_gpu else platform.machine()
    head = {"device": str(device), "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__}
    head |= {"copy_bytes_per_s": copy_bandwidth(nbytes >> 20), "product_flops": product_rate()}
    tell = (lambda *_, **__: None) if options.json else print
    tell(f"{device}, {'GPU' if on_gpu else 'CPU'}, MLX {mx.__version__}, mlx-lm {mlx_lm.__version__}, copy "
         f"{head['copy_bytes_per_s'] / 1e9:.1f} GB/s, products {head['product_flops'] / 1e9:.1f} GFLOP/s, {dtype}")  # fmt: skip
    tell(f"{'':8s} {'BxTxHxN':16s} {'form':14s} {'ms':>9s} {'tokens/s':>10s} {'peak MB':>8s} {'of copy':>8s}", flush=True)
    rows = []
    for measured in parts(options, dtype, nbytes):
        rows += measured
        for r in measured:
            share = f"{100 * r['state_bytes_per_s'] / head['copy_bytes_per_s']:7.1f}%" if r["kind"] == "decode" else ""
            tell(f"{r['kind']:8s} {'x'.join(map(str, r['shape'])):16s} {r['form']:14s} {r['ms']:9.3f} {r['tokens_per_s']:10.0f} "
                 f"{r['peak_bytes'] / 1e6:8.1f} {share}", flush=True)  # fmt: skip
    models = {}
    for B in (1, 32) if options.layers else ():
        models[B] = model_step(B, options.layers, options.rounds)
        times = {name: round(1e3 * s, 3) for name, s in models[B].items()}
        tell(f"decode step of {options.layers} layers, batch {B}, ms:", times, flush=True)
    if options.json:
        print(json.dumps({"schema": 1, **head, "rows": rows, "model_step_s": models}))


def parts(options: argparse.Namespace, dtype: mx.Dtype, nbytes: int) -> Iterator[list[dict[str, Any]]]:
    """What is measured, one table after the other."""
    H, N, rounds = options.heads, options.head_size, options.rounds
    yield prefill(options.tokens, H, N, dtype, rounds)
    if options.gradient:
        yield prefill(options.tokens, H, N, dtype, rounds, gradient=True)
    for B in map(int, options.batches.split(",")):
        yield decode(B, H, N, dtype, rounds, nbytes)


if __name__ == "__main__":
    main()
