"""`radlads train`: a recipe from teacher to finished student, resumable, with a report at the end."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from radlads.cli.options import StudentArch, arg, opt, overridden_recipe
from radlads.cli.render import Table

if TYPE_CHECKING:
    from radlads.backends.torch.world import World
    from radlads.folder import ModelFolder
    from radlads.recipe import Recipe
    from radlads.runs import Run
    from radlads.tokenizer import Tokenizer

KEPT_SHARE = 8  # one layer of eight is suggested to stay softmax, as in the published hybrids
TEACHERS = "teachers"  # beside the run folders: what is made of teachers that are files
STOPPED = 75  # exit status of a run that was stopped and can be resumed


@dataclass(kw_only=True)
class TrainOptions:
    """What to train, and where."""

    recipe: str | None = arg("Name of a built-in recipe or a YAML file; tiny without one.", metavar="RECIPE", default=None)
    teacher: str | None = opt(None, "Teacher instead of the recipe's: a folder, or a .gguf or .pth file.", metavar="PATH")
    student: str | None = opt(None, "Go on from this student folder instead of a new transfer.", metavar="DIR")
    student_arch: StudentArch | None = opt(None, "Mixer of the student, instead of the recipe's.")
    measure_difficulty: bool = opt(
        False, "Run step 1 alone, in every layer, and say which layers are the hardest to convert.", "--measure-difficulty"
    )
    set: list[str] = opt([], "Change a value, such as stages.0.lr=1e-3; may be given several times.", metavar="KEY=VALUE")
    output_dir: str | None = opt(None, "Folder of the run; runs/<recipe>-<arch> without it.", metavar="DIR")
    resume: Literal["auto", "never"] = opt("auto", "Go on with a run begun in the folder, or refuse to.")
    report_to: list[str] = opt([], "Also log to tensorboard, wandb or trackio.", metavar="TRACKER")
    quiet: bool = opt(False, "Show no progress.", "--quiet")
    json: bool = opt(False, "Print one JSON document at the end.", "--json")


class Inputs(NamedTuple):
    """What a run starts from; no teacher where a new one is trained, no student where it is yet to be made."""

    teacher: "ModelFolder | None"
    tokenizer: "Tokenizer"
    student: "ModelFolder | None"


@dataclass
class TrainResult:
    """What came of the run."""

    folder: str
    model: str
    status: str
    final: dict[str, float] = field(default_factory=dict)
    rows: list[list[str]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layers: list[dict[str, float]] = field(default_factory=list)  # their difficulty, where it was asked for
    suggested: list[int] = field(default_factory=list)
    exit_status: int = 0

    def blocks(self) -> Iterator[Table | str]:
        """Table, texts, paths and the next commands."""
        if self.status != "done":
            yield f"stopped and saved; the same command goes on with {self.folder}"
            return
        columns = ("", "held-out loss", "perplexity", "ratio", "KL to teacher", "agreement")
        yield Table(columns, self.rows, right=columns[1:])
        yield from self.notes
        if self.layers:
            numbers = ("layer", "error", "relative error", "KL alone")
            rows = [
                [f"{row['layer']}", f"{row['error']:.4g}", f"{row['relative']:.1%}", f"{row['kl']:.4g}",
                 "keep" if row["layer"] in self.suggested else ""]
                for row in self.layers
            ]  # fmt: skip
            yield Table((*numbers, ""), rows, title="\nHow hard each layer is to convert", right=numbers)
            yield f"suggested: --set student.keep_softmax={str(self.suggested).replace(' ', '')}"
            return
        for sample in self.samples:
            yield f"\n{sample['title']} writes:\n  {sample['prompt']}{sample['text']}"
        yield f"\nmodel   {self.model}"
        yield from (f"report  {path}" for path in self.files if path.endswith(".html"))
        chat, write = f"radlads chat {self.model}", f"radlads generate {self.model} -p 'Once upon a time' -m 100"
        yield f"\nnext:\n  {chat}\n  {write}\n  radlads inspect {self.model}"


def train(options: TrainOptions) -> TrainResult:
    """Run a recipe, or go on with it. Under torchrun each process takes its part, and the first one speaks for all."""
    from radlads.errors import RadladsError

    recipe, inputs = checked_inputs(options)
    from radlads.backends.torch.world import join_world

    world = join_world()
    try:
        result = train_together(options, recipe, inputs, world)
        world.leave()
    except RuntimeError as error:
        world.lost(error)
    except RadladsError as error:
        # What concerns one process only, it says itself.
        if world.first or error.code in ("R403", "R406"):
            raise
        raise SystemExit(error.exit_status) from None
    if not world.first:
        raise SystemExit(result.exit_status)
    return result


def train_together(options: TrainOptions, recipe: "Recipe", inputs: Inputs, world: "World") -> TrainResult:
    """The run itself, in one of the processes of `world`."""
    from radlads.cli.progress import TrainingScreen
    from radlads.cli.trackers import follow

    folder = run_folder(options, recipe)
    quiet = options.quiet or options.json or not world.first
    with open_run(folder, recipe, options.resume, world) as run, TrainingScreen(quiet) as screen, signals() as stop:
        if world.first:
            warn_of_hang(run, screen)
            if options.report_to:
                run.listeners.append(follow(options.report_to, folder, folder.name, recipe.values()))
        if not run_recipe(run, inputs, screen, stop, world):
            run.stop()
            status = 130 if world.share(stop["signal"]) == signal.SIGINT else STOPPED
            return TrainResult(str(folder), str(run.model), "stopped", exit_status=status)
    if not world.first:
        return TrainResult(str(folder), str(folder / "model"), "done")
    result = result_of(folder)
    if options.measure_difficulty:
        from radlads.difficulty import read_difficulty, suggested

        result.layers = read_difficulty(folder)
        result.suggested = suggested(result.layers, max(1, len(result.layers) // KEPT_SHARE))
    return result


def run_folder(options: TrainOptions, recipe: "Recipe") -> Path:
    """The folder of the run."""
    arch = f"-{recipe.student.arch}" if recipe.student else ""
    ending = "-difficulty" if options.measure_difficulty else ""
    return Path(options.output_dir or f"runs/{recipe.name}{arch}{ending}")


def checked_inputs(options: TrainOptions) -> "tuple[Recipe, Inputs]":
    """The recipe and what it names, all of it there; a launcher asks before it starts processes."""
    from radlads.cli.trackers import library_of

    require_torch()
    recipe = chosen_recipe(options)
    for tracker in options.report_to:
        library_of(tracker)
    return recipe, open_inputs(recipe, options)


def open_run(folder: Path, recipe: "Recipe", resume: Literal["auto", "never"], world: "World") -> "Run":
    """The run folder: opened and locked by the first process, read by the others."""
    from radlads.runs import Run, begin_run

    opened: list[Run] = []

    def begin() -> bool:
        opened.append(begin_run(folder, recipe, resume))
        return opened[0].resumed

    resumed = world.once(begin)
    return opened[0] if opened else Run(folder, recipe, resumed)


def warn_of_hang(run: "Run", screen: Any) -> None:
    """Name the stacks that an earlier start left when it hung."""
    from radlads.backends.torch.watchdog import hung_stacks

    for path in hung_stacks(run.stacks):
        screen.say(f"an earlier start hung here: {path}")
        path.rename(path.with_suffix(".old"))


def require_torch() -> None:
    """R104 when PyTorch is missing."""
    from importlib.util import find_spec

    from radlads.errors import fail

    if find_spec("torch") is None:
        raise fail("R104", where="radlads train", why="PyTorch is not installed", fix="Run `pip install 'radlads[train]'`")


def chosen_recipe(options: TrainOptions) -> "Recipe":
    """The recipe with the flags and `--set` values applied, cut down to step 1 where only difficulty is asked for."""
    recipe = overridden_recipe(options.recipe, options.teacher, options.student_arch, options.set)
    return alignment_alone(recipe) if options.measure_difficulty else recipe


def alignment_alone(recipe: "Recipe") -> "Recipe":
    """Step 1 of a recipe in every layer; R103 where it has none."""
    from radlads.errors import fail

    stages = tuple(stage for stage in recipe.stages if stage.kind == "align")
    if not stages or recipe.student is None:
        raise fail("R103", where=recipe.name, why="it has no align stage to measure", fix="Give a recipe that begins with step 1")
    return recipe.model_copy(update={"stages": stages, "student": recipe.student.model_copy(update={"keep_softmax": ()})})


def open_inputs(recipe: "Recipe", options: TrainOptions) -> "Inputs":
    """Everything the recipe names, checked before anything is written but a teacher's folder made of a file."""
    from radlads.cli.render import note
    from radlads.data.corpus import check_sources
    from radlads.demo import resolve
    from radlads.folder import open_folder
    from radlads.tokenizer import Tokenizer

    if recipe.init is not None:
        path = resolve(recipe.tokenizer or "")
        tokenizer = Tokenizer(path if path.is_dir() else path.parent, vocab_size=recipe.init_spec().vocab_size)
        check_sources(recipe.data, tokenizer)
        return Inputs(None, tokenizer, None)
    from radlads.backends.torch.convert_run import check_order
    from radlads.weights_tools.teacher import teacher_folder

    teacher = open_folder(teacher_folder(recipe, run_folder(options, recipe).parent / TEACHERS, note))
    begun = None if options.student is None else open_folder(options.student)
    if begun is not None:
        check_order(begun, recipe.stages[0])
    tokenizer = Tokenizer(teacher.path, vocab_size=teacher.spec.vocab_size)
    check_sources(recipe.data, tokenizer)
    if recipe.data.teacher_cache:
        from radlads.data.targets import TargetCache, check_targets
        from radlads.states import model_fingerprint

        made_by, caches = model_fingerprint(teacher), [TargetCache(resolve(name)) for name in recipe.data.teacher_cache]
        for stage in recipe.stages:
            for cache in caches if stage.kind == "distill" else ():
                check_targets(cache, stage, made_by)
    return Inputs(teacher, tokenizer, begun)


