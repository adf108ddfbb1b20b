"""Times steps 1 and 2 of a 7B conversion on one GPU: ours and the published form, from the same weights and batch.

Run: python bench/step.py [--layers 3,6] [--stages align,distill] [--batches 12x512] [--forms ours,upstream] [--price 2.5]
Weights are random, of Qwen2.5-7B's width. Prints one row per stage, batch and form, last: tokens per second, the share of the
measured bf16 product rate that model FLOPs reach (MFU: no recomputation counted, the update included), peak memory, the GPU's
idle share, the first step (compilation included), and how far its loss is from the published form's at the same weights.
Then, from two numbers of layers, the whole model's GPU-hours and price. "upstream" is eager, with the KL of 512 tokens at a
time, checkpointing in step 2 (upstream-no-checkpoint: without), and torch's fused AdamW on float32 masters; the recurrence is
ours in every form, or flash-linear-attention's with --fla.
"""
import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from radlads.backends.torch import optim
from radlads.backends.torch.compiled import compiled_layers
from radlads.backends.torch.mixers import rwkv7 as rwkv7_mixer
from radlads.backends.torch.model import Model
from radlads.backends.torch.objectives import alignment_errors, objective
from radlads.backends.torch.optim import Optimizer, trainable
from radlads.backends.torch.state import MixContext, empty_state
from radlads.recipe import Stage
from radlads.spec import ModelSpec

SIZES = {"7b": (3584, 18944, 28, 28, 4, 128, 152064), "tiny": (128, 256, 4, 2, 1, 64, 1000)}
# GFLOP per token of steps 1 and 2, of 32B and 72B relative to 7B.
LARGER = {"32B": (84 / 18.4, 258 / 57.3), "72B": (200 / 18.4, 575 / 57.3)}
RATES = {"align": {"lr": 1e-3, "lr_final": 1e-5}, "distill": {"lr": 1e-5}}
TOKENS = {"align": 100_000_000, "distill": 500_000_000}


def teacher_spec(size: str, layers: int) -> ModelSpec:
    D, F_, _, H, Hkv, N, V = SIZES[size]
    return ModelSpec("qwen2", D, F_, layers, H, Hkv, N, V, rope_theta=1e6, qkv_bias=True)


def random_model(spec: ModelSpec, device: str, shared: Model | None = None) -> Model:
    """bfloat16 weights; what a student takes over from `shared` stays one tensor where nothing trains it."""
    with torch.device("meta"):
        model = Model(spec)
    generator = torch.Generator(device).manual_seed(0)
    taken = {} if shared is None else dict(shared.named_parameters())
    weights = {}
    for name, row in spec.tensors().items():
        if name in taken:
            weights[name] = taken[name].detach()
            continue
        values = torch.randn(row.shape, generator=generator, device=device) * 0.02
        if name.endswith("norm.weight"):
            values += 1
        if name.endswith(".w0"):
            values += torch.linspace(-6.5, -1.5, values.numel(), device=device).view(values.shape)
        weights[name] = values.to(torch.bfloat16)
    model.load_state_dict(weights, assign=True)
    return model


def flops(spec: ModelSpec, stage: str, length: int) -> float:
    """Model FLOPs of a token in `stage` at samples of `length`, recomputation not counted."""
    D, F_, C, ranks = spec.D, spec.F, spec.C, spec.ranks
    projections = 2 * D * C + 2 * D * spec.Ckv
    extra = sum(2 * D * rank for rank in (ranks.decay, ranks.iclr, ranks.value_residual, ranks.gate))
    softmax, recurrence = 2 * length * C, 9 * C * spec.N
    teacher = 2 * (projections + 3 * D * F_) + softmax
    mixer = 2 * (projections + extra) + recurrence
    head = 2 * D * spec.V
    if stage == "align":
        # The mixers' inputs need no gradient: of the products only those behind the projections have two backward ones.
        return spec.L * (teacher + mixer + 2 * (projections + extra) + 2 * (C * D + extra / 2) + 2 * recurrence)
    return spec.L * (teacher + 3 * (mixer + 6 * D * F_)) + 4 * head


