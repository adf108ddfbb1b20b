"""Times the RAD-RWKV7 recurrence on MLX against mlx-lm's rwkv7 kernel and its loop over tokens, interleaved in one process.

Run: python bench/mlx.py [--tokens 2048] [--heads 28] [--head-size 128] [--batches 1,32] [--rounds 7] [--json]
On Metal all three forms run; on CUDA and on the CPU mlx-lm has only the loop. Prints milliseconds (median), tokens per second,
peak memory and, for the decode step, the share of the bandwidth of a large copy that reading and writing the states reaches.

MLX on an NVIDIA card: the wheels mlx, mlx-cuda-13 and mlx-lm (0.32) with `pip install --no-deps --target DIR`, the libraries of
the installed `nvidia` packages on LD_LIBRARY_PATH, then with PYTHONPATH=DIR:.
    python bench/mlx.py --layer            the figures above, and a decode step of a layer with and without our kernels
    python -m radlads.backends.mlx.selftest    errors of every kernel and of its gradient
"""

import argparse
import json
import platform
import sys
from pathlib import Path

sys.path.pop(0)  # this folder, whose mlx.py would hide the package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import mlx.core as mx
import mlx_lm

from radlads.backends.mlx.kernels import gpu
from radlads.backends.mlx.measure import copy_bandwidth, draw, forms, interleaved, peak_bytes
from radlads.backends.mlx.model import Model, ModelArgs
from radlads.spec import ModelSpec


def row(kind: str, B: int, T: int, H: int, N: int, dtype: mx.Dtype, rounds: int) -> list[dict[str, object]]:
    """One shape in every form."""
    candidates = forms(draw(B, T, H, N, dtype))
    memory = {name: peak_bytes(form) for name, form in candidates.items()}
    seconds = interleaved(candidates, rounds)
    return [
        {"kind": kind, "shape": [B, T, H, N], "form": name, "ms": 1e3 * s, "tokens_per_s": B * T / s, "peak_bytes": memory[name],
         "state_bytes_per_s": 8 * B * H * N * N / s}
        for name, s in seconds.items()
    ]  # fmt: skip


def layer_step(B: int, rounds: int) -> dict[str, float]:
    """Seconds of one decode step of one 7B-shaped RAD-RWKV7 layer, with our kernels and as plain operations."""
    spec = ModelSpec("qwen2", 3584, 18944, 1, 28, 4, 128, 256, qkv_bias=True).as_student("rwkv7")
    model = Model(ModelArgs(radlads=spec.to_dict()))
    model.set_dtype(mx.bfloat16)
    model.eval()
    own = gpu.dialect
    caches = {}
    for name in ("kernels", "plain"):
        caches[name] = model.make_cache()
        mx.eval(model(mx.zeros((B, 8), mx.int32), caches[name]))

    def step(name: str) -> mx.array:
        gpu.dialect = own if name == "kernels" else lambda: None
        try:
            return model(mx.zeros((B, 1), mx.int32), caches[name])
        finally:
            gpu.dialect = own

    return interleaved({name: lambda name=name: step(name) for name in caches}, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--batches", default="1,32", help="batch sizes of the decode step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layer", action="store_true", help="also a decode step of a whole 7B layer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    on_gpu = mx.default_device() == mx.gpu
    dtype = mx.bfloat16 if on_gpu else mx.float32
    H, N = options.heads, options.head_size
    bandwidth = copy_bandwidth(512 if on_gpu else 64)
    rows = row("prefill", 1, options.tokens, H, N, dtype, options.rounds)
    for B in map(int, options.batches.split(",")):
        rows += row("decode", B, 1, H, N, dtype, options.rounds)
    layers = {B: layer_step(B, options.rounds) for B in (1, 32)} if options.layer else {}
    device = mx.device_info().get("device_name", platform.processor()) if on_gpu else platform.machine()
    head = {"device": str(device), "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "copy_bytes_per_s": bandwidth}
    if options.json:
        print(json.dumps({"schema": 1, **head, "rows": rows, "layer_step_s": layers}))
        return
    print(f"{device}, {'GPU' if on_gpu else 'CPU'}, MLX {mx.__version__}, mlx-lm {mlx_lm.__version__}, "
          f"copy {bandwidth / 1e9:.1f} GB/s, {dtype}")  # fmt: skip
    print(f"{'':8s} {'BxTxHxN':16s} {'form':14s} {'ms':>9s} {'tokens/s':>10s} {'peak MB':>8s} {'of copy':>8s}")
    for r in rows:
        share = f"{100 * r['state_bytes_per_s'] / bandwidth:7.1f}%" if r["kind"] == "decode" else ""
        print(f"{r['kind']:8s} {'x'.join(map(str, r['shape'])):16s} {r['form']:14s} {r['ms']:9.3f} {r['tokens_per_s']:10.0f} "
              f"{r['peak_bytes'] / 1e6:8.1f} {share}")  # fmt: skip
    for B, seconds in layers.items():
        print(f"layer step, batch {B}: {1e3 * seconds['kernels']:.3f} ms with kernels, {1e3 * seconds['plain']:.3f} ms plain")


if __name__ == "__main__":
    main()
