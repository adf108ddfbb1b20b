"""What a run will take: memory of each GPU, operations, time and price, by arithmetic from spec and recipe.

Standard library and spec only. Operations are model FLOPs: two per multiply-add of every matrix that is used, the recurrence
as `Mixer.scan_flops` counts it; nothing that is computed twice counts twice, but it takes time. docs/plan.md has the terms.
"""

from dataclasses import asdict, dataclass, replace
from functools import cache
from math import ceil
from typing import Any

from radlads.mixers import MIXERS
from radlads.recipe import Parallel, Recipe, Stage
from radlads.spec import ModelSpec
from radlads.trained import trained_names

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory a process can use, bf16 matmul rate, memory and link bandwidth (to the others of its host, per GPU)."""

    name: str
    gib: float
    flops: float
    bandwidth: float
    link: float
    measured: bool  # on random data with PyTorch; otherwise scaled from the data sheet


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 78.0, 780e12, 3.0e12, 329e9, True),
        Gpu("h200", 139.0, 790e12, 4.3e12, 329e9, True),
        Gpu("a100", 78.0, 260e12, 1.7e12, 220e9, False),
        Gpu("b200", 176.0, 1600e12, 7.0e12, 650e9, False),
    )
}


def gpu_called(name: str, gpus: dict[str, Gpu] = GPUS) -> Gpu | None:
    """The GPU that a driver calls "NVIDIA H100 80GB HBM3"; None for one that the table does not know."""
    words = name.lower().replace("-", " ").split()
    return next((gpu for key, gpu in gpus.items() if key in words), None)


# What the trainer takes on one H100 (docs/log.md has the runs). Matrix products: the share of the matmul rate that large ones
# reach, the part of the traffic of their inputs and outputs that comes on top, and seconds of each in which it fills and empties
# the GPU, which is most of a small one.
PRODUCT_RATE, PRODUCT_TRAFFIC, PRODUCT_SECONDS = 0.95, 0.4, 4e-6
# Bytes of memory traffic that the rest is worth, for each token: of the recurrence a channel, forward and backward, with every
# multiprocessor at work; of everything between for each byte that eager layers keep for the backward pass; of the loss a logit.
RECURRENCE_BYTES = {"rwkv6": 107.0, "rwkv7": 128.0}
BETWEEN, LOSS_TRAFFIC = 3.3, 16.0
# The recurrence runs one program a sequence and head on so many multiprocessors; with few, chunks are worked on at once, and it
# takes at most so many times as long a token.
MULTIPROCESSORS, FEW_PROGRAMS = 132, 2.1
# How much more recurrence and rest take where the forward is done again.
AGAIN = 1.37
# Kernels of a layer and micro-batch, and seconds between two of them.
KERNELS, KERNEL_SECONDS = {"align": 90, "distill": 165, "lm": 130}, 1e-6
# Share of communication that computing hides, where there is enough of it.
HIDDEN = 0.9
# Seconds that Python takes for a layer of a micro-batch that is not replayed from a CUDA graph.
HOST_SECONDS = 6e-3
# CUDA's context, libraries, NCCL's buffers, and blocks that the allocator holds but cannot use.
OVERHEAD_GIB, FRAGMENTATION = 0.5, 0.01
# NCCL's buffers and FSDP's gathered units in passing.
NCCL_GIB = 1.0
# Logits that exist at once in the loss.
LOGITS_BYTES = 0.76 * GIB
# Where quality is measured in the middle of a stage: tokens whose log-probabilities exist at once, of both models, and bytes of
# these and of what is made of them for each; CUDA graphs keep their memory meanwhile.
MEASURED_TOKENS, MEASURED_BYTES = 1024, 20
MOMENT_BYTES = {"float32": 8.0, "bfloat16": 4.0, "int8": 2 + 8 / 256}
# Bytes a token leaves for the backward pass in one layer: per unit of (D, C, F), for bf16; counted on the model in a test.
MIXER_BYTES = {"softmax": (2, 16), "rwkv6": (24, 40), "rwkv7": (2, 55)}
NORM_BYTES, FEED_FORWARD_BYTES = 12, 8
# The same for compiled layers, which keep less: a share of the mixer's (at head sizes up to 64, and above), and the other two.
# Measured on one H100.
COMPILED_MIXER, COMPILED_NORM, COMPILED_FEED_FORWARD = (0.75, 0.48), 4, 6


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by what they hold."""

    student: float
    teacher: float
    optimizer: float
    gradients: float
    activations: float
    loss: float
    measuring: float
    overhead: float

    @property
    def peak(self) -> float:
        """The most that exists at one time: all of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StagePlan:
    """One stage: how it is spread and what it takes. Times are in seconds, FLOPs for the whole stage."""

    name: str
    number: int
    tokens: int
    steps: int
    micro_batch: int
    layout: str
    teacher: str
    recompute: bool
    flops_per_token: float
    flops: float
    compute: float
    communication: float
    optimizer: float
    seconds: float
    memory: Memory
    fits: bool

    @property
    def peak_gib(self) -> float:
        """Peak memory of one GPU."""
        return self.memory.peak / GIB


@dataclass(frozen=True)
class Plan:
    """A whole run on `gpus` of one kind."""

    gpu: Gpu
    gpus: int
    parameters: int
    stages: tuple[StagePlan, ...]

    @property
    def hours(self) -> float:
        """Wall-clock hours of training."""
        return sum(stage.seconds for stage in self.stages) / 3600

    @property
    def gpu_hours(self) -> float:
        """Hours times GPUs."""
        return self.hours * self.gpus

    @property
    def fits(self) -> bool:
        """Whether every stage fits the memory."""
        return all(stage.fits for stage in self.stages)


def product(shape: tuple[int, ...]) -> int:
    """Number of values of a shape."""
    total = 1
    for size in shape:
        total *= size
    return total


@dataclass(frozen=True)
class Sizes:
    """Parameters by where they stand, and those that mixers train on top of the teacher's projections."""

    mixers: int  # of recurrent layers, all their tensors
    kept: int  # attention of kept layers
    feed_forward: int
    root: int  # embedding, head, norms
    largest_unit: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.mixers + self.kept + self.feed_forward + self.root