def upstream_loss(stage: Stage, student: Model, teacher: Model, samples: Tensor, checkpointing: bool) -> Tensor:
    tokens = samples[:, :-1]
    if stage.kind == "align":
        return alignment_errors(student, teacher, tokens).mean()
    with torch.no_grad():
        wanted = teacher.model(tokens)[0].flatten(0, 1)
    x, first = student.model.embed_tokens(tokens), None
    context, _ = student.model.context(tokens, empty_state(student.spec, len(tokens), tokens.device), None, None, x.dtype)
    for layer in student.model.layers:
        def run(x: Tensor, first: Tensor | None, layer: torch.nn.Module = layer) -> tuple[Tensor, Tensor | None]:
            own = MixContext(context.cos_sin, carry={} if first is None else {"v_first": first})
            return layer(x, own, {})[0], own.carry.get("v_first")
        x, first = checkpoint(run, x, first, use_reentrant=False) if checkpointing else run(x, first)
    hidden = student.model.norm(x).flatten(0, 1)

    def part(hidden: Tensor, wanted: Tensor) -> Tensor:
        target = F.linear(wanted, teacher.head).float().log_softmax(-1)
        return F.kl_div(F.linear(hidden, student.head).float().log_softmax(-1), target, log_target=True, reduction="sum")

    parts = zip(hidden.split(512), wanted.split(512), strict=True)
    return sum(checkpoint(part, *pair, use_reentrant=False) for pair in parts) / len(hidden)


def use_fla() -> None:
    from fla.ops.rwkv7 import chunk_rwkv7

    def wkv7(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *_: object, **__: object):
        return chunk_rwkv7(r, log_w, k, v, a, b, scale=1.0, safe_gate=True, lower_bound=-0.6065306597126334, chunk_size=64)

    rwkv7_mixer.wkv7 = wkv7


