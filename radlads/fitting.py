"""What to change in a recipe that does not fit its GPUs: every way is planned, and the fastest that changes least is told."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import product

from pydantic import ValidationError

from radlads.costs import MOMENT_BYTES, Gpu, Plan, plan_run, plan_stage
from radlads.recipe import Parallel, Recipe
from radlads.spec import ModelSpec


def fit(recipe: Recipe, teacher: ModelSpec | None, student: ModelSpec, gpus: int, gpu: Gpu) -> list[tuple[str, Plan]]:
    """What makes a run fit that does not: settings that cost little time, and more GPUs; none where neither helps.

    Each is (flags of the command line, the plan with them).
    """
    plans = [(flags(recipe, tried), plan_run(tried, teacher, student, gpus, gpu)) for tried in (
        smaller(one, teacher, student, gpus, gpu) for one in savings(recipe, gpus, student))]  # fmt: skip
    fitting = [(settings, plan) for settings, plan in plans if plan.fits]
    fastest = min((plan.hours for _, plan in fitting), default=0.0)
    # Of those that are as good as the fastest, the one that changes least.
    good = [(settings, plan) for settings, plan in fitting if plan.hours <= 1.02 * fastest]
    found = sorted(good, key=lambda one: (one[0].count("--set"), one[1].hours))[:1]
    for more in (gpus * 2, gpus * 4, gpus * 8):
        if all(stage.batch_size % more == 0 for stage in recipe.stages):
            plan = plan_run(recipe, teacher, student, more, gpu)
            if plan.fits:
                found.append((f"--gpus {more}", plan))
                break
    return found


def savings(recipe: Recipe, gpus: int, student: ModelSpec) -> Iterator[Recipe]:
    """The recipe with every combination of the settings that save memory in all stages."""
    heads = (False, True) if gpus > 1 and not student.tie_embeddings else (recipe.parallel.vocab_heads,)
    teachers = dict.fromkeys((recipe.parallel.teacher, "offloaded"))
    for split, moments, held in product(heads, MOMENT_BYTES, teachers):
        tried = {**recipe.parallel.model_dump(), "vocab_heads": split, "moments": moments, "teacher": held}
        with suppress(ValidationError):  # settings that do not go together
            yield recipe.model_copy(update={"parallel": Parallel(**tried)})


def smaller(recipe: Recipe, teacher: ModelSpec | None, student: ModelSpec, gpus: int, gpu: Gpu) -> Recipe:
    """The recipe with the largest micro-batch of each stage that fits and is about as fast as any that does."""
    stages = []
    for stage in recipe.stages:
        sizes = [n for n in (stage.micro_batch, 8, 4, 2, 1) if n <= stage.micro_batch and stage.batch_size % n == 0]
        tried = [stage.model_copy(update={"micro_batch": size}) for size in sizes]
        plans = [plan_stage(one, teacher, student, recipe.parallel, gpus, gpu, recipe.precision) for one in tried]
        fastest = min((plan.seconds for plan in plans if plan.fits), default=0.0)
        good = (one for one, plan in zip(tried, plans, strict=True) if plan.fits and plan.seconds <= 1.02 * fastest)
        stages.append(next(good, stage))
    return recipe.model_copy(update={"stages": tuple(stages)})


def flags(recipe: Recipe, changed: Recipe) -> str:
    """The `--set` flags that turn one recipe into the other."""
    words = [
        f"--set stages.{number}.micro_batch={new.micro_batch}"
        for number, (old, new) in enumerate(zip(recipe.stages, changed.stages, strict=True))
        if old.micro_batch != new.micro_batch
    ]
    before, after = recipe.parallel.model_dump(), changed.parallel.model_dump()
    words += [f"--set parallel.{name}={str(after[name]).lower()}" for name in after if after[name] != before[name]]
    return " ".join(words)