def run_recipe(run: "Run", inputs: "Inputs", screen: Any, stop: dict[str, int], world: "World") -> bool:
    """Train what the recipe of `run` says; False when it was stopped."""
    from radlads.backends.torch.convert_run import convert, train_teacher
    from radlads.folder import open_folder

    def stopping() -> bool:
        return stop["signal"] != 0

    if inputs.teacher is None:
        return train_teacher(run, inputs.tokenizer, screen, stopping, world)
    step0, teacher = run.stage_folder(0), inputs.teacher
    if inputs.student is None:
        world.once(lambda: None if step0.exists() else transfer(run.recipe, teacher, step0))
    student = inputs.student or open_folder(step0)
    return convert(run, teacher, student, inputs.tokenizer, screen, stopping, world)


def transfer(recipe: "Recipe", teacher: "ModelFolder", step0: Path) -> None:
    """Make the untrained student, with the model files that let it load without radlads."""
    from radlads.weights_tools.standalone import model_files
    from radlads.weights_tools.surgery import make_student, student_spec

    assert recipe.student is not None
    arch, kept, flags = recipe.student.arch, recipe.student.keep_softmax, recipe.student.options
    ranks, untie = recipe.student.ranks, recipe.student.head == "untied"
    files, keys = model_files(student_spec(teacher, arch, kept, flags, ranks))
    make_student(
        teacher,
        step0,
        arch=arch,
        keep_softmax=kept,
        options=flags,
        seed=recipe.seed,
        extra_files=files,
        config_extra=keys,
        untie=untie,
        ranks=ranks,
        transfer_scale=recipe.student.transfer_scale,
        reinit=recipe.student.reinit,
    )


