"""The report of a run: its plots as PNG files, and one HTML page that needs nothing beside it.

It reads run.json, recipe.yaml and metrics.jsonl; of the latter the records of kind "train", "eval" and "sample"
(`{"kind": "sample", "stage": 0..3 | "teacher", "prompt": ..., "text": ...}`).
"""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from radlads.errors import fail
from radlads.files import write_file
from radlads.plots import draw_plots, number
from radlads.runs import METRICS, RECIPE, RECORD, read_metrics

TEMPLATE = Path(__file__).parent / "report.html.j2"
CAPTIONS = {
    "loss.png": ("Training loss", "Each step is thin, the running mean thick. Every loss has its own unit."),
    "layers.png": (
        "Alignment by layer",
        "How far each new mixer is from the attention it replaces; layer 0 is next to the embedding.",
    ),
    "positions.png": ("Distance by position", "A state that forgets shows as a line that rises to the right."),
    "finetune.png": ("Fine-tuning loss", "Where training falls and validation rises, the adapter learns its examples by heart."),
}
ROWS = {
    "teacher": "Teacher",
    0: "Student, before training",
    1: "Student after stage 1",
    2: "Student after stage 2",
    3: "Student after stage 3",
}


def write_report(run_folder: str | Path) -> list[Path]:
    """Draw the plots of a run into plots/ and write report.html; returns the files written.

    Works on an unfinished run with what there is. Raises R201 when the folder holds no run, R401 or R402 when it cannot write.
    """
    folder = Path(run_folder)
    if not (folder / RECIPE).is_file():
        raise fail("R201", where=folder, why=f"it holds no {RECIPE}", fix="Give the folder of a run")
    records = read_metrics(folder)
    (folder / "plots").mkdir(exist_ok=True)
    plots = draw_plots(records, folder / "plots")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page_values(folder, records, plots))
    write_file(folder / "report.html", page)
    return [*plots, folder / "report.html"]


def page_values(folder: Path, records: Sequence[dict[str, Any]], plots: Sequence[Path]) -> dict[str, Any]:
    """What the template shows."""
    record, rows = read_record(folder), table_rows(records)
    return {
        "name": record.get("name") or folder.resolve().name,
        "done": record.get("status") == "done",
        "headline": headline(record.get("final"), of_student=any(row[0] != ROWS["teacher"] for row in rows)),
        "rows": rows,
        "note": context_note(records),
        "plots": [(*CAPTIONS[path.name], base64.b64encode(path.read_bytes()).decode()) for path in plots],
        "samples": sample_texts(records),
        "recipe": (folder / RECIPE).read_text(encoding="utf-8", errors="replace"),
        "environment": record.get("environment") if isinstance(record.get("environment"), dict) else {},
        "stages": stage_rows(records),
        "plan": plan_rows(records),
        "metrics": METRICS,
    }