@cache
def sizes(spec: ModelSpec) -> Sizes:
    """Parameters of a model by part."""
    mixers = kept = forward = root = 0
    units: dict[str, int] = {}
    for name, row in spec.tensors().items():
        count = product(row.shape)
        parts = name.split(".")
        if ".self_attn." in name or ".mlp." in name:
            unit = ".".join(parts[:4])
            units[unit] = units.get(unit, 0) + count
        if ".self_attn." in name:
            recurrent = MIXERS[spec.mixers[int(parts[2])]].recurrent
            mixers, kept = (mixers + count, kept) if recurrent else (mixers, kept + count)
        elif ".mlp." in name:
            forward += count
        else:
            root += count
    return Sizes(mixers, kept, forward, root, max(units.values()))


@dataclass(frozen=True)
class Products:
    """Matrix products: FLOPs of a token, bytes of its inputs and outputs in bfloat16, and how many there are."""

    flops: float = 0.0
    traffic: float = 0.0
    count: float = 0.0

    def __add__(self, other: "Products") -> "Products":
        return Products(self.flops + other.flops, self.traffic + other.traffic, self.count + other.count)

    def __mul__(self, times: float) -> "Products":
        return Products(self.flops * times, self.traffic * times, self.count * times)


@cache
def products(spec: ModelSpec, *, mixers: bool = True, rest: bool = True, head: bool = True, inner: bool = False) -> Products:
    """A forward pass through the matrices of the recurrent mixers and of the `rest`; `inner` only those that do not read x.

    An inner matrix (an output projection, the second of a low-rank pair) needs the gradient of its input even where x needs none.
    """
    total = Products()
    for name, row in spec.tensors().items():
        shape = [size for size in row.shape if size > 1]
        if len(shape) < 2 or "embed_tokens" in name or not row.read or name.endswith("r_k"):
            continue
        in_mixer = ".self_attn." in name and MIXERS[spec.mixers[int(name.split(".")[2])]].recurrent
        if (in_mixer and not mixers) or (not in_mixer and not rest) or (name == "lm_head.weight" and not head):
            continue
        last = name.rpartition(".")[2]
        if inner and not (name.endswith(("o_proj.weight", "output.weight")) or last.endswith("2")):
            continue
        total += Products(2 * product(row.shape), 2 * sum(shape), 1)
    if spec.tie_embeddings and rest and head:
        total += Products(2 * spec.V * spec.D, 2 * (spec.V + spec.D), 1)
    return total


