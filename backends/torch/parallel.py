"""Spreading a stage over processes with FSDP2: what is sharded, what is gathered when, and how weights get in and out.

Three layouts of the student. "replicated": each process trains as one alone would, and adds up the gradients of a step with
the others. "optimizer" (ZeRO-2): weights are gathered once a step, gradients are reduced and scattered as they come, float32
masters and moments stay sharded. "full": weights are gathered unit by unit, forward and backward.
A teacher is whole on every GPU, sharded, or sharded in the memory of the CPU. Units are the mixers and feed-forwards.
"""

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from radlads.backends.torch.head import HEAD, untied
from radlads.backends.torch.kernels.kl import TopK
from radlads.backends.torch.load import DTYPES, read_tensor
from radlads.backends.torch.model import Model
from radlads.backends.torch.objectives import objective
from radlads.backends.torch.world import World
from radlads.errors import fail
from radlads.folder import ModelFolder
from radlads.mixers import MIXERS
from radlads.recipe import Parallel, Stage


class Task(nn.Module):
    """The objective of a stage as one module, so that the root of FSDP sees where a step begins and ends."""

    def __init__(self, stage: Stage, student: Model, teacher: Model | None) -> None:
        super().__init__()
        self.stage = stage
        # In a tuple, where nn.Module does not look: step 1 runs nothing of the student but its mixers.
        self.pair = (student, teacher)
        self.trained = nn.ModuleList(mixers_of(student)) if stage.kind == "align" else student
        self.units: list[Any] = []
        self.gathered_once = True
        # Whether mixers and feed-forwards are to keep no activations (see `recomputed`).
        self.recomputes = False

    @property
    def student(self) -> Model:
        """The model that is trained."""
        return self.pair[0]

    def forward(self, sample: Tensor, targets: TopK | None = None) -> tuple[Tensor, Tensor | None]:
        """The loss of sample (B, T + 1), and in step 1 the error of each layer; `targets` stand for the teacher in step 2."""
        found = objective(self.stage, *self.pair, sample, targets)
        return found.loss, found.layer_error

    def before_micro_batch(self, last: bool) -> None:
        """Layout "optimizer" keeps gathered weights and gradients until the last micro-batch, the only one to communicate."""
        if self.units and self.gathered_once:
            root: Any = self
            root.set_requires_gradient_sync(last)
            root.set_reshard_after_backward(last)

    def release(self) -> None:
        """Give up gathered weights, so that the modules hold their shards."""
        if self.units:
            for module in (*self.units, self):
                module.reshard()


def mixers_of(model: Model) -> list[nn.Module]:
    """The recurrent mixers, which are what step 1 trains."""
    layers: Any = model.model.layers
    return [layer.self_attn for layer, name in zip(layers, model.spec.mixers, strict=True) if MIXERS[name].recurrent]


def runnable(task: Task) -> Model:
    """The student of `task` to run by itself: in step 1 only its mixers are on the device, and the rest is the teacher's."""
    student, teacher = task.pair
    if task.stage.kind != "align" or teacher is None:
        return student
    trained = {id(p) for mixer in mixers_of(student) for p in mixer.parameters()}
    theirs, device = dict(teacher.named_parameters()), teacher.model.norm.weight.device
    tensors = {n: p if id(p) in trained else theirs[n] if n in theirs else p.to(device) for n, p in student.named_parameters()}
    with torch.device("meta"):
        made = Model(student.spec)
    made.load_state_dict(tensors, assign=True)
    return made.eval()


def units_of(model: Model) -> list[Any]:
    """What is gathered at once: each mixer and each feed-forward."""
    layers: Any = model.model.layers
    return [unit for layer in layers for unit in (layer.self_attn, layer.mlp)]


def local_batch(stage: Stage, world: World, sequence: int) -> tuple[int, int]:
    """(sequences of this process in a step, sequences per forward pass). R102 when the batch cannot be dealt out evenly."""
    where = f"stages ({stage.kind})"
    groups, rest = divmod(world.size, sequence)
    if rest:
        why = f"{world.size} processes do not make groups of {sequence}"
        raise fail("R102", where=f"parallel.sequence.{stage.kind}", why=why, fix="Use a divisor of the number of processes")
    if sequence > 1 and stage.packing != "stream":
        why = f"packing {stage.packing!r} begins states anew inside a sequence"
        raise fail("R102", where=f"parallel.sequence.{stage.kind}", why=why, fix="Use packing: stream")
    if stage.seq_len % sequence:
        why = f"seq_len {stage.seq_len} is no multiple of {sequence}"
        raise fail("R102", where=f"parallel.sequence.{stage.kind}", why=why, fix="Use a divisor of seq_len")
    if stage.batch_size % groups:
        why = f"batch_size {stage.batch_size} is not dealt out evenly to {groups} " + ("groups" if sequence > 1 else "processes")
        raise fail("R102", where=where, why=why, fix=f"Use a multiple of {groups}: {-(-stage.batch_size // groups) * groups}")
    mine = stage.batch_size // groups
    return mine, next(size for size in range(min(stage.micro_batch, mine), 0, -1) if mine % size == 0)


