"""Times steps 1 and 2 of a conversion on one GPU: ours and the published form, from the same weights and batch.

Run: python bench/step.py [--shape qwen2.5-7b] [--layers 3,6] [--stages align,distill] [--batches 12x512] [--forms ours,upstream]
Weights are random, of a known teacher's shape. Prints one row per stage, batch and form, last: tokens per second, the share of
the measured bf16 product rate that model FLOPs reach (MFU: no recomputation counted, the update included), peak memory as the
driver sees it, the GPU's idle share, the first step (compilation included), and how far its loss is from the published form's
at the same weights. Then how many times as fast as the fastest published form ours is, the plan of `radlads plan` beside what
was measured and, from two numbers of layers, the whole model's GPU-hours and price.

Forms: "ours"; "ours-no-graph" is without CUDA graphs; "upstream" is eager, with the KL of 512 tokens at a time, checkpointing
in step 2 and torch's fused AdamW on float32 masters; "upstream-no-checkpoint" without checkpointing; both with our recurrence,
or with flash-linear-attention's at its best setting: "upstream-fla", "upstream-fla-no-checkpoint". Its tuners try all their
configurations, which takes minutes, or with --tune N at most N of each kernel, spread over all.

Several of these can be prepared at once and timed in turn: with --warm-up everything is compiled on two layers first, and with
--turn FILE the timing begins when that file is there.
"""
import argparse
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from radlads.backends.torch import optim
from radlads.backends.torch.compiled import compiled_layers
from radlads.backends.torch.graphed import Graphed
from radlads.backends.torch.kernels import prologue
from radlads.backends.torch.memory import peak_gpu_bytes
from radlads.backends.torch.mixers import rwkv7 as rwkv7_mixer
from radlads.backends.torch.model import Model
from radlads.backends.torch.objectives import alignment_errors, objective
from radlads.backends.torch.optim import Optimizer, trainable
from radlads.backends.torch.state import MixContext, empty_state
from radlads.costs import GIB, GPUS, Gpu, flops_per_token, gpu_called, plan_stage
from radlads.recipe import Parallel, Stage
from radlads.shapes import SHAPES
from radlads.spec import ModelSpec

DEVICE = "cuda"
TINY = ModelSpec("qwen2", 128, 256, 4, 2, 1, 64, 1000, rope_theta=1e6, qkv_bias=True)
# Projected from measured steps of 7B by their FLOPs.
LARGER = ("qwen2.5-32b", "qwen2.5-72b")
RATES = {"align": {"lr": 1e-3, "lr_final": 1e-5}, "distill": {"lr": 1e-5}}
TOKENS = {"align": 100_000_000, "distill": 500_000_000}
# Kernels by what they do, the first that fits.
KINDS = {
    "update": r"adamw|square_kernel|multi_tensor|FusedAdam",
    "recurrence": r"wkv|dplr|rwkv",
    "attention": r"flash|fmha|attention|softmax_warp",
    "loss": r"kl_|fill_rows|scale_kernel|log_softmax|kl_div",
    "products": r"gemm|nvjet|cutlass|cublas|splitK|gemv",
    "rest": r"",
}


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


