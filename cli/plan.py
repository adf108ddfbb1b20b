"""`radlads plan`: memory, time and price of a recipe before the first GPU second, and what to change where it does not fit."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from radlads.cli.options import StudentArch, arg, opt, overridden_recipe
from radlads.cli.render import Table

if TYPE_CHECKING:
    from radlads.costs import Plan
    from radlads.recipe import Recipe
    from radlads.spec import ModelSpec


@dataclass(kw_only=True)
class PlanOptions:
    """Which recipe, on which GPUs."""

    recipe: str | None = arg("Name of a built-in recipe or a YAML file; tiny without one.", metavar="RECIPE", default=None)
    teacher: str | None = opt(None, "A teacher's folder, or the name of a known one, instead of the recipe's.", metavar="TEACHER")
    student_arch: StudentArch | None = opt(None, "Mixer of the student, instead of the recipe's.")
    set: list[str] = opt([], "Change a value, such as stages.0.micro_batch=4; may be given several times.", metavar="KEY=VALUE")
    gpus: int = opt(1, "How many GPUs, of one host or of several.")
    gpu_type: Literal["h100", "h200", "a100", "b200"] = opt("h200", "Which GPU.")
    price_per_gpu_hour: float | None = opt(None, "What an hour of one GPU costs, in any currency.")
    efficiency: float | None = opt(None, "Share of the matmul rate that training reaches (0 to 1), instead of what was measured.")
    fit: bool = opt(False, "Say what to change where it does not fit.", "--fit")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class PlanResult:
    """The plan as plain values; `changes` are settings that make it fit, each with hours and peak."""

    schema: int
    parameters: int
    gpus: int
    gpu_type: str
    gpu: dict[str, Any]
    hours: float
    gpu_hours: float
    price: float | None
    fits: bool
    stages: list[dict[str, Any]]
    changes: list[dict[str, Any]] = field(default_factory=list)
    asked: bool = False

    def blocks(self) -> Iterator[Table | str]:
        """A table of stages, what fills the memory of the fullest, the sum, and the changes."""
        yield f"{self.parameters / 1e9:.2f} billion parameters on {self.gpus} x {self.gpu_type} ({self.gpu['gib']:.0f} GiB each)"
        columns = ("stage", "tokens", "GFLOP/token", "tok/s/GPU", "GPU-hours", "GiB/GPU", "micro-batch", "layout", "fits")
        rows = [
            (
                f"{s['stage']} {s['name']}", f"{s['tokens']:,}", f"{s['flops_per_token'] / 1e9:.2f}",
                f"{s['tok_s_per_gpu']:,.0f}", f"{s['gpu_hours']:.2f}", f"{s['peak_gib_per_gpu']:.1f}", s["micro_batch"],
                spread_text(s, self.gpus), "yes" if s["fits"] else "NO",
            )
            for s in self.stages
        ]  # fmt: skip
        yield Table(columns, rows, right=columns[1:7])
        fullest = max(self.stages, key=lambda s: s["peak_gib_per_gpu"])
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in fullest["gib_by"].items() if gib >= 0.05)
        yield f"memory of stage {fullest['stage']} in GiB: {parts}"
        price = "" if self.price is None else f", price {self.price:,.2f}"
        yield f"{self.hours:.2f} hours, {self.gpu_hours:.1f} GPU-hours{price}"
        if not self.fits and not self.asked:
            yield "It does not fit: `--fit` says what to change."
        if self.asked and not self.fits and not self.changes:
            yield "No setting makes it fit; use more or larger GPUs."
        for change in self.changes:
            cost = f"{change['gpu_hours']:.1f} GPU-hours, {change['peak_gib_per_gpu']:.1f} GiB"
            yield f"fits with {change['settings']} ({cost})"


def spread_text(stage: dict[str, Any], gpus: int) -> str:
    """How a stage is spread, in words."""
    if gpus == 1:
        return "recomputing" if stage["recompute"] else "-"
    words = [stage["layout"]]
    if stage["name"] != "lm":
        words.append(f"teacher {stage['teacher']}")
    if stage["recompute"]:
        words.append("recomputing")
    return ", ".join(words)


def plan(options: PlanOptions) -> PlanResult:
    """Reckon what a recipe takes; nothing is loaded and nothing runs."""
    from radlads.costs import GPUS, as_json, plan_run
    from radlads.errors import fail
    from radlads.fitting import fit

    if options.gpus < 1:
        raise fail("R101", where="--gpus", why=f"it is {options.gpus}", fix="Give 1 or more")
    if options.efficiency is not None and not 0 < options.efficiency <= 1:
        raise fail("R101", where="--efficiency", why=f"it is {options.efficiency}", fix="Give a share above 0, at most 1")
    if options.price_per_gpu_hour is not None and not 0 <= options.price_per_gpu_hour < 1e9:
        raise fail("R101", where="--price-per-gpu-hour", why=f"it is {options.price_per_gpu_hour}", fix="Give a price")
    recipe, teacher, student = models_of(options)
    check_batches(recipe, options.gpus)
    gpu = GPUS[options.gpu_type]
    made = plan_run(recipe, teacher, student, options.gpus, gpu, options.efficiency)
    values = as_json(made, options.price_per_gpu_hour)
    changes = []
    if options.fit and not made.fits:
        changes = [change(text, found) for text, found in fit(recipe, teacher, student, options.gpus, gpu)]
    return PlanResult(**values, changes=changes, asked=options.fit)


def change(settings: str, found: "Plan") -> dict[str, Any]:
    """One way to make a run fit."""
    peak = max(stage.peak_gib for stage in found.stages)
    return {"settings": settings, "gpus": found.gpus, "gpu_hours": found.gpu_hours, "peak_gib_per_gpu": peak}


def models_of(options: PlanOptions) -> "tuple[Recipe, ModelSpec | None, ModelSpec]":
    """The recipe, and the specs of teacher (None where a new one is trained) and student."""
    recipe = overridden_recipe(options.recipe, options.teacher, options.student_arch, options.set)
    if recipe.init is not None:
        return recipe, None, recipe.init_spec()
    teacher = teacher_spec(recipe.teacher or "")
    assert recipe.student is not None
    wanted = recipe.student
    student = teacher.as_student(wanted.arch, wanted.keep_softmax, ranks=wanted.ranks, **wanted.options)
    return recipe, teacher, replace(student, tie_embeddings=student.tie_embeddings and wanted.head != "untied")


def teacher_spec(name: str) -> "ModelSpec":
    """Spec of a teacher from its folder's config, or by its well-known name. R201 when it is neither."""
    from radlads.demo import resolve
    from radlads.errors import fail, nearest
    from radlads.folder import open_folder
    from radlads.shapes import SHAPES, known_shape

    path = resolve(name)
    if path.is_dir():
        return open_folder(path, weights=False).spec
    known = known_shape(name)
    if known is None:
        near = nearest(name.rpartition("/")[2].lower(), SHAPES)
        fix = f"Did you mean {near}?" if near else f"Give a folder with a config.json, or one of: {', '.join(SHAPES)}"
        raise fail("R201", where=name, why="there is no such folder, and no teacher of that name is known", fix=fix)
    return known


def check_batches(recipe: "Recipe", gpus: int) -> None:
    """R102 where a stage's batch cannot be dealt out evenly, which a run would refuse too."""
    from radlads.errors import fail

    for number, stage in enumerate(recipe.stages):
        sequence = recipe.parallel.sharing(stage.kind)
        groups, rest = divmod(gpus, sequence)
        if rest:
            where = f"parallel.sequence.{stage.kind}"
            raise fail("R102", where=where, why=f"{gpus} GPUs do not make groups of {sequence}", fix="Use a divisor of --gpus")
        if stage.batch_size % groups:
            why = f"batch_size {stage.batch_size} is not dealt out evenly to {groups}"
            fix = f"Use --set stages.{number}.batch_size={-(-stage.batch_size // groups) * groups}"
            raise fail("R102", where=f"stages.{number}", why=why, fix=fix)