def read_record(folder: Path) -> dict[str, Any]:
    """run.json as a table; empty when there is none yet or it is damaged."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def headline(final: object, of_student: bool) -> list[tuple[str, str]]:
    """(figure, what it is) of the result; empty for a run that is not finished. A run without student shows the teacher."""
    if not isinstance(final, dict):
        return []
    shown = [
        (figure(final.get("ppl_ratio"), ".3f"), "student ÷ teacher perplexity"),
        (figure(final.get("student_ppl"), ".2f"), "student perplexity"),
        (figure(final.get("teacher_ppl"), ".2f"), "teacher perplexity"),
        (figure(final.get("kl"), ".4f"), "KL to the teacher, nats per token"),
        (percent(final.get("agreement")), "same most likely next token"),
        (figure(final.get("valid_loss"), ".3f"), "validation loss, nats per token"),
        (figure(final.get("first_valid_loss"), ".3f"), "validation loss before"),
        (figure(final.get("train_loss"), ".3f"), "training loss"),
        (figure(final.get("test_loss"), ".3f"), "test loss"),
    ]
    of_both = () if of_student else ("student", "KL", "same")
    return [(value, meaning) for value, meaning in shown if value != "–" and not meaning.startswith(of_both)]


def table_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row for the teacher and one for the student at each stage, from the latest measurement of each."""
    latest = {r.get("stage"): r for r in records if r.get("kind") == "eval" and isinstance(r.get("stage"), int | str)}
    teacher = perplexity(latest.get("teacher", {}))
    rows = []
    for stage, title in ROWS.items():
        if stage in latest:
            r, ppl = latest[stage], perplexity(latest[stage])
            ratio = ppl / teacher if ppl is not None and teacher else None
            of_teacher = stage == "teacher"
            kl = "–" if of_teacher else figure(r.get("kl"), ".4f")
            agreement = "–" if of_teacher else percent(r.get("agreement"))
            rows.append([title, figure(r.get("loss"), ".4f"), figure(ppl, ",.2f"), figure(ratio, ",.3f"), kl, agreement])
    return rows


def context_note(records: Sequence[dict[str, Any]]) -> str:
    """How much the teacher relies on more than its last few tokens; empty where that was not measured."""
    for r in reversed(records):
        short, full, context = (r.get(key) for key in ("short_context_loss", "full_context_loss", "short_context"))
        if r.get("stage") == "teacher" and number(short) and number(full) and number(context):
            return f"With only its last {context} tokens to look at, the teacher's loss is {short - full:.3f} nats higher."
    return ""


def stage_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Steps, tokens, last loss and median speed of each trained stage."""
    rows = []
    for stage in (1, 2, 3):
        lines = [r for r in records if r.get("kind") == "train" and r.get("stage") == stage]
        if lines:
            last = lines[-1]
            speeds = sorted(r["tok_s"] for r in lines if number(r.get("tok_s")))
            speed = speeds[len(speeds) // 2] if speeds else None
            rows.append([str(stage), *(figure(value, form) for value, form in (
                (last.get("step"), ",.0f"), (last.get("tokens"), ",.0f"), (last.get("loss"), ".4f"), (speed, ",.0f")
            ))])  # fmt: skip
    return rows


def plan_rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Time and peak memory of each stage beside its plan; empty where nothing was planned."""
    latest = {r.get("stage"): r for r in records if r.get("kind") == "resources" and number(r.get("planned_seconds"))}
    return [
        [
            str(stage),
            *(figure(r.get(key), ",.0f") for key in ("processes", "planned_seconds", "seconds")),
            *(figure(r.get(key), ".1f") for key in ("planned_peak_gib", "peak_gib")),
        ]
        for stage, r in sorted(latest.items(), key=lambda item: str(item[0]))
    ]


def sample_texts(records: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(writer, prompt, text): the teacher, and the student after its last stage."""
    latest = {r.get("stage"): r for r in records if r.get("kind") == "sample" and isinstance(r.get("stage"), int | str)}
    student = max((stage for stage in latest if isinstance(stage, int)), default=None)
    chosen = [stage for stage in ("teacher", student) if stage in latest]
    return [
        (ROWS.get(stage, str(stage)), str(latest[stage].get("prompt", "")), str(latest[stage].get("text", "")))
        for stage in chosen
    ]


def perplexity(record: dict[str, Any]) -> float | None:
    """Perplexity of an eval record: as it says, or from its loss."""
    if number(record.get("ppl")):
        return float(record["ppl"])
    return math.exp(record["loss"]) if number(record.get("loss")) and record["loss"] < 700 else None


def figure(value: object, form: str) -> str:
    """A number in the given format, a dash when there is none."""
    return format(value, form) if number(value) else "–"


def percent(value: object) -> str:
    """A share as per cent, a dash when there is none."""
    return f"{100 * float(value):.1f} %" if isinstance(value, int | float) and number(value) else "–"