def copies_of(how: Parallel, world: World) -> int:
    """Copies of the student among the processes, each of them sharded over neighbours."""
    return world.size if how.layout == "replicated" else how.copies


def spread(task: Task, how: Parallel, world: World, precision: str) -> None:
    """Shard the student of `task`, as masters on the meta device, over `world`."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    align = task.stage.kind == "align"
    # Inputs are cast by the model itself: log-decays stay float32.
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
    own: set[nn.Parameter] = set()
    if how.vocab_heads and not align:
        own = {split_head(task.student, world)}
    # The keys and values of a kept layer are views; nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    task.gathered_once = how.layout != "full"
    task.units = mixers_of(task.student) if align else units_of(task.student)
    for unit in task.units:
        fully_shard(unit, mesh=world.mesh, reshard_after_forward=not task.gathered_once, mp_policy=policy)
    for unit in task.units if align else ():
        reduce_early(unit)
    for unit, following in pairwise(task.units):
        # Asked for one unit early, weights are there when their turn comes, even where the GPU waits for Python.
        unit.set_modules_to_forward_prefetch([following])
    fully_shard(task, mesh=world.mesh, reshard_after_forward=False, mp_policy=policy, ignored_params=own)


def reduce_early(unit: Any) -> None:
    """Reduce the gradients of a unit as soon as it has them all.

    FSDP waits for the gradient of the unit's input. In step 1 there is none: all units would be reduced after the backward
    pass, and nothing would hide it.
    """
    # Hooks of tensors are out of the garbage collector's sight: what they refer to would never be freed.
    group = weakref.ref(unit._get_fsdp_state()._fsdp_param_group)
    hooked: set[int] = set()
    missing: set[int] = set()

    def has_gradient(parameter: Tensor) -> None:
        missing.discard(id(parameter))
        reduced: Any = group()
        if not missing and reduced is not None:
            reduced.post_backward()

    def begin(*_: Any) -> None:
        whole = {id(p): p for p in unit.parameters() if p.requires_grad}
        missing.update(whole if torch.is_grad_enabled() else ())
        for key, parameter in whole.items():
            if key not in hooked:
                parameter.register_post_accumulate_grad_hook(has_gradient)
        hooked.update(whole)

    unit.register_forward_pre_hook(begin)  # after FSDP's own: the parameters are whole by then


def build_task(
    stage: Stage,
    student: ModelFolder | Model,
    teacher: Model | None,
    how: Parallel,
    world: World,
    precision: str,
    own_head: bool = False,
) -> Task:
    """The task of a stage, student loaded and placed. Every process reads only what it keeps.

    With `own_head` a tied student gets a head of its own that begins as its embedding.
    """
    recomputes = how.recompute == "always" and stage.kind != "align"
    world.keep_copies(copies_of(how, world))
    if world.shards == 1:
        if stage.kind == "align" and not isinstance(student, Model):
            # The rest of the student waits where there is room.
            model = load_on(student, World(device=torch.device("cpu")), precision)
            for mixer in mixers_of(model):
                mixer.to(world.device)
            return Task(stage, model, teacher)
        model = student if isinstance(student, Model) else load_on(student, world, precision)
        model = untied(model) if own_head else model
        task = Task(stage, model.to(world.device), teacher)
        task.recomputes = recomputes
        return task
    spec = replace(student.spec, tie_embeddings=False) if own_head else student.spec
    if how.vocab_heads and spec.tie_embeddings and stage.kind != "align":
        raise fail("R102", where="parallel.vocab_heads", why="head and embedding are one tensor", fix="Set it to false")
    with torch.device("meta"):
        model = Model(spec)
    task = Task(stage, model, teacher)
    spread(task, how, world, precision)
    materialise(task, world.device)
    inside = {id(p) for p in task.parameters()}
    for module in model.modules():  # in step 1 the rest of the student waits for the next stage where there is room
        if any(id(p) not in inside for p in module.parameters(recurse=False)):
            module.to(DTYPES[precision]).to_empty(device="cpu", recurse=False)
    fill(model, student, world)
    task.recomputes = recomputes
    return task


@contextmanager
def recomputed(model: Model, wanted: bool = True) -> Iterator[None]:
    """While the block runs, keep no activations inside mixers and feed-forwards: the backward pass computes them again.

    Not so for the first recurrent mixer, which hands `v_first` to the others while it runs.
    """
    first = mixers_of(model)[:1]
    units = [unit for unit in units_of(model) if not any(unit is module for module in first)] if wanted else []
    before = [unit.__dict__.get("forward") for unit in units]
    for unit in units:
        unit.forward = partial(checkpoint, unit.forward, use_reentrant=False)
    try:
        yield
    finally:
        for unit, forward in zip(units, before, strict=True):
            del unit.forward
            if forward is not None:
                unit.forward = forward


def load_frozen(folder: ModelFolder, how: Parallel, world: World, precision: str) -> Model:
    """A model that only runs forward: whole on every device or, as `how.teacher` says, sharded or offloaded."""
    if how.teacher not in ("sharded", "offloaded") or (world.size == 1 and how.teacher == "sharded"):
        return load_on(folder, world, precision)
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    world.keep_copies(how.copies)
    on_gpu = world.device.type == "cuda"
    offloaded = how.teacher == "offloaded"
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if offloaded else OffloadPolicy()
    with torch.device("meta"):
        model = Model(folder.spec).to(DTYPES[precision]).requires_grad_(False).eval()
    units = units_of(model)
    for unit in units:
        fully_shard(
            unit, mesh=world.mesh, reshard_after_forward=True, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
            offload_policy=offload,
        )  # fmt: skip
    for unit in units:
        unit.to_empty(device="cpu" if offloaded else world.device)
    inside = {id(p) for unit in units for p in unit.parameters()}
    for module in model.modules():
        if any(id(p) not in inside for p in module.parameters(recurse=False)):
            module.to_empty(device=world.device, recurse=False)
    fill(model, folder, world)
    for unit, following in pairwise(units):
        # Step 1 calls units one by one, so each asks for the next one while it works.
        unit.register_forward_pre_hook(partial(fetch, following))
    return model


def fetch(unit: Any, *_: Any) -> None:
    """A forward hook that begins to gather the weights of `unit`."""
    unit.unshard(async_op=True)


def load_on(folder: ModelFolder, world: World, precision: str) -> Model:
    """A whole model on this process's device."""
    from radlads.backends.torch.load import load_model

    return load_model(folder, device=world.device, dtype=precision)