def tune_few(limit: int) -> None:
    """Let Triton's tuners try at most `limit` configurations of a kernel, which are compiled together."""
    from concurrent.futures import ThreadPoolExecutor

    import triton
    from triton.runtime.autotuner import Autotuner

    pool, prune = ThreadPoolExecutor(8), Autotuner.prune_configs

    def few(self: Autotuner, kwargs: dict[str, object]) -> list[triton.Config]:
        configs = list(prune(self, kwargs))
        configs = configs[:: -(-len(configs) // limit)]
        try:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                for config in configs:
                    self.fn.run(*self.nargs.values(), **{**kwargs, **config.all_kwargs(), "warmup": True})
        except Exception as error:
            print(f"compiled one by one: {error!r}", flush=True)
        return configs

    Autotuner.prune_configs = few


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


@contextmanager
def recurrence_of(fla: bool) -> Iterator[None]:
    """Flash-linear-attention's recurrence in the mixers while the block runs, where it is wanted."""
    if not fla:
        yield
        return
    from fla.ops.rwkv7 import chunk_rwkv7

    def wkv7(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None = None, *, scale: float,
             min_log_w: float | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if state is not None or cu_seqlens is not None:
            raise ValueError("the published form begins every sequence without a state")
        return chunk_rwkv7(r, log_w, k, v, a, b, scale=scale, safe_gate=True, lower_bound=min_log_w, chunk_size=64)

    before, rwkv7_mixer.wkv7 = rwkv7_mixer.wkv7, wkv7
    try:
        yield
    finally:
        rwkv7_mixer.wkv7 = before


def profiled(step: Callable[[], object], heading: str) -> float:
    """Share of a step's time in which the GPU runs nothing; prints the time by kind of kernel and the largest kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - began
    rows = sorted(((e.self_device_time_total / 1e3, e.count, e.key) for e in trace.key_averages()), reverse=True)
    busy = sum(ms for ms, *_ in rows)
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for ms, count, key in rows:
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, key, re.IGNORECASE))
        kinds[kind][0] += ms
        kinds[kind][1] += count
    print(f"   {heading}: {busy:.1f} ms in {sum(count for _, count, _ in rows)} kernels, {wall * 1e3:.1f} by the clock; "
          + ", ".join(f"{kind} {ms:.1f} ({count:.0f})" for kind, (ms, count) in kinds.items()))
    print("   " + "  ".join(f"{key[:44]} {ms:.1f}/{count}" for ms, count, key in rows[:12]), flush=True)
    return 1 - busy / 1e3 / wall


def draw(spec: ModelSpec, batch: tuple[int, int]) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(1)
    return torch.randint(0, spec.V, (batch[0], batch[1] + 1), device=DEVICE, generator=generator)


def measure_form(stage: Stage, form: str, student: Model, teacher: Model, samples: Tensor, wanted: float, rate: float,
                 options: argparse.Namespace) -> tuple[str, float, float]:
    """(row, seconds of a step, seconds of its update)."""
    batch, ours = (len(samples), samples.shape[1] - 1), form.startswith("ours")
    optim.adamw_has_kernel = optim_has_kernel if ours else lambda weight: False
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    parameters = trainable(student, stage.train)
    optimizer = Optimizer(parameters, stage)
    updates, number = [], iter(range(1000))

    def work(given: Tensor, share: Tensor) -> Tensor:
        found = objective(stage, student, teacher, given).loss
        (found * share).backward()
        return found.detach().float()[None]

    graphed = Graphed(work, list(parameters.values())) if form == "ours" else None
    one = torch.ones((), device=DEVICE)

    def step() -> Tensor:
        if graphed is not None:
            found = graphed(samples, 1.0, True)
        elif ours:
            found = work(samples, one)
        else:
            found = upstream_loss(stage, student, teacher, samples, "no-checkpoint" not in form)
            found.backward()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        update = optimizer.step(next(number))
        end.record()
        updates.append((start, end, update.lost))
        return found.detach()

    differs = float(step()) / wanted - 1
    cold = time.perf_counter() - began
    step()
    times = []
    for _ in range(options.repeats):
        # One step at a time queues behind another, as in the trainer.
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 2e3)
    peak = peak_gpu_bytes() / GIB
    took = statistics.median(times)
    update = statistics.median(a.elapsed_time(b) for a, b, _ in updates[2:]) / 1e3
    idle = float("nan")
    if options.profile:
        idle = profiled(step, f"{stage.kind} {student.spec.L} layers {batch[0]}x{batch[1]} {form}")
    tokens = batch[0] * batch[1]
    mfu = flops_per_token(stage, teacher.spec, student.spec) * tokens / took / rate
    lost = "" if updates[-1][2] is None else f" {int(updates[-1][2]):8d}"
    row = (f"{stage.kind:8s} {student.spec.L:3d} {batch[0]:3d}x{batch[1]:<5d} {form:26s} {tokens / took:9.0f} {100 * mfu:5.1f} "
           f"{took * 1e3:8.1f} {update * 1e3:7.1f} {peak:6.1f} {100 * idle:5.1f} {cold:6.1f} {differs:9.1e}{lost}")
    print(row, flush=True)
    if form == "ours":
        PLANS.append(planned(stage, student, teacher, took, peak))
    return row, took, update


def planned(stage: Stage, student: Model, teacher: Model, took: float, peak: float) -> str:
    """What the planner says of these very steps on this GPU, and how far it is off."""
    gpu = gpu_called(torch.cuda.get_device_name()) or GPUS["h100"]
    roomy = Gpu(gpu.name, 1e6, gpu.flops, gpu.bandwidth, gpu.link, gpu.measured)
    how = Parallel(recompute="never")
    plan = plan_stage(stage, teacher.spec, student.spec, how, 1, roomy, "bfloat16")
    ms = plan.seconds / plan.steps * 1e3
    return (f"{stage.kind:8s} {student.spec.L:3d} x {student.spec.D:<5d} {stage.batch_size:3d}x{stage.seq_len:<5d} {ms:9.1f} "
            f"{took * 1e3:9.1f} {100 * (ms / took / 1e3 - 1):+6.0f}   {plan.peak_gib:7.1f} {peak:7.1f} "
            f"{100 * (plan.peak_gib / peak - 1):+6.0f}")


def measure(stage: Stage, form: str, student: Model, teacher: Model, batch: tuple[int, int], rate: float,
            options: argparse.Namespace) -> tuple[str, float, float]:
    samples = draw(student.spec, batch)
    ours = form.startswith("ours")
    with torch.no_grad():  # the published form, at these very weights
        wanted = float(upstream_loss(stage, student, teacher, samples, checkpointing=False))
    with compiled_layers(student, teacher, wanted=ours), recurrence_of("fla" in form):
        return measure_form(stage, form, student, teacher, samples, wanted, rate, options)


optim_has_kernel = optim.adamw_has_kernel


def matmul_rate() -> float:
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(300):  # long enough to warm the card up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 8192**3 / statistics.median(times) * 1e3


def run_stage(kind: str, shape: ModelSpec, layers: int, rate: float,
              options: argparse.Namespace) -> dict[tuple[str, str], tuple[float, float]]:
    """Rows of one stage at one number of layers: (batch, form) to seconds of a step and of its update."""
    spec = replace(shape, num_layers=layers, mixers=())
    teacher = random_model(spec, DEVICE).requires_grad_(False)
    student = random_model(spec.as_student(options.arch), DEVICE, teacher if kind == "align" else None)
    found = {}
    for text in options.batches.split(","):
        batch = tuple(map(int, text.split("x")))
        stage = Stage(kind=kind, tokens=TOKENS[kind], seq_len=batch[1], batch_size=batch[0], warmup_steps=0, **RATES[kind])
        for form in options.forms.split(","):
            try:
                row, *times = measure(stage, form, student, teacher, batch, rate, options)
            except Exception as error:  # the other forms are worth having
                why = "out of memory" if isinstance(error, torch.OutOfMemoryError) else repr(error)[:200]
                row, times = f"{kind:8s} {layers:3d} {text:9s} {form:26s} {why}", []
                print(row, flush=True)
            student.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            ROWS.append(row)
            if times:
                found[text, form] = tuple(times)
    return found


ROWS: list[str] = []
PLANS: list[str] = []


def beside(kind: str, found: dict[tuple[str, str], tuple[float, float]], layers: int) -> None:
    """How many times as fast as the fastest published form ours is."""
    for text in dict.fromkeys(text for text, _ in found):
        theirs = {form: times[0] for (batch, form), times in found.items() if batch == text and form.startswith("upstream")}
        if theirs and (text, "ours") in found:
            best = min(theirs, key=lambda form: theirs[form])
            print(f"{kind} {layers} layers {text}: ours is {theirs[best] / found[text, 'ours'][0]:.2f} times as fast as {best}")


def project(kind: str, shape: ModelSpec, by_layers: dict[int, dict[tuple[str, str], tuple[float, float]]],
            options: argparse.Namespace) -> None:
    """GPU-hours of the stage for the whole model, by a line through two numbers of layers; larger ones by their FLOPs."""
    counts = sorted(by_layers)
    if len(counts) == 1 and counts[0] != shape.L:
        print(f"{kind}: the whole model's hours follow from two numbers of layers")
        return
    for key in by_layers[counts[-1]]:
        if any(key not in by_layers[n] for n in counts):
            continue
        rows, length = map(int, key[0].split("x"))
        stage = Stage(kind=kind, tokens=TOKENS[kind], seq_len=length, batch_size=rows, **RATES[kind])
        whole = []
        for part in (0, 1):
            last = by_layers[counts[-1]][key][part]
            least = by_layers[counts[0]][key][part]
            slope = (last - least) / (counts[-1] - counts[0]) if len(counts) > 1 else last / counts[-1]
            whole.append(last + slope * (shape.L - counts[-1]))
        for sharing, seconds in (("one GPU's update", whole[0]), ("update over 8 GPUs", whole[0] - whole[1] * 7 / 8)):
            hours = TOKENS[kind] / (rows * length) * seconds / 3600
            own = flops_per_token(stage, shape, shape.as_student(options.arch))
            larger = {name: flops_per_token(stage, SHAPES[name], SHAPES[name].as_student(options.arch)) for name in LARGER}
            if options.shape != "qwen2.5-7b":
                larger = {}
            texts = [f"{name} {hours * f / own:.0f} (${hours * f / own * options.price:.0f})" for name, f in larger.items()]
            print(f"{kind} {key[0]} {key[1]}, {sharing}: {rows * length / seconds:.0f} tok/s, {hours:.1f} GPU-hours, "
                  f"${hours * options.price:.0f}" + ("; by FLOPs " + ", ".join(texts) if texts else ""))


def warm_up(shape: ModelSpec, options: argparse.Namespace) -> None:
    """Run every form once on two layers and a small vocabulary, which compiles what the whole will need."""
    once = argparse.Namespace(**{**vars(options), "repeats": 1, "profile": False})
    for kind in options.stages.split(","):
        run_stage(kind, replace(shape, vocab_size=1024), 2, 1.0, once)
    ROWS.clear()
    PLANS.clear()
    torch.cuda.empty_cache()
    print("warm", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-7b", choices=[*SHAPES, "tiny"])
    parser.add_argument("--layers", default="4,8", help="numbers of layers, comma-separated; 0 for all")
    parser.add_argument("--stages", default="align,distill")
    parser.add_argument("--batches", default="12x512,32x512")
    parser.add_argument("--forms", default="ours,upstream,upstream-no-checkpoint")
    parser.add_argument("--vocab", type=int, help="another vocabulary; a small one to fill the caches of compilers")
    parser.add_argument("--arch", default="rwkv7")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--price", type=float, default=2.5, help="of one GPU-hour")
    parser.add_argument("--profile", action="store_true", help="also the GPU's idle share and the largest kernels")
    parser.add_argument("--tune", type=int, help="configurations of a kernel that flash-linear-attention's tuners may try")
    parser.add_argument("--warm-up", action="store_true", help="compile everything on two layers first")
    parser.add_argument("--turn", type=Path, metavar="FILE", help="begin to time when this file is there")
    parser.add_argument("--fused-prologue", action="store_true", help="every form: kernels of kernels/prologue.py in the mixers")
    options = parser.parse_args()
    prologue.FUSED_PROLOGUE = options.fused_prologue
    if not torch.cuda.is_available():
        sys.exit("bench/step.py needs a GPU")
    shape = TINY if options.shape == "tiny" else SHAPES[options.shape]
    shape = replace(shape, vocab_size=options.vocab or shape.V, mixers=())
    if options.tune:
        tune_few(options.tune)
    if options.warm_up:
        warm_up(shape, options)
    while options.turn and not options.turn.exists():
        time.sleep(0.02)
    rate = matmul_rate()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, matmul {rate / 1e12:.0f} TFLOP/s, {options.shape}", flush=True)
    counts = [int(text) or shape.L for text in options.layers.split(",")]
    results = {kind: {n: run_stage(kind, shape, n, rate, options) for n in counts} for kind in options.stages.split(",")}
    print(f"\n{'stage':8s} {'L':>3s} {'batch':9s} {'form':26s} {'tok/s':>9s} {'MFU %':>5s} {'ms':>8s} {'update':>7s} {'GiB':>6s} "
          f"{'idle%':>5s} {'first s':>6s} {'loss':>9s} {'lost':>8s}", *ROWS, sep="\n")
    print(f"\n{'stage':8s} {'L x D':11s} {'batch':9s} {'plan ms':>9s} {'ms':>9s} {'%':>6s}   {'plan GiB':>7s} {'GiB':>7s} "
          f"{'%':>6s}", *PLANS, sep="\n")
    for kind, by_layers in results.items():
        for layers, found in by_layers.items():
            beside(kind, found, layers)
        project(kind, shape, by_layers, options)


if __name__ == "__main__":
    main()
