"""What a training run is asked to do: the recipe, its stages, its YAML form and `--set` overrides.

Text of a recipe is read by `recipe_yaml`; the shapes of learning rates live in `schedule`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml  # type: ignore[import-untyped]
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from radlads.errors import RadladsError, fail, nearest
from radlads.families import FAMILIES
from radlads.recipe_yaml import Document, parse_value, read_document
from radlads.spec import DEFAULT_OPTIONS, MixerOptions, ModelSpec, Ranks

RECIPES = Path(__file__).parent / "recipes"
STAGE_NUMBER = {"align": 1, "distill": 2, "lm": 3}
# Fields of ModelSpec that a recipe for a new teacher does not choose: its mixers are all softmax.
NOT_IN_INIT = ("mixers", "mixer", "ranks")
ORDER_RULE = "stages must follow the order align, distill, lm, each at most once; this is {got}"


def known_fields(owner: type, without: tuple[str, ...] = ()) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A check that a table holds only fields of the dataclass `owner`, each of its type."""
    hints = {f.name: get_type_hints(owner)[f.name] for f in fields(owner) if f.name not in without}

    def check(values: dict[str, Any]) -> dict[str, Any]:
        checked = {}
        for key, value in values.items():
            if key not in hints:
                raise PydanticCustomError("unknown_key", "{why}", {"why": unknown_key(key, list(hints))})
            try:
                checked[key] = TypeAdapter(hints[key]).validate_python(value)
            except ValidationError as error:
                raise PydanticCustomError("bad_field", "{why}", {"why": f"{key}: {explain(error.errors()[0])}"}) from None
        return checked

    return check


def no_bool(value: object) -> object:
    """Refuse true and false where a number is meant."""
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "a number is needed")
    return value


Number = Annotated[float, BeforeValidator(no_bool)]
Whole = Annotated[int, BeforeValidator(no_bool)]
Count = Annotated[Whole, Field(gt=0, lt=2**53)]
Rate = Annotated[Number, Field(ge=0, lt=1e6)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]