def trained_products(stage: Stage, teacher: ModelSpec | None, student: ModelSpec) -> Products:
    """The matrix products of training on one token."""
    if stage.kind == "align":
        assert teacher is not None
        mixers = products(student, rest=False)
        # x needs a gradient where trained token shifts mix it.
        inner = mixers if student.mixer.token_shift else products(student, rest=False, inner=True)
        return products(teacher, head=False) + mixers * 2 + inner
    total = products(student) * (2 if stage.train == "decay" else 3)
    return total + products(teacher) if stage.kind == "distill" and teacher is not None else total


def scan_flops(spec: ModelSpec, seq_len: int) -> float:
    """FLOPs a token of the recurrences and of the softmax layers' scores over half the context."""
    total = 0.0
    for name in spec.mixers:
        total += MIXERS[name].scan_flops * spec.H * spec.N**2 if MIXERS[name].recurrent else 2 * seq_len * spec.C
    return total


def recurrent_scan_flops(spec: ModelSpec) -> float:
    """FLOPs a token of the recurrences alone."""
    return float(sum(MIXERS[name].scan_flops * spec.H * spec.N**2 for name in spec.mixers if MIXERS[name].recurrent))


def flops_per_token(stage: Stage, teacher: ModelSpec | None, student: ModelSpec) -> float:
    """Model FLOPs of training on one token."""
    scan = scan_flops(student, stage.seq_len)
    total = trained_products(stage, teacher, student).flops
    if stage.kind == "align":
        assert teacher is not None
        return total + scan_flops(teacher, stage.seq_len) + 3 * recurrent_scan_flops(student)
    if stage.kind == "distill":
        assert teacher is not None
        total += scan_flops(teacher, stage.seq_len)
    return total + (2 if stage.train == "decay" else 3) * scan


@cache
def trained(spec: ModelSpec, train: str) -> int:
    """Parameters of a model that a stage with this `train` trains."""
    rows = spec.tensors()
    return sum(product(rows[name].shape) for name in trained_names(spec, train))


def activation_bytes(
    spec: ModelSpec, *, mixers_only: bool = False, recompute: bool = False, width: int = 2, compiled: bool = False
) -> float:
    """Bytes a token leaves for the backward pass in all layers; `width` is the bytes of an activation."""
    total = 0.0
    share, norm, forward = (
        (COMPILED_MIXER[spec.N > 64], COMPILED_NORM, COMPILED_FEED_FORWARD) if compiled else (1.0, NORM_BYTES, FEED_FORWARD_BYTES)
    )
    for name in spec.mixers:
        if mixers_only and not MIXERS[name].recurrent:
            continue
        d, c = MIXER_BYTES.get(name, MIXER_BYTES["rwkv7"])
        mixer = share * (d * spec.D + c * spec.C)
        if recompute:
            total += 2 * 2 * spec.D + norm * spec.D
        else:
            total += mixer if mixers_only else mixer + norm * spec.D + forward * spec.F
    if recompute:  # and one unit while its backward pass runs
        total += max(forward * spec.F, share * max(c for _, c in MIXER_BYTES.values()) * spec.C)
    return total * width / 2