def result_of(folder: Path) -> TrainResult:
    """The end of a finished run: table, texts, report."""
    import json

    from radlads.report import plan_rows, table_rows, write_report
    from radlads.runs import read_metrics

    records = read_metrics(folder)

    final = json.loads((folder / "run.json").read_text())["final"]
    files = [str(path) for path in write_report(folder)]
    teacher = next(r for r in records if r.get("kind") == "eval" and r.get("stage") == "teacher")
    notes = []
    if "short_context_loss" in teacher:
        rise = teacher["short_context_loss"] - teacher["full_context_loss"]
        notes.append(f"the teacher's loss rises by {rise:.3f} nats when it sees only the last {teacher['short_context']} tokens")
    for stage, gpus, planned, took, planned_gib, used_gib in plan_rows(records):
        text = f"stage {stage} on {gpus} GPUs took {took} s of {planned} planned, and {used_gib} GiB of {planned_gib} planned"
        notes.append(text)
    samples = [r for r in records if r.get("kind") == "sample"]
    shown = [samples[0], samples[-1]] if len(samples) > 1 else samples
    titles = ("teacher", "student")
    texts = [{"title": title, "prompt": r["prompt"], "text": r["text"]} for title, r in zip(titles, shown, strict=False)]
    return TrainResult(str(folder), str(folder / "model"), "done", final, table_rows(records), texts, files, notes)


@contextmanager
def signals() -> Iterator[dict[str, int]]:
    """Ctrl-C and SIGTERM ask the run to save and stop; the second one is not caught."""
    asked = {"signal": 0}

    def note(number: int, _: object) -> None:
        if asked["signal"]:
            raise KeyboardInterrupt
        asked["signal"] = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