class Part(BaseModel):
    """Rules for every table of a recipe: no unknown keys, no changes, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class Student(Part):
    """The recurrent mixer that replaces attention; `options` are fields of MixerOptions.

    `ranks` are widths of low-rank pairs, where they are not to follow the mixer's rule. `transfer_scale` multiplies the
    teacher's q, k, v and o in the converted layers; with `reinit` they begin at random instead (an ablation). `head` of a
    teacher whose head is its embedding: "retied" gives the student a head of its own in step 2 alone and drops it at the
    end, "tied" never does, "untied" does so for good.
    """

    arch: str = "rwkv7"
    keep_softmax: tuple[Annotated[Whole, Field(ge=0)], ...] = ()
    ranks: dict[str, Annotated[Whole, Field(gt=0, lt=2**16)]] = Field(default_factory=dict)
    transfer_scale: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    reinit: bool = False
    head: Literal["tied", "untied", "retied"] = "retied"
    options: Annotated[dict[str, Any], AfterValidator(known_fields(MixerOptions))] = Field(default_factory=dict)

    @field_validator("arch")
    @classmethod
    def _known_arch(cls, arch: str) -> str:
        if arch not in DEFAULT_OPTIONS:
            raise ValueError(unknown(arch, list(DEFAULT_OPTIONS)))
        return arch

    @model_validator(mode="after")
    def _usable(self) -> "Student":
        if len(set(self.keep_softmax)) != len(self.keep_softmax):
            raise ValueError("keep_softmax names a layer twice")
        # The spec knows which values of the options are allowed; any model will do to ask it.
        small = ModelSpec("qwen3", 64, 64, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=64, vocab_size=1)
        small.as_student(self.arch, ranks=self.ranks, **self.options)
        return self


class DataSource(Part):
    """One source of text or conversations; a bare path stands for one.

    `path` is a file (.txt, .jsonl, .parquet, .idx; text also with .xz, .gz or .zst), a pattern, a folder of such files, a
    token store of `radlads prepare`, a saved dataset, or "hf:owner/name" with `subset`, `split`, `revision`, `streaming`.
    `weight` is its share of the samples; without weights files run together, and stores count by their size. `skip` and
    `take` choose documents: the first ones are passed over, and no more than `take` are read.
    """

    path: Annotated[str, Field(min_length=1)]
    weight: Annotated[Number, Field(gt=0, lt=1e9)] | None = None
    text_field: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    skip: Annotated[Whole, Field(ge=0)] = 0
    take: Count | None = None


def as_sources(values: Any) -> Any:
    """Bare paths as tables."""
    if not isinstance(values, list | tuple):
        return values
    return [{"path": value} if isinstance(value, str) else value for value in values]


def all_or_no_weights(sources: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    """Refuse a list in which only some sources have a weight."""
    if len({source.weight is None for source in sources}) > 1:
        raise ValueError("some sources have a weight and some have none; give every one a weight, or none")
    return sources


Sources = Annotated[tuple[DataSource, ...], BeforeValidator(as_sources), AfterValidator(all_or_no_weights), Field(min_length=1)]


class Data(Part):
    """Sources for training and for measuring; docs/data.md says what each can be.

    `text_field` names the field of a row that holds its text or its messages (without it: text, messages or conversations),
    `eos` ends each document, `order` is the order of training samples: seeded, or that of the published training.
    `teacher_cache` names what `radlads prepare --teacher-cache` made of each training store: step 2 then needs no teacher.
    """

    train: Sources
    valid: Sources
    text_field: str | None = None
    eos: bool = True
    order: Literal["shuffled", "magic_prime"] = "shuffled"
    teacher_cache: tuple[str, ...] = ()


class Eval(Part):
    """How a model is measured: held-out tokens, their context length, and a prompt to continue."""

    tokens: Count = 65536
    seq_len: Count = 512
    prompt: str = "Once upon a time"
    new_tokens: Annotated[Whole, Field(ge=0, lt=2**20)] = 64


class Parallel(Part):
    """How a run is spread over processes and memory. A run may be resumed with other values: its samples stay the same.

    `layout` of the student: "replicated" keeps everything on each GPU and adds up gradients once a step (data parallel),
    "optimizer" gathers weights once a step and shards masters and moments (ZeRO-2), "full" shards weights too and gathers
    them unit by unit. `teacher`: "whole" on each GPU, "sharded", or "offloaded" to the CPU's memory.
    `copies`: what is sharded is so within each of this many groups of neighbours (2 on two hosts keeps gathers inside a host).
    `vocab_heads` splits the output matrices by vocabulary. `sequence` is how many processes share one sequence, by kind of
    stage. `recompute` trades time for memory of activations. `moments` is what AdamW's moments are kept in. `masters`
    "none": bfloat16 weights have no float32 masters and are rounded up or down by chance, in all processes alike (whole weights
    in each, float32 moments).
    `compile` "auto" compiles the layers on a GPU, in parts where they are sharded or recomputed. `cuda_graphs` "auto" records
    micro-batches as graphs on a GPU that has student and teacher whole, where nothing is recomputed. After `hang_timeout` seconds
    without a step a run saves its stacks and ends (0: never). "auto" takes what fits the GPUs.
    """

    layout: Literal["auto", "replicated", "optimizer", "full"] = "auto"
    teacher: Literal["auto", "whole", "sharded", "offloaded"] = "auto"
    copies: Count = 1
    vocab_heads: bool = False
    sequence: dict[Literal["distill", "lm"], Count] = Field(default_factory=dict)
    recompute: Literal["auto", "always", "never"] = "auto"
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    masters: Literal["float32", "none"] = "float32"
    compile: Literal["auto", "off"] = "auto"
    cuda_graphs: Literal["auto", "off"] = "auto"
    hang_timeout: Annotated[Number, Field(ge=0, lt=1e6)] = 1800.0

    @model_validator(mode="after")
    def _masters_fit(self) -> "Parallel":
        if self.masters == "none" and self.moments != "float32":
            raise ValueError(f"masters none goes with float32 moments, not with {self.moments}")
        if self.masters == "none" and (self.layout in ("optimizer", "full") or self.copies > 1 or self.vocab_heads):
            raise ValueError("masters none needs all weights on each process (layout replicated): shards are float32")
        if (self.copies > 1 or self.layout == "replicated") and self.vocab_heads:
            raise ValueError("vocab_heads splits the heads over all processes, so there can be no copies")
        if self.copies > 1 and self.layout == "replicated":
            raise ValueError("layout replicated keeps a copy on each process, so copies is not given")
        return self

    def sharing(self, kind: str) -> int:
        """How many processes share one sequence in a stage of this kind."""
        return next((count for name, count in self.sequence.items() if name == kind), 1)


class Stage(Part):
    """One training stage: paper step 1 (`align`), 2 (`distill`) or 3 (`lm`).

    `lr` and `lr_final` hold for all weights, `mixer_lr` and `mixer_lr_final` for those of the mixers; a final rate that is
    not given equals the first one. `batch_size` counts sequences per optimiser step, `micro_batch` sequences per forward
    pass (0: all of them). `packing` says what a sample is: a window of the stream, in which documents run together
    ("stream"), the same with the state begun anew at every document ("reset"), or one document, padded ("document").
    `loss` of an align stage: the paper's norm of the difference, or its mean square. `train` names the weights that learn:
    the mixers, all, all but embedding, head and last norm ("layers"), or the decay and what leads to it (step 3a).
    `clip` 0 is no clipping, `save_every` 0 saves only at the end of the stage. Where every process has all weights, the
    model is also measured on the held-out text after every `measure_every` steps, and at the first step by which the stage
    has seen each of `measure_at` tokens. The loss of step 2 is
    kl_weight * divergence(teacher, student) + ce_weight * cross-entropy; `jsd_beta` is the teacher's share of the mixture.
    """

    kind: Literal["align", "distill", "lm"]
    tokens: Count
    seq_len: Count
    packing: Literal["stream", "reset", "document"] = "stream"
    batch_size: Count
    micro_batch: Annotated[Whole, Field(ge=0, validate_default=True)] = 0
    lr: Rate
    lr_final: Rate = Field(default_factory=lambda known: known["lr"])
    mixer_lr: Rate = Field(default_factory=lambda known: known["lr"])
    mixer_lr_final: Rate = Field(default_factory=lambda known: known["lr_final"])
    schedule: Literal["constant", "linear", "exponential", "cosine", "quarter_cosine", "stable_cosine_stable"] = "constant"
    lr_wait: Fraction = Field(default_factory=lambda known: 0.833 if known["schedule"] == "stable_cosine_stable" else 0.0)
    lr_endpoint: Fraction = Field(default_factory=lambda known: 0.875 if known["schedule"] == "stable_cosine_stable" else 1.0)
    warmup_steps: Annotated[Whole, Field(ge=0)] = 50
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[Number, Field(gt=0, lt=1)] = 1e-8
    weight_decay: Rate = 0.0
    clip: Rate = 1.0
    divergence: Literal["kl", "reverse_kl", "jsd"] = "kl"
    jsd_beta: Annotated[Number, Field(gt=0, lt=1)] = 0.5
    kl_weight: Rate = 1.0
    ce_weight: Rate = 0.0
    temperature: Annotated[Number, Field(gt=0, lt=1e6)] = 1.0
    loss: Literal["norm", "mse"] = "norm"
    train: Literal["mixer", "all", "layers", "decay"] = Field(
        default_factory=lambda known: "mixer" if known["kind"] == "align" else "all"
    )
    save_every: Annotated[Whole, Field(ge=0)] = 0
    measure_every: Annotated[Whole, Field(ge=0)] = 0
    measure_at: tuple[Count, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        return {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values

    @field_validator("micro_batch")
    @classmethod
    def _whole_micro_batches(cls, micro: int, info: ValidationInfo) -> int:
        batch = info.data.get("batch_size", micro)
        if micro and batch % micro:
            raise ValueError(f"{micro} does not divide batch_size {batch}")
        return micro or batch

    @model_validator(mode="after")
    def _makes_sense(self) -> "Stage":
        if self.kind == "align" and self.train != "mixer":
            raise ValueError(f"an align stage trains the mixers only, not {self.train!r}")
        if self.kind != "align" and self.loss != "norm":
            raise ValueError("only an align stage has a choice of loss")
        if self.schedule == "exponential" and not (self.lr_final > 0 and self.mixer_lr_final > 0):
            raise ValueError("an exponential schedule needs final rates above 0")
        if self.kind == "distill" and self.kl_weight + self.ce_weight == 0:
            raise ValueError("kl_weight and ce_weight are both 0: the stage has no loss")
        if self.lr_wait >= self.lr_endpoint:
            raise ValueError(f"lr_wait {self.lr_wait} is not below lr_endpoint {self.lr_endpoint}")
        return self

    @property
    def number(self) -> int:
        """The paper's number of this step: 1, 2 or 3."""
        return STAGE_NUMBER[self.kind]

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.batch_size * self.seq_len

    @property
    def steps(self) -> int:
        """Optimiser steps: as many as it takes to see `tokens` tokens."""
        return -(-self.tokens // self.tokens_per_step)

    def measured_after(self, step: int) -> bool:
        """Whether the model is measured when `step` steps are done; at the end of the stage it is in any case."""
        asked = {-(-tokens // self.tokens_per_step) for tokens in self.measure_at}
        every = self.measure_every and step % self.measure_every == 0
        return step < self.steps and bool(every or step in asked)


class TeacherFile(Part):
    """What a teacher that is one file is known by: the SHA-256 of the file, the archive that holds it, and how to get that."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    archive: str
    get: str


class Recipe(Part):
    """A whole run. A conversion names a `teacher` (and a `student`); `init` instead trains a new teacher from random weights.

    A `teacher` is a folder, or a .gguf or .pth file, which is made a folder first; `teacher_file` says which file is meant.
    `tokenizer` is the new teacher's: a tokenizer.json or a folder that holds one. Relative paths are meant from the working
    directory, or else name a file of the demo in the package.
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    teacher: str | None = None
    teacher_file: TeacherFile | None = None
    init: Annotated[dict[str, Any], AfterValidator(known_fields(ModelSpec, without=NOT_IN_INIT))] | None = None
    tokenizer: str | None = None
    student: Student | None = None
    data: Data
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 1337
    precision: Literal["float32", "bfloat16"] = "float32"
    eval: Eval = Field(default_factory=Eval)
    parallel: Parallel = Field(default_factory=Parallel)
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _conversion_has_student(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("teacher") is not None and values.get("student") is None:
            return {**values, "student": {}}
        return values

    @field_validator("init")
    @classmethod
    def _init_fits(cls, init: dict[str, Any] | None) -> dict[str, Any] | None:
        if init is not None:
            needed = [f.name for f in fields(ModelSpec) if f.default is MISSING and f.default_factory is MISSING]
            missing = [name for name in needed if name not in init]
            if missing:
                raise ValueError(f"{missing[0]} is missing")
            if init["family"] not in FAMILIES:
                raise ValueError(f"family: {unknown(init['family'], list(FAMILIES))}")
            ModelSpec(**init)
        return init

    @model_validator(mode="after")
    def _stages_fit(self) -> "Recipe":
        kinds = [stage.kind for stage in self.stages]
        if [STAGE_NUMBER[kind] for kind in kinds] != sorted({STAGE_NUMBER[kind] for kind in kinds}):
            raise PydanticCustomError("stage_order", ORDER_RULE, {"got": ", ".join(kinds)})
        if (self.teacher is None) == (self.init is None):
            raise ValueError("exactly one of teacher (to convert) and init (to train a new teacher) must be given")
        if self.init is not None and (self.student is not None or kinds != ["lm"]):
            raise ValueError("with init there is no student, and the only stage is lm")
        if (self.init is None) != (self.tokenizer is None):
            raise ValueError("a new teacher (init) needs a tokenizer; a conversion uses the teacher's")
        return self

    def init_spec(self) -> ModelSpec:
        """ModelSpec of the new teacher that `init` describes."""
        return ModelSpec(**(self.init or {}))

    def unties(self, stage: Stage) -> bool:
        """Whether a student whose head is its embedding has a head of its own in this stage only."""
        return stage.kind == "distill" and self.student is not None and self.student.head == "retied"

    def values(self) -> dict[str, Any]:
        """All resolved values as plain JSON values."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """The values that say which run it is: all but how it is spread over machines."""
        return {key: value for key, value in self.values().items() if key != "parallel"}

    def fingerprint(self) -> str:
        """sha256 of `identity`: equal for two recipes that ask for the same run."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load_recipe` reads back."""
        return str(yaml.safe_dump(self.values(), sort_keys=False, allow_unicode=True))


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of the package by its name (None: "tiny") or from a YAML file, with `overrides` such as "stages.0.lr=1e-3".

    A file may name one `base` recipe, whose values it overrides key by key (lists as a whole). Raises R101 for a bad
    override or name, R102 for a file that is not valid, R103 for stages out of order, R201 for a file that is not readable.
    """
    document = read_document(find_recipe("tiny" if name_or_path is None else name_or_path))
    base = document.values.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise fail(
                "R102", where=document.place("base"), why="base must be the name or path of one recipe", fix="Name one recipe"
            )
        beside = document.path.parent / base
        parent = read_document(beside if beside.is_file() else find_recipe(base))
        if "base" in parent.values:
            raise fail(
                "R102", where=document.place("base"), why=f"{base} has a base of its own", fix="Build on a recipe without a base"
            )
        document = Document(document.path, merge(parent.values, document.values), document.lines, parent)
    wanted = [apply_override(document.values, text) for text in overrides]
    try:
        return Recipe.model_validate(document.values)
    except ValidationError as error:
        problems = [p for p in error.errors() if p["type"] != "default_factory_not_called"]
        raise as_error(problems, document, dict(zip(wanted, overrides, strict=True))) from None


def find_recipe(name_or_path: str | Path) -> Path:
    """File of a recipe: a name of the package, or a path. Raises R101 when there is neither."""
    name, names = str(name_or_path), recipe_names()
    if name in names:
        return RECIPES / f"{name}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise fail(
        "R101",
        where=name,
        why=f"there is no such file and no such recipe{meant(name, names)}",
        fix=f"Give a file or one of: {', '.join(names)}",
    )


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it: tables are merged key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def apply_override(values: dict[str, Any], text: str) -> tuple[str | int, ...]:
    """Set one "a.b=value" in `values` and return its path; the value is read as YAML. Raises R101."""
    key, sign, raw = text.partition("=")
    where = f"--set {text}"
    if not sign or not key.strip():
        raise fail("R101", where=where, why="it is not of the form key=value", fix="Write for example `--set stages.0.lr=1e-3`")
    path: tuple[str | int, ...] = ()
    table: Any = values
    *above, last = key.strip().split(".")
    for name in above:
        step = checked_step(table, path, name, where)
        if isinstance(step, str) and not isinstance(table.get(step), dict | list):
            table[step] = {}
        table, path = table[step], (*path, step)
    step = checked_step(table, path, last, where)
    table[step] = parse_value(raw, where)
    return (*path, step)


def checked_step(table: Any, path: tuple[str | int, ...], name: str, where: str) -> str | int:
    """Key or index in the table or list at `path` that `name` means. Raises R101 when the recipe has no such place."""
    here = ".".join(map(str, path))
    if isinstance(table, list):
        if not (name.isascii() and name.isdigit() and int(name) < len(table)):
            raise fail("R101", where=where, why=f"{here} has no entry {name!r}", fix=f"Use 0 to {len(table) - 1}")
        return int(name)
    allowed = keys_at(path)
    if not allowed:
        raise fail("R101", where=where, why=f"{here} holds no table of settings", fix="Set it as a whole")
    if name not in allowed:
        raise fail("R101", where=where, why=unknown_key(name, allowed), fix=f"Use one of: {', '.join(allowed)}")
    return name


def keys_at(path: tuple[str | int, ...]) -> list[str]:
    """Keys that the recipe allows in the table at `path`; empty where there is no table."""
    tables: dict[tuple[str, ...], list[str]] = {
        (): list(Recipe.model_fields),
        ("student",): list(Student.model_fields),
        ("student", "ranks"): [f.name for f in fields(Ranks)],
        ("student", "options"): [f.name for f in fields(MixerOptions)],
        ("data",): list(Data.model_fields),
        ("data", "train", "#"): list(DataSource.model_fields),
        ("data", "valid", "#"): list(DataSource.model_fields),
        ("eval",): list(Eval.model_fields),
        ("teacher_file",): list(TeacherFile.model_fields),
        ("parallel",): list(Parallel.model_fields),
        ("parallel", "sequence"): ["distill", "lm"],
        ("init",): [f.name for f in fields(ModelSpec) if f.name not in NOT_IN_INIT],
        ("stages", "#"): list(Stage.model_fields),
    }
    return tables.get(tuple("#" if isinstance(name, int) else name for name in path), [])


def as_error(problems: list[ErrorDetails], document: Document, overrides: dict[tuple[str | int, ...], str]) -> RadladsError:
    """One error for what pydantic found: the first problem in full, the others counted."""
    first = problems[0]
    path = tuple(first["loc"])
    why, fix = explain(first), "Correct the value"
    if first["type"] in ("extra_forbidden", "missing"):
        allowed = keys_at(path[:-1])
        fix = f"Use one of: {', '.join(allowed)}" if first["type"] == "extra_forbidden" else "Add the key"
        why = unknown_key(str(path[-1]), allowed) if first["type"] == "extra_forbidden" else "the key is missing"
    if len(problems) > 1:
        why += f" (and {len(problems) - 1} more)"
    if first["type"] == "stage_order":
        return fail("R103", where=document.place(*path), why=why, fix="Put the stages in order")
    # An override is to blame when the problem lies in what it set, or in a check of the table around it.
    culprit = next((text for key, text in overrides.items() if path and path[: len(key)] == key[: len(path)]), None)
    if culprit is not None:
        return fail("R101", where=f"--set {culprit}", why=why, fix=fix)
    return fail("R102", where=document.place(*path), why=why, fix=fix)


def explain(problem: ErrorDetails) -> str:
    """What is wrong with one value, with the value and what is allowed."""
    value = problem["input"]
    shown = "" if isinstance(value, dict | list | tuple | BaseModel) else f", not {str(value)[:80]!r}"
    if problem["type"] == "literal_error":
        return unknown(str(value), [name.strip(" '") for name in problem["ctx"]["expected"].replace(" or ", ", ").split(",")])
    if problem["type"] in ("value_error", "bad_field", "unknown_key", "stage_order"):
        return problem["msg"].removeprefix("Value error, ")
    return problem["msg"].removeprefix("Input ").replace("should be", "it should be", 1) + shown


def unknown(value: str, allowed: list[str]) -> str:
    """Why a value is refused: the nearest allowed one and all of them."""
    return f"unknown value {value[:80]!r}{meant(value, allowed)}; known: {', '.join(allowed)}"


def unknown_key(key: str, allowed: list[str]) -> str:
    """Why a key is refused, and the nearest allowed one."""
    return f"unknown key {key[:80]!r}{meant(key, allowed)}"


def meant(name: str, names: list[str]) -> str:
    """The words ", nearest is 'x'" when a name is near or cut short, else none."""
    near = nearest(name, names)
    return f", nearest is {near!r}" if near else ""