def memory_of(
    stage: Stage, teacher: ModelSpec | None, student: ModelSpec, how: Parallel, gpus: int, micro: int, precision: str
) -> Memory:
    """Memory of one GPU with a resolved `how` (nothing "auto") and `micro` sequences a forward pass."""
    width = 2 if precision == "bfloat16" else 4
    parts = sizes(student)
    learned, align = trained(student, stage.train), stage.kind == "align"
    sequence, shards = how.sharing(stage.kind), max(1, gpus // how.copies)
    tokens = micro * stage.seq_len / sequence
    accumulating = stage.batch_size * sequence // gpus > micro
    unit = parts.largest_unit
    root = 0 if align else parts.root
    moments = MOMENT_BYTES[how.moments]
    if gpus == 1 or how.layout == "replicated":
        held: float = (parts.mixers if align else parts.total) * width
        optimizer = learned * (moments + (4 if width == 2 and how.masters == "float32" else 0))
        gradients = float(learned * width)
    else:
        held = (parts.mixers if align else parts.total) * width if how.layout == "optimizer" else (root + 2 * unit) * width
        optimizer = (4 * (parts.mixers if align else parts.total) + moments * learned) / shards
        # Units are reduced in float32 as they come; what is being reduced is whole for a moment.
        passing = float((4 + width) * (max(root, 2 * unit) if not align else 2 * unit))
        if how.layout == "optimizer" and accumulating:
            passing = 4.0 * learned
        gradients = 4 * learned / shards + passing
        if how.vocab_heads and not align:
            saved = student.V * student.D * (1 - 1 / gpus)
            held, gradients = held - saved * width, gradients - saved * (4 + width)
    frozen = 0.0
    if teacher is not None and stage.kind != "lm":
        t = sizes(teacher)
        inside = t.kept + t.mixers + t.feed_forward
        share = {"whole": inside, "sharded": inside / shards + 2 * t.largest_unit, "offloaded": 2 * t.largest_unit}[how.teacher]
        frozen = (share + t.root) * width
    recompute = how.recompute == "always" and not align
    compiled = how.compile == "auto"
    alive = tokens * activation_bytes(student, mixers_only=align, recompute=recompute, width=width, compiled=compiled)
    # The teacher's pass leaves nothing but one layer at a time.
    passing_teacher = tokens * (8 * student.F + 16 * student.D) * width / 2 if align else 0.0
    hidden = tokens * student.D * width * (0 if align else 4)
    # The head's gradient is among the gradients.
    loss = 0.0 if align else LOGITS_BYTES * width / 2 + hidden
    lasting = held + frozen + optimizer + gradients + alive + loss
    measured = bool(stage.measure_every or stage.measure_at) and (gpus == 1 or how.layout == "replicated")
    measuring = float(MEASURED_TOKENS * MEASURED_BYTES * student.V) if measured else 0.0
    overhead = (OVERHEAD_GIB + (NCCL_GIB if gpus > 1 else 0)) * GIB + FRAGMENTATION * lasting
    return Memory(held, frozen, optimizer, gradients, alive + passing_teacher, loss, measuring, overhead)


def plan_stage(
    stage: Stage, teacher: ModelSpec | None, student: ModelSpec, how: Parallel, gpus: int, gpu: Gpu, precision: str,
    efficiency: float | None = None,
) -> StagePlan:  # fmt: skip
    """What `stage` takes, "auto" resolved to the fastest way that fits (or to the leanest, where none does)."""
    sequence = how.sharing(stage.kind)
    local = max(1, stage.batch_size * sequence // gpus)
    micro = next(size for size in range(min(stage.micro_batch, local), 0, -1) if local % size == 0)
    ways = [
        replace_how(how, layout, held, recompute)
        for layout in options(how.layout, layouts_of(how, gpus))
        for recompute in options(how.recompute, ("never", "always"))
        for held in options(how.teacher, ("whole", "sharded") if gpus > 1 else ("whole",))
    ]
    found = [time_stage(stage, teacher, student, way, gpus, gpu, micro, precision, efficiency) for way in ways]
    fitting = [plan for plan in found if plan.fits]
    return min(fitting, key=lambda plan: plan.seconds) if fitting else min(found, key=lambda plan: plan.memory.peak)


def layouts_of(how: Parallel, gpus: int) -> tuple[str, ...]:
    """The layouts to choose from on so many GPUs."""
    if gpus == 1:
        return ("optimizer",)
    if how.masters == "none":
        return ("replicated",)
    whole = how.copies == 1 and not how.vocab_heads
    return ("replicated", "optimizer", "full") if whole else ("optimizer", "full")


def options(chosen: str, all_of_them: tuple[str, ...]) -> tuple[str, ...]:
    """The values to try for a setting."""
    return all_of_them if chosen == "auto" else (chosen,)


def replace_how(how: Parallel, layout: str, teacher: str, recompute: str) -> Parallel:
    """`how` with its three choices made."""
    return how.model_copy(update={"layout": layout, "teacher": teacher, "recompute": recompute})


def time_stage(
    stage: Stage, teacher: ModelSpec | None, student: ModelSpec, how: Parallel, gpus: int, gpu: Gpu, micro: int, precision: str,
    efficiency: float | None,
) -> StagePlan:  # fmt: skip
    """Time and memory of a stage spread in one given way."""
    per_token = flops_per_token(stage, teacher, student)
    width = 2 if precision == "bfloat16" else 4
    align, parts = stage.kind == "align", sizes(student)
    recompute = how.recompute == "always" and not align
    again = products(student, head=False) if recompute else Products()
    tokens = stage.tokens_per_step / gpus
    rate = gpu.flops * (1 if width == 2 else 0.5)
    replicated = gpus == 1 or how.layout == "replicated"
    sequence = how.sharing(stage.kind) if gpus > 1 else 1
    passes = max(1, stage.batch_size * sequence // gpus // micro)
    if efficiency is not None:
        compute = tokens * (per_token + again.flops) / (rate * efficiency)
    else:
        work = trained_products(stage, teacher, student) + again
        traffic = PRODUCT_TRAFFIC * work.traffic * width / 2 + traffic_bytes(stage, student, recompute, width, micro)
        compute = tokens * (work.flops / (rate * PRODUCT_RATE) + traffic / gpu.bandwidth)
        compute += passes * (work.count * PRODUCT_SECONDS + student.L * KERNELS[stage.kind] * KERNEL_SECONDS)
        alone = replicated and sequence == 1 and (how.teacher == "whole" or stage.kind == "lm")
        if not (alone and how.cuda_graphs == "auto" and stage.packing == "stream" and not recompute):
            compute = max(compute, passes * student.L * HOST_SECONDS)
    learned = trained(student, stage.train)
    whole = parts.mixers if align else parts.total
    shards = 1 if replicated else max(1, gpus // how.copies)
    optimizer = learned / shards * (14 + 2 * MOMENT_BYTES[how.moments]) / gpu.bandwidth
    # Bytes that travel beside the work, and those that do when it is done.
    beside, after = 0.0, 0.0
    if replicated:
        after = 2.0 * learned * width
    elif how.layout == "optimizer":
        beside = whole * width + 4 * learned
    else:
        beside = passes * (2 * whole * width + 4 * learned)
    if teacher is not None and stage.kind != "lm" and how.teacher != "whole":
        beside += passes * (sizes(teacher).total - sizes(teacher).root) * width
    share = (gpus - 1) / gpus / gpu.link
    communication = beside * share
    exposed = max(communication * (1 - HIDDEN), communication - compute) + after * share
    seconds = stage.steps * (compute + exposed + optimizer)
    memory = memory_of(stage, teacher, student, how, gpus, micro, precision)
    return StagePlan(
        stage.kind, stage.number, stage.steps * stage.tokens_per_step, stage.steps, micro, how.layout, how.teacher, recompute,
        per_token, per_token * stage.steps * stage.tokens_per_step, stage.steps * compute, stage.steps * exposed,
        stage.steps * optimizer, seconds, memory, memory.peak <= gpu.gib * GIB,
    )  # fmt: skip


def traffic_bytes(stage: Stage, student: ModelSpec, recompute: bool, width: int, micro: int) -> float:
    """Bytes of memory traffic a token that all but the matrix products is worth, with `micro` sequences at a time."""
    align, more = stage.kind == "align", AGAIN if recompute else 1.0
    scans = sum(RECURRENCE_BYTES.get(name, RECURRENCE_BYTES["rwkv7"]) for name in student.mixers if MIXERS[name].recurrent)
    # Multiprocessors stand idle while the last programs end.
    programs = micro * student.H / MULTIPROCESSORS
    scans *= min(ceil(programs) / programs, FEW_PROGRAMS)
    between = BETWEEN * activation_bytes(student, mixers_only=align)
    return (more * (scans * student.C + between) + (0 if align else LOSS_TRAFFIC * student.V)) * width / 2


def as_trained(recipe: Recipe, stage: Stage, student: ModelSpec) -> ModelSpec:
    """The student of a stage: one with tied heads may have a head of its own there."""
    return replace(student, tie_embeddings=student.tie_embeddings and not recipe.unties(stage))


def plan_run(
    recipe: Recipe, teacher: ModelSpec | None, student: ModelSpec, gpus: int, gpu: Gpu, efficiency: float | None = None
) -> Plan:
    """The plan of all stages of a recipe."""
    how, precision = recipe.parallel, recipe.precision
    stages = tuple(
        plan_stage(stage, teacher, as_trained(recipe, stage, student), how, gpus, gpu, precision, efficiency)
        for stage in recipe.stages
    )
    return Plan(gpu, gpus, student.parameters(), stages)


def resolved(how: Parallel, stage: StagePlan) -> Parallel:
    """`how` with what the plan of a stage chose."""
    return replace_how(how, stage.layout, stage.teacher, "always" if stage.recompute else "never")


def ways_of(recipe: Recipe, teacher: ModelSpec | None, student: ModelSpec, gpus: int, gpu: Gpu | None) -> dict[str, Parallel]:
    """How each kind of stage is spread with every "auto" resolved, the teacher alike in all; the simplest way on no known GPU."""
    how = recipe.parallel
    if gpu is None:
        simplest = "replicated" if how.masters == "none" else "optimizer"
        plain = {"layout": simplest, "teacher": "whole", "recompute": "never"}
        chosen = {key: value for key, value in plain.items() if getattr(how, key) == "auto"}
        return {stage.kind: how.model_copy(update=chosen) for stage in recipe.stages}
    held = [stage.teacher for stage in plan_run(recipe, teacher, student, gpus, gpu).stages if stage.name != "lm"]
    leanest = next((way for way in ("offloaded", "sharded") if way in held), "whole")
    alike = recipe.model_copy(update={"parallel": how.model_copy(update={"teacher": leanest})})
    return {stage.name: resolved(alike.parallel, stage) for stage in plan_run(alike, teacher, student, gpus, gpu).stages}


def as_json(plan: Plan, price: float | None) -> dict[str, Any]:
    """The plan as plain values (see the interface of `radlads plan --json`)."""
    return {
        "schema": 1,
        "parameters": plan.parameters,
        "gpus": plan.gpus,
        "gpu_type": plan.gpu.name,
        "gpu": asdict(plan.gpu),
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "price": None if price is None else plan.gpu_hours * price,
        "fits": plan.fits,
        "stages": [
            {
                "name": stage.name,
                "stage": stage.number,
                "tokens": stage.tokens,
                "steps": stage.steps,
                "micro_batch": stage.micro_batch,
                "layout": stage.layout,
                "teacher": stage.teacher,
                "recompute": stage.recompute,
                "flops_per_token": stage.flops_per_token,
                "flops": stage.flops,
                "seconds": stage.seconds,
                "seconds_by": {
                    "compute": stage.compute, "communication": stage.communication, "optimizer": stage.optimizer,
                },
                "gpu_hours": stage.seconds * plan.gpus / 3600,
                "tok_s_per_gpu": stage.tokens / stage.seconds / plan.gpus,
                "peak_gib_per_gpu": stage.peak_gib,
                "gib_by": {name: value / GIB for name, value in asdict(stage.memory).items()},
                "fits": stage.fits,
            }
            for stage in plan.stages
        ],
    }  # fmt: skip