def split_head(model: Model, world: World) -> nn.Parameter:
    """Make the head (V, D) a tensor sharded by vocabulary, of which the loss uses each shard where it lies."""
    from torch.distributed.tensor import DTensor, Shard

    weight = model.lm_head.weight
    rows = rows_of(len(weight), world)
    local = torch.empty(rows.stop - rows.start, weight.shape[1], dtype=weight.dtype, device=weight.device)
    whole = DTensor.from_local(local, world.mesh, [Shard(0)], run_check=False, shape=weight.shape, stride=weight.stride())
    model.lm_head.weight = nn.Parameter(whole, requires_grad=weight.requires_grad)
    return model.lm_head.weight


def materialise(task: Task, device: torch.device) -> None:
    """Memory for everything of `task` that is on the meta device."""
    for module in task.modules():
        module.to_empty(device=device, recurse=False)
    # FSDP pads uneven shards when it sees that its tensors were replaced.
    task._apply(lambda tensor: tensor)


@torch.no_grad()
def fill(model: Model, source: ModelFolder | Model, world: World) -> None:
    """Copy the values of a folder, or of a model that every process made alike, into the tensors or shards of `model`.

    A head that the source does not have begins as its embedding.
    """
    made = source.state_dict() if isinstance(source, Model) else {}
    known = made if isinstance(source, Model) else source.weights
    for wanted, parameter in model.named_parameters():
        name = "model.embed_tokens.weight" if wanted == HEAD and HEAD not in known else wanted
        if isinstance(source, Model):
            value = made[name]
            here = rows_of(len(value), world)
            value = value[here] if sharded(parameter) else value
        else:
            entry = source.weights[name]
            value = read_tensor(entry, rows_of(entry.shape[0], world) if sharded(parameter) else None)
        local_of(parameter).copy_(value)


def sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a shard."""
    return hasattr(tensor, "placements")


def local_of(tensor: Any) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.detach().to_local() if sharded(tensor) else tensor.detach()


def rows_of(rows: int, world: World) -> slice:
    """The rows that a tensor sharded over (a copy of) `world` has here: equal stretches, the last ones shorter or empty."""
    stretch, rank = -(-rows // world.shards), world.rank % world.shards
    return slice(min(rows, rank * stretch), min(rows, (rank + 1) * stretch))