def idle_share(step: Callable[[], object]) -> float:
    """Share of a step's time in which the GPU runs nothing, and how much of the step the largest kernels take, printed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    rows = sorted(((e.self_device_time_total / 1e3, e.count, e.key) for e in trace.key_averages()), reverse=True)
    busy = sum(ms for ms, *_ in rows)
    print("   " + "  ".join(f"{key[:44]} {ms:.1f}/{count}" for ms, count, key in rows[:14]), flush=True)
    return 1 - busy / 1e3 / wall


def draw(spec: ModelSpec, batch: tuple[int, int]) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randint(0, spec.V, (batch[0], batch[1] + 1), device="cuda", generator=generator)


def measure_form(stage: Stage, form: str, student: Model, teacher: Model, samples: Tensor, wanted: float, rate: float,
                 options: argparse.Namespace) -> tuple[str, float, float]:
    """(row, seconds of a step, seconds of its update)."""
    batch = (len(samples), samples.shape[1] - 1)
    optim.adamw_has_kernel = optim_has_kernel if form == "ours" else lambda weight: False
    parameters = trainable(student, stage.train)
    optimizer = Optimizer(parameters, stage)
    updates, number = [], iter(range(1000))

    def loss() -> Tensor:
        if form == "ours":
            return objective(stage, student, teacher, samples).loss
        return upstream_loss(stage, student, teacher, samples, form == "upstream")

    def step() -> Tensor:
        found = loss()
        found.backward()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        optimizer.step(next(number))
        end.record()
        updates.append((start, end))
        return found.detach()

    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    began = time.perf_counter()
    differs = float(step()) / wanted - 1
    cold = time.perf_counter() - began
    torch.cuda.reset_peak_memory_stats()
    step()
    times = []
    for _ in range(options.repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    peak = torch.cuda.max_memory_allocated() / 2**30
    idle = idle_share(step) if options.profile else float("nan")
    took = statistics.median(times)
    update = statistics.median(a.elapsed_time(b) for a, b in updates[2:]) / 1e3
    tokens = batch[0] * batch[1]
    mfu = flops(student.spec, stage.kind, batch[1]) * tokens / took / rate
    row = (f"{stage.kind:8s} {student.spec.L:3d} {batch[0]:3d}x{batch[1]:<5d} {form:22s} {tokens / took:9.0f} {100 * mfu:5.1f} "
           f"{took * 1e3:8.1f} {update * 1e3:7.1f} {peak:6.1f} {100 * idle:5.1f} {cold:6.1f} {differs:9.1e}")
    print(row, flush=True)
    optimizer = None
    return row, took, update


def measure(stage: Stage, form: str, student: Model, teacher: Model, batch: tuple[int, int], rate: float,
            options: argparse.Namespace) -> tuple[str, float, float]:
    samples = draw(student.spec, batch)
    with torch.no_grad():  # the published form, at these very weights
        wanted = float(upstream_loss(stage, student, teacher, samples, checkpointing=False))
    with compiled_layers(student, teacher, wanted=form == "ours"):
        return measure_form(stage, form, student, teacher, samples, wanted, rate, options)


optim_has_kernel = optim.adamw_has_kernel


def matmul_rate() -> float:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(300):  # long enough to warm the card up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 8192**3 / statistics.median(times) * 1e3


def run_stage(kind: str, layers: int, rate: float, options: argparse.Namespace) -> dict[tuple[str, str], tuple[float, float]]:
    """Rows of one stage at one number of layers: (batch, form) to seconds of a step and of its update."""
    spec = teacher_spec(options.size, layers)
    teacher = random_model(spec, "cuda").requires_grad_(False)
    student = random_model(spec.as_student(options.arch), "cuda", teacher if kind == "align" else None)
    found = {}
    for text in options.batches.split(","):
        batch = tuple(map(int, text.split("x")))
        stage = Stage(kind=kind, tokens=TOKENS[kind], seq_len=batch[1], batch_size=batch[0], warmup_steps=0, **RATES[kind])
        for form in options.forms.split(","):
            try:
                row, *times = measure(stage, form, student, teacher, batch, rate, options)
            except torch.OutOfMemoryError:
                row, times = f"{kind:8s} {layers:3d} {text:9s} {form:22s} out of memory", []
                print(row, flush=True)
            student.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            ROWS.append(row)
            if times:
                found[text, form] = tuple(times)
    return found


ROWS: list[str] = []


def project(kind: str, by_layers: dict[int, dict[tuple[str, str], tuple[float, float]]], price: float) -> None:
    """GPU-hours of the stage for the whole 7B model, by a line through two numbers of layers; larger ones by their FLOPs."""
    counts = sorted(by_layers)
    for key in by_layers[counts[-1]]:
        if any(key not in by_layers[n] for n in counts):
            continue
        batch = tuple(map(int, key[0].split("x")))
        whole = []
        for part in (0, 1):
            last = by_layers[counts[-1]][key][part]
            least = by_layers[counts[0]][key][part]
            slope = (last - least) / (counts[-1] - counts[0]) if len(counts) > 1 else last / counts[-1]
            whole.append(last + slope * (28 - counts[-1]))
        for sharing, seconds in (("one GPU's update", whole[0]), ("update over 8 GPUs", whole[0] - whole[1] * 7 / 8)):
            hours = TOKENS[kind] / (batch[0] * batch[1]) * seconds / 3600
            larger = ", ".join(f"{name} {hours * by_flops[kind == 'distill']:.0f}" for name, by_flops in LARGER.items())
            speed = batch[0] * batch[1] / seconds
            print(f"{kind} {key[0]} {key[1]}, {sharing}: 7B {speed:.0f} tok/s, {hours:.1f} GPU-hours, "
                  f"${hours * price:.0f}; by FLOPs {larger} GPU-hours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="4,8", help="numbers of layers, comma-separated; step 1 may take all 28")
    parser.add_argument("--stages", default="align,distill")
    parser.add_argument("--batches", default="12x512,32x512")
    parser.add_argument("--forms", default="ours,upstream,upstream-no-checkpoint")
    parser.add_argument("--arch", default="rwkv7")
    parser.add_argument("--size", default="7b", choices=SIZES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--price", type=float, default=2.5, help="of one GPU-hour")
    parser.add_argument("--profile", action="store_true", help="also the GPU's idle share and the largest kernels")
    parser.add_argument("--fla", action="store_true", help="flash-linear-attention's recurrence (it tunes for minutes)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/step.py needs a GPU")
    if options.fla:
        use_fla()
    rate = matmul_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, matmul {rate / 1e12:.0f} TFLOP/s", flush=True)
    results = {kind: {n: run_stage(kind, n, rate, options) for n in map(int, options.layers.split(","))}
               for kind in options.stages.split(",")}
    print(f"\n{'stage':8s} {'L':>3s} {'batch':9s} {'form':22s} {'tok/s':>9s} {'MFU %':>5s} {'ms':>8s} {'update':>7s} {'GiB':>6s} "
          f"{'idle%':>5s} {'first s':>6s} {'loss':>9s}", *ROWS, sep="\n")
    for kind, by_layers in results.items():
        project(kind, by_layers, options.price)


if __name__ == "__main__":
    main()
