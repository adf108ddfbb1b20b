"""Times the WKV training kernels on one GPU against the byte floor and, where importable, flash-linear-attention.

Run: python bench/wkv.py [--shapes 32x512x28x128,...] [--ops rwkv7,rwkv6] [--peers [--peer-configs N]] [--cold] [--profile]
         [--no-segments] [--no-errors] [--float32-gates] [--unbounded]
     python bench/wkv.py --raw [--shapes ...] [--ops ...] [--graph-bytes]
     python bench/wkv.py --decode [--slots] | --decode-model [--step-rows N] [--profile] [--batches 1,8]
Prints one row per op and shape, last. Calls are queued without waiting in between, as in training, and timed by events on the
device; the L2 cache is overwritten before each. Floor: each bf16 input read once and each output written once, at the bandwidth
of a large copy measured in the same run. Errors: relative RMS against a float64 recurrence over the first 256 tokens of 2 heads.
--raw: from a mixer's projections (4 key/value heads), what lies before the recurrence alone and with it, by the mixers' own
operations and by the fused kernels, each eager and compiled. With --graph-bytes (which needs no GPU) it counts instead what the
compiler's graphs of the mixers' operations read and write.
"""
import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from radlads.backends.torch import layer_step
from radlads.backends.torch.kernels import segments
from radlads.backends.torch.kernels.decode import wkv6_step, wkv7_step
from radlads.backends.torch.kernels.prologue import blended, wkv6_keys, wkv7_keys
from radlads.backends.torch.kernels.wkv6 import wkv6
from radlads.backends.torch.kernels.wkv6_plain import repeat_heads
from radlads.backends.torch.kernels.wkv7 import wkv7

BOUND = -0.6065306597126334
SHAPES = "32x512x28x128,4x4096x28x128,1x16384x28x128"
# Compulsory tensors of forward and of forward+backward: inputs and outputs, then also d(out) and the gradients.
TENSORS = {"rwkv7": (7, 20), "rwkv6": (5, 14)}
NAMES = {"rwkv7": ("r", "log_w", "k", "v", "a", "b"), "rwkv6": ("q", "k", "v", "log_w")}


def draw(op: str, B: int, T: int, H: int, N: int, gates: torch.dtype) -> list[Tensor]:
    def normal() -> Tensor:
        return torch.randn(B, T, H, N, device="cuda")
    if op == "rwkv6":
        inputs = [normal(), normal(), normal(), torch.nn.functional.logsigmoid(normal())]
    else:
        kappa = torch.nn.functional.normalize(normal(), dim=-1)
        inputs = [normal(), BOUND * normal().sigmoid(), normal(), normal(), -kappa, kappa * normal().sigmoid()]
    gate = NAMES[op].index("log_w")
    return [x.to(gates if i == gate else torch.bfloat16).requires_grad_() for i, x in enumerate(inputs)]


def ours(op: str, bound: float | None) -> Callable[..., Tensor]:
    if op == "rwkv6":
        return lambda q, k, v, w: wkv6(q, k, v, w, scale=q.shape[-1] ** -0.5)[0]
    return lambda *inputs: wkv7(*inputs, min_log_w=bound)[0]


def peers(op: str) -> dict[str, Callable[..., Tensor]]:
    if op == "rwkv6":
        from fla.ops.gla import chunk_gla
        return {"chunk_gla": lambda q, k, v, w: chunk_gla(q, k, v, w)[0]}
    from fla.ops.rwkv7 import chunk_rwkv7
    return {f"chunk_rwkv7 c{size}": lambda *x, size=size: chunk_rwkv7(
        *x, safe_gate=True, lower_bound=BOUND, chunk_size=size)[0] for size in (16, 32, 64)}


def limit_tuning(most: int) -> None:
    """Lets Triton's tuners, which are the peers' only, try at most that many configurations of a kernel, spread over theirs."""
    from triton.runtime import autotuner
    first = autotuner.Autotuner.__init__

    def few(self: object, fn: object, arg_names: object, configs: list, *rest: object, **options: object) -> None:
        configs = list(configs)
        first(self, fn, arg_names, configs[:: max(1, -(-len(configs) // most))], *rest, **options)

    autotuner.Autotuner.__init__ = few


def exact(op: str, inputs: list[Tensor]) -> Tensor:
    named = dict(zip(NAMES[op], inputs, strict=True))
    query, k, v, log_w = named.get("r", named.get("q")), named["k"], named["v"], named["log_w"]
    B, T, H, N = query.shape
    state = torch.zeros(B, H, N, N, dtype=query.dtype, device=query.device)
    out = []
    for t in range(T):
        removed = 0
        if op == "rwkv7":
            removed = (state @ named["a"][:, t, :, :, None]) * named["b"][:, t, :, None]
        state = state * log_w[:, t].exp()[:, :, None] + removed + v[:, t, :, :, None] * k[:, t, :, None]
        out.append((state @ query[:, t, :, :, None])[..., 0])
    return torch.stack(out, 1) * (1.0 if op == "rwkv7" else N ** -0.5)


def errors(op: str, fn: Callable[..., Tensor], inputs: list[Tensor]) -> str:
    part = [x.detach()[:1, :256, :2].contiguous() for x in inputs]
    want = [x.double().requires_grad_() for x in part]
    got = [x.clone().requires_grad_() for x in part]
    right, found = exact(op, want), fn(*got)
    seed = torch.randn_like(found)
    right.backward(seed.double())
    found.backward(seed)
    pairs = [(found, right), *((x.grad, y.grad) for x, y in zip(got, want, strict=True))]
    values = [((x.double() - y).norm() / y.norm()).item() for x, y in pairs]
    return " ".join(f"{name} {value:.1e}" for name, value in zip(("out", *NAMES[op]), values, strict=True))


def milliseconds(fn: Callable[[], object], flush: Tensor, repeats: int = 15) -> float:
    """Median by device events; the L2 cache is overwritten before each call, and the host runs ahead."""
    for _ in range(3):
        fn()
    torch.cuda.synchronize()
    events = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def copy_bandwidth(flush: Tensor) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.randn(2 ** 29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), flush) * 1e3


def profile(fn: Callable[[], object]) -> str:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(5):
            fn()
        torch.cuda.synchronize()
    rows = sorted(((e.self_device_time_total / 5e3, e.key) for e in trace.key_averages()), reverse=True)
    return "  ".join(f"{key.removesuffix('_kernel')[:40]} {ms:.3f}" for ms, key in rows[:9])


def measure(name: str, op: str, fn: Callable[..., Tensor], inputs: list[Tensor], bandwidth: float, flush: Tensor,
            profiled: bool) -> tuple[float, float, str]:
    seed = torch.randn_like(inputs[0])

    def both() -> None:
        torch.autograd.grad(fn(*inputs), inputs, seed)

    def forward() -> None:
        with torch.no_grad():
            fn(*inputs)

    began = time.perf_counter()
    both()
    torch.cuda.synchronize()
    print(f"  {name}: first forward and backward {time.perf_counter() - began:.1f} s", flush=True)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    both()
    peak = (torch.cuda.max_memory_allocated() - held) / 2 ** 30
    times = milliseconds(forward, flush), milliseconds(both, flush)
    floors = [n * 2 * inputs[0].numel() / bandwidth * 1e3 for n in TENSORS[op]]
    if profiled:
        print(f"  {name}: {profile(both)}", flush=True)
    shape = "x".join(map(str, inputs[0].shape))
    row = f"{name:28s} {shape:16s} {times[0]:7.3f} {times[1]:8.3f} {floors[0]:6.3f} {floors[1]:6.3f} " \
          f"{100 * floors[0] / times[0]:5.1f} {100 * floors[1] / times[1]:5.1f} {peak:6.2f}"
    return *times, row


def raw_inputs(op: str, B: int, T: int, H: int, N: int, device: str = "cuda") -> list[Tensor]:
    """What RAD-RWKV6 (full gate) and a later layer of RAD-RWKV7 (variant C, low-rank gate) project, as `prepared` takes it."""
    few = 4 if H % 4 == 0 else H
    heads = (H, H, few, few, H) if op == "rwkv6" else (H, H, few, few, H, few, H)
    return [torch.randn(B, T, n, N, device=device, dtype=torch.bfloat16).requires_grad_() for n in heads]


def prepared(op: str, fused: bool, r: Tensor, d: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """The inputs of the recurrence, in the order of NAMES."""
    if op == "rwkv6":
        log_w, k = wkv6_keys(d, k, clamp=-5.0, balance=True, fused=fused)
        return r, k, repeat_heads(v, r.shape[2]), log_w.to(k.dtype)
    a, first, mix = rest
    log_w, k, removal, rate = wkv7_keys(d, k, a, "decay", fused=fused)
    return r, log_w.to(k.dtype), k, blended(v, first, mix, fused=fused), removal, rate


def from_raw(op: str, fused: bool, recurrence: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor]:
    out = recurrence(*prepared(op, fused, *inputs))
    return (blended(None, out, inputs[4], fused=fused) if op == "rwkv6" else out,)


def raw_forms(op: str) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """What is before the recurrence ("before") and all of it ("whole"), by the mixers' operations and by the kernels."""
    def compiled(fn: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        return torch.compile(fn, fullgraph=True, dynamic=False)

    recurrence, forms = ours(op, BOUND), {}
    for part in ("before", "whole"):
        for name, fused in (("mixer", False), ("kernels", True)):
            def before(*inputs: Tensor, fused: bool = fused) -> tuple[Tensor, ...]:
                return prepared(op, fused, *inputs)[1:]

            def whole(*inputs: Tensor, fused: bool = fused) -> tuple[Tensor, ...]:
                return from_raw(op, fused, recurrence, *inputs)

            fn = before if part == "before" else whole
            forms |= {f"{part} {name}": fn, f"{part} {name} compiled": compiled(fn)}
    return forms


def measure_raw(name: str, fn: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], bandwidth: float, flush: Tensor) -> str:
    """One row: milliseconds forward and forward and backward, their floors, the backward's peak memory."""
    made = fn(*inputs)
    seeds = [torch.randn_like(x) for x in made]

    def both() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(fn(*inputs), inputs, seeds, allow_unused=True)

    def forward() -> None:
        with torch.no_grad():
            fn(*inputs)

    read, written = (sum(x.nbytes for x in tensors) for tensors in ([x for x in both() if x is not None], made))
    del made
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    both()
    peak = (torch.cuda.max_memory_allocated() - held) / 2 ** 30
    times = milliseconds(forward, flush), milliseconds(both, flush)
    # The backward reads inputs and gradients of results, and writes gradients of inputs.
    floors = [bytes_ / bandwidth * 1e3 for bytes_ in (read + written, 3 * read + 2 * written)]
    shape = "x".join(map(str, inputs[0].shape))
    return f"{name:32s} {shape:16s} {times[0]:7.3f} {times[1]:8.3f} {floors[0]:6.3f} {floors[1]:6.3f} " \
           f"{100 * floors[0] / times[0]:5.1f} {100 * floors[1] / times[1]:5.1f} {peak:6.2f}"


def graph_bytes(op: str) -> str:
    """What the compiler's graphs before the recurrence read and write, in tensors of the queries' size, beside the least."""
    from torch._inductor import config, metrics
    config.force_disable_caches = True
    torch._logging.set_logs(inductor_metrics=True)  # else bytes are not counted
    inputs = raw_inputs(op, 1, 64, 28, 128, "cuda" if torch.cuda.is_available() else "cpu")
    metrics.reset()
    counts = []
    made = raw_forms(op)["before mixer compiled"](*inputs)
    counts.append((metrics.num_bytes_accessed, metrics.generated_kernel_count))
    grads = torch.autograd.grad(made, inputs, [torch.randn_like(x) for x in made], allow_unused=True)
    counts.append((metrics.num_bytes_accessed - counts[0][0], metrics.generated_kernel_count - counts[0][1]))
    read, written = (sum(x.nbytes for x in tensors) for tensors in ([x for x in grads if x is not None], made))
    return f"{op} on {inputs[0].device.type}: " + "; ".join(
        f"{name} {bytes_ / inputs[0].nbytes:.1f} by {kernels} kernels, at least {least / inputs[0].nbytes:.1f}"
        for name, (bytes_, kernels), least in zip(
            ("forward", "backward"), counts, (read + written, 2 * read + written), strict=True))


def raw_errors(op: str, N: int) -> list[str]:
    """Relative RMS errors of the whole against float64, over 256 tokens of 4 heads, by the mixers' operations and the kernels."""
    inputs = raw_inputs(op, 1, 256, 4, N)
    want = [x.detach().double().requires_grad_() for x in inputs]
    right = from_raw(op, False, lambda *x: exact(op, list(x)), *want)[0]
    seed = torch.randn(right.shape, device=right.device)
    right.backward(seed.double())
    lines = []
    for name, fused in (("mixer", False), ("kernels", True)):
        got = [x.detach().clone().requires_grad_() for x in inputs]
        found = from_raw(op, fused, ours(op, BOUND), *got)[0]
        found.backward(seed.to(found.dtype))
        pairs = [(found, right), *((x.grad, y.grad) for x, y in zip(got, want, strict=True))]
        values = [((x.double() - y).norm() / y.norm()).item() for x, y in pairs]
        labels = ("out", "r", "d", "k", "v", *(("gate",) if op == "rwkv6" else ("a", "v_first", "v_mix")))
        lines.append(f"{op} {name} errors: " + " ".join(f"{n} {e:.1e}" for n, e in zip(labels, values, strict=True)))
    return lines


def replayed(fn: Callable[[int], object], sets: int, repeats: int = 20) -> float:
    """Milliseconds of one call, from replays of a CUDA graph that goes once through all sets of states."""
    fn(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            fn(i)
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) / sets


def decode(op: str, batch: int, H: int, N: int, by_slots: bool) -> str:
    """One token of every row, states in place, beside a copy of the same states; more states than the L2 cache holds.

    by_slots: each row has its state anywhere in one pool, in no order.
    """
    sets = max(4, math.ceil(2 ** 28 / (batch * H * N * N * 4)))
    states = torch.randn(sets, batch, H, N, N, device="cuda")
    target = torch.empty_like(states)
    inputs = [x[:, 0].detach() for x in draw(op, batch, 1, H, N, torch.bfloat16)]
    pool = states.flatten(0, 1)
    slots = torch.randperm(len(pool), device="cuda").to(torch.int32).view(sets, batch)

    def step(i: int) -> object:
        where = (pool, slots[i]) if by_slots else (states[i], None)
        if op == "rwkv7":
            return wkv7_step(*inputs, where[0], slots=where[1])
        return wkv6_step(*inputs, where[0], scale=N ** -0.5, slots=where[1])

    ours, copied = replayed(step, sets), replayed(lambda i: target[i].copy_(states[i]), sets)
    moved = 2 * states[0].nbytes + 2 * (len(inputs) + 1) * inputs[0].numel()
    rate = 100 * moved / (2 * states[0].nbytes) * copied / ours
    return (f"{op} step{' by slots' if by_slots else ''}   batch {batch:4d}  {1e3 * ours:8.2f} us   "
            f"copy of the state {1e3 * copied:8.2f} us   {rate:5.1f} % of its speed")


def decode_model(arch: str, batches: list[int], profiled: bool, bandwidth: float) -> list[str]:
    """Tokens a second of a student of Qwen2.5-7B's shape, random weights: one CUDA graph a token, greedy."""
    from bench.step import random_model
    from radlads.backends.torch.decode import Rows, captured, logits_of
    from radlads.shapes import SHAPES
    model = random_model(SHAPES["qwen2.5-7b"].as_student(arch), "cuda").requires_grad_(False)
    read = sum(x.nbytes for name, x in model.named_parameters() if not name.endswith("embed_tokens.weight"))
    lines = []
    for batch in batches:
        rows = Rows(model, batch, 1)
        tokens = torch.zeros(batch, dtype=torch.long, device="cuda")

        def step(rows: Rows = rows, tokens: Tensor = tokens) -> None:
            tokens.copy_(logits_of(model, rows.step(tokens)).argmax(-1))

        run = captured(step, rows, torch.Generator("cuda"))
        took = milliseconds(run, torch.empty(0, device="cuda"), 20)
        states = 2 * sum(x.nbytes for layer in rows.layers for name, x in layer.items() if name == "wkv")
        rate = (read + states) / took * 1e3
        lines.append(f"{arch} 7B graph{' by few kernels' if rows.fused else ''}  batch {batch:4d}  {took:7.3f} ms a token  "
                     f"{1e3 * batch / took:9.0f} tok/s  {rate / 1e12:5.2f} TB/s of weights and states, "
                     f"{100 * rate / bandwidth:.0f} % of a copy")
        if profiled:
            lines.append(f"  {kernels_of(run)}")
    return lines


def kernels_of(run: Callable[[], object]) -> str:
    """Milliseconds and launches of each kernel of one call, the longest first, and how many launches in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    rows = sorted(((e.self_device_time_total / 3e3, e.count // 3, e.key) for e in trace.key_averages()
                   if e.self_device_time_total), reverse=True)
    top = "  ".join(f"{key.split('<')[0].removesuffix('_kernel')[-40:]} {ms:.3f}/{count}" for ms, count, key in rows[:12])
    return f"{sum(row[1] for row in rows)} launches, {sum(row[0] for row in rows):.3f} ms in kernels: {top}"


def geometric_means(rows: list[tuple[str, int, float, float]]) -> list[str]:
    """Per op and head size, over the shapes: percent of the floor forward and forward+backward."""
    lines = []
    for op, N in dict.fromkeys(row[:2] for row in rows):
        part = [row[2:] for row in rows if row[:2] == (op, N)]
        means = [math.exp(statistics.fmean(math.log(x) for x in column)) for column in zip(*part, strict=True)]
        lines.append(f"{op} head size {N}: {means[0]:.1f} and {means[1]:.1f} % of the floor over {len(part)} shapes")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=SHAPES, help="BxTxHxN, comma-separated")
    parser.add_argument("--ops", default="rwkv7,rwkv6", help="rwkv7, rwkv6 or both")
    parser.add_argument("--peers", action="store_true", help="also time flash-linear-attention (tunes for minutes when cold)")
    parser.add_argument("--peer-configs", type=int, metavar="N", help="their tuners try at most N configurations of a kernel")
    parser.add_argument("--cold", action="store_true", help="begin with an empty cache of compiled kernels")
    parser.add_argument("--profile", action="store_true", help="also print milliseconds per kernel")
    parser.add_argument("--float32-gates", action="store_true")
    parser.add_argument("--raw", action="store_true", help="time from a mixer's projections, fused and by the mixers' operations")
    parser.add_argument("--graph-bytes", action="store_true", help="--raw: count the compiler's reads and writes, time nothing")
    parser.add_argument("--decode", action="store_true", help="time one token in place at batch 1, 32 and 128 instead")
    parser.add_argument("--slots", action="store_true", help="--decode: each row's state anywhere in one pool, in no order")
    parser.add_argument("--decode-model", action="store_true", help="time a whole model of 7B, a token at a time, instead")
    parser.add_argument("--step-rows", type=int, metavar="N",
                        help="--decode-model: a layer by few kernels at batches up to N (at most 8; 0: by its modules)")
    parser.add_argument("--batches", default="1,8,64,128", help="--decode-model: rows, comma-separated")
    parser.add_argument("--no-segments", action="store_true", help="long sequences whole")
    parser.add_argument("--no-errors", action="store_true", help="times only: fewer kernels to compile")
    parser.add_argument("--unbounded", action="store_true", help="RWKV-7 without the decay bound")
    options = parser.parse_args()
    if options.graph_bytes:
        print(*(graph_bytes(op) for op in options.ops.split(",")), sep="\n")
        return
    if not torch.cuda.is_available():
        sys.exit("bench/wkv.py needs an NVIDIA or AMD GPU")
    if options.cold:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="cold")
    if options.peer_configs:
        limit_tuning(options.peer_configs)
    torch.manual_seed(0)
    segments.SEGMENTS = not options.no_segments
    if options.step_rows is not None:
        layer_step.MOST_ROWS = dict.fromkeys(layer_step.MOST_ROWS, options.step_rows)
    flush = torch.empty(2 ** 26, device="cuda")
    bandwidth = copy_bandwidth(flush)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    if options.raw:
        rows = []
        for op in options.ops.split(","):
            for shape in options.shapes.split(","):
                sizes = [int(size) for size in shape.split("x")]
                if not any(row.startswith(op) for row in rows) and not options.no_errors:
                    print(*raw_errors(op, sizes[3]), sep="\n", flush=True)
                inputs = raw_inputs(op, *sizes)
                for name, fn in raw_forms(op).items():
                    rows.append(measure_raw(f"{op} {name}", fn, inputs, bandwidth, flush))
                    print(rows[-1], flush=True)
        print(f"{'form':32s} {'BxTxHxN':16s} {'fwd ms':>7s} {'f+b ms':>8s} {'floors ms':>13s} {'% of floor':>11s} {'GiB':>6s}")
        print(*rows, sep="\n")
        return
    if options.decode:
        for op in options.ops.split(","):
            for batch in (1, 32, 128):
                print(decode(op, batch, 28, 128, options.slots), flush=True)
        return
    if options.decode_model:
        for op in options.ops.split(","):
            batches = [int(batch) for batch in options.batches.split(",")]
            print(*decode_model(op, batches, options.profile, bandwidth), sep="\n", flush=True)
            torch.cuda.empty_cache()
        return
    gates = torch.float32 if options.float32_gates else torch.bfloat16
    rows, accuracy, shares = [], [], []
    for op in options.ops.split(","):
        fn = ours(op, None if options.unbounded else BOUND)
        for shape in options.shapes.split(","):
            inputs = draw(op, *map(int, shape.split("x")), gates)
            if not options.no_errors and not any(line.startswith(op) for line in accuracy):
                accuracy.append(f"{op} errors: {errors(op, fn, inputs)}")
            forward, both, row = measure(f"radlads {op}", op, fn, inputs, bandwidth, flush, options.profile)
            rows.append(row)
            shares.append((op, inputs[0].shape[-1], *(float(x) for x in row.split()[-3:-1])))
            for name, peer in (peers(op) if options.peers else {}).items():
                peer_forward, peer_both, row = measure(name, op, peer, inputs, bandwidth, flush, options.profile)
                rows.append(f"{row} {peer_forward / forward:6.2f} {peer_both / both:6.2f}")
            print(rows[-1], flush=True)
    print(*accuracy, sep="\n")
    print(f"{'op':28s} {'BxTxHxN':16s} {'fwd ms':>7s} {'f+b ms':>8s} {'floors ms':>13s} {'% of floor':>11s} {'GiB':>6s} "
          "peer/ours fwd, f+b")
    print(*rows, *geometric_means(shares), sep="\n")


if __name__ == "__main__":
    main()
