"""The pictures of a run as PNG files, drawn from its metrics with matplotlib (imported here and nowhere else)."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from radlads.files import new_file

Record = dict[str, Any]
Array = npt.NDArray[np.float64]

# Okabe and Ito's colours, which people with any kind of colour vision tell apart.
BLUE, ORANGE, GREEN, INK, SOFT = "#0072B2", "#D55E00", "#009E73", "#1f2933", "#7b8794"
STAGE_COLOUR = {0: SOFT, 1: ORANGE, 2: BLUE, 3: GREEN}
STAGE_NAME = {0: "before training", 1: "stage 1", 2: "stage 2", 3: "stage 3"}
LOSS_TITLE = {
    1: ("Stage 1: align mixers", "distance per token, ‖t − s‖ / √D"),
    2: ("Stage 2: distill logits", "KL to the teacher, nats per token"),
    3: ("Stage 3: language model", "cross-entropy, nats per token"),
}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 11,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "white",
}


def draw_plots(records: Sequence[Record], folder: Path) -> list[Path]:
    """Write the plots for which `records` holds data into `folder`: loss.png, layers.png, positions.png, finetune.png."""
    drawings: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
        "loss.png": draw_loss,
        "layers.png": draw_layers,
        "positions.png": draw_positions,
        "finetune.png": draw_finetune,
    }
    written = []
    with rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw(records)
            if figure is not None:
                with new_file(folder / name) as file:
                    figure.savefig(file, format="png", dpi=160)
                written.append(folder / name)
    return written


def draw_loss(records: Sequence[Record]) -> Figure | None:
    """Training loss of each stage over its tokens: every step thin, the running mean thick."""
    curves = {stage: curve(records, stage, "loss") for stage in LOSS_TITLE}
    curves = {stage: (x, y) for stage, (x, y) in curves.items() if len(x)}
    if not curves:
        return None
    width = 7.2 if len(curves) == 1 else 4.2 * len(curves)
    figure = Figure(figsize=(width, 3.7), layout=ConstrainedLayoutEngine(w_pad=0.12))
    for index, (stage, (x, y)) in enumerate(curves.items(), 1):
        axes = figure.add_subplot(1, len(curves), index)
        title, unit = LOSS_TITLE[stage]
        colour = STAGE_COLOUR[stage]
        smooth = running_mean(y, max(1, len(y) // 40))
        axes.plot(x, y, color=colour, alpha=0.28, linewidth=0.8)
        axes.plot(x, smooth, color=colour, linewidth=2.2)
        axes.plot(x[-1], smooth[-1], "o", color=colour, markersize=5, clip_on=False)
        axes.set_title(title)
        axes.set_ylabel(unit)
        tokens_axis(axes, x[-1])
        value_axis(axes, y)
        label_ends(figure, axes, [(float(smooth[-1]), f"{smooth[-1]:#.3g}", colour)])
    return figure


def draw_layers(records: Sequence[Record]) -> Figure | None:
    """Alignment error of each layer over the tokens of stage 1, coloured by depth."""
    rows = [
        r for r in records if r.get("kind") == "train" and numbers(r.get("layer_error")) is not None and number(r.get("tokens"))
    ]
    layers = max((len(r["layer_error"]) for r in rows), default=0)
    rows = [r for r in rows if len(r["layer_error"]) == layers]
    if not layers or not rows:
        return None
    x = np.array([r["tokens"] for r in rows], np.float64)
    errors = np.array([numbers(r["layer_error"]) for r in rows], np.float64)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps["viridis"](np.linspace(0.0, 0.82, layers))
    smooth = np.stack([running_mean(errors[:, layer], max(1, len(x) // 40)) for layer in range(layers)], 1)
    for layer in range(layers):
        axes.plot(x, smooth[:, layer], color=colours[layer], linewidth=2 if layers <= 12 else 1.2)
    axes.set_title("Stage 1: alignment error of each layer")
    axes.set_ylabel("distance per token, ‖t − s‖ / √D")
    tokens_axis(axes, x[-1])
    value_axis(axes, smooth)
    shown = range(layers) if layers <= 12 else sorted({round(i * (layers - 1) / 7) for i in range(8)})
    texts = [(float(smooth[-1, layer]), f"layer {layer}", colours[layer]) for layer in shown]
    label_ends(figure, axes, texts)
    return figure


def draw_positions(records: Sequence[Record]) -> Figure | None:
    """KL from teacher to student at each position of the context, one line for each stage."""
    latest = {
        r["stage"]: (numbers(r.get("kl_by_position")), r.get("kl_stretch", 1))
        for r in records
        if r.get("kind") == "eval" and isinstance(r.get("stage"), int) and r["stage"] in STAGE_NAME
    }
    usable = ((stage, kl, n) for stage, (kl, n) in sorted(latest.items()) if kl is not None and number(n) and n > 0)
    curves = {stage: (kl, n) for stage, kl, n in usable if len(kl) > 1}
    if not curves:
        return None
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ends = []
    for stage, (kl, stretch) in curves.items():
        x, y = pooled(kl)
        colour = STAGE_COLOUR[stage]
        if len(x) < len(kl):
            axes.plot(np.arange(1, len(kl) + 1) * stretch, kl, color=colour, alpha=0.18, linewidth=0.7)
        axes.plot(x * stretch, y, color=colour, linewidth=2.2)
        ends.append((float(y[-1]), STAGE_NAME[stage] if stage == 0 else f"after {STAGE_NAME[stage]}", colour))
    axes.set_title("Distance to the teacher along the context")
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("KL(teacher ‖ student), nats per token")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(1, max(len(kl) * stretch for kl, stretch in curves.values()))
    value_axis(axes, np.concatenate([pooled(kl)[1] for kl, _ in curves.values()]))
    label_ends(figure, axes, ends)
    return figure


def draw_finetune(records: Sequence[Record]) -> Figure | None:
    """Training and validation loss of a fine-tuning run, whose records have no stage, over its iterations."""
    lines = {kind: steps(records, kind) for kind in ("train", "valid")}
    drawn = [(kind, x, y) for kind, (x, y) in lines.items() if len(x)]
    if not drawn:
        return None
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    axes = figure.add_subplot()
    style = {"train": ("training", BLUE, None), "valid": ("validation", ORANGE, "o")}
    ends = []
    for kind, x, y in drawn:
        name, colour, marker = style[kind]
        axes.plot(x, y, color=colour, linewidth=2.2, marker=marker, markersize=5)
        ends.append((float(y[-1]), f"{name} {y[-1]:#.3g}", colour))
    axes.set_title("Fine-tuning")
    axes.set_xlabel("iterations")
    axes.set_ylabel("cross-entropy, nats per token")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlim(0, max(max(x[-1] for _, x, _ in drawn), 1))
    value_axis(axes, np.concatenate([y for _, _, y in drawn]))
    label_ends(figure, axes, ends)
    return figure


def steps(records: Sequence[Record], kind: str) -> tuple[Array, Array]:
    """(step, loss) of the records of a kind that belong to no stage."""
    found = (r for r in records if r.get("kind") == kind and "stage" not in r)
    points = [(r["step"], r["loss"]) for r in found if number(r.get("step")) and number(r.get("loss"))]
    table = np.array(points, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def curve(records: Sequence[Record], stage: int, key: str) -> tuple[Array, Array]:
    """(tokens, values) of the training records of a stage, those without a finite number left out."""
    points = [
        (r["tokens"], r[key])
        for r in records
        if r.get("kind") == "train" and r.get("stage") == stage and number(r.get("tokens")) and number(r.get(key))
    ]
    table = np.array(points, np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def number(value: object) -> bool:
    """Whether a value from a record is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def numbers(value: object) -> Array | None:
    """A list of numbers from a record as an array, its gaps as NaN; None for anything else."""
    if not isinstance(value, list) or not any(number(item) for item in value):
        return None
    return np.array([item if number(item) else np.nan for item in value], np.float64)


def running_mean(values: Array, reach: int) -> Array:
    """Mean over `reach` values to each side; NaN counts as absent.

    The window stays symmetric at the start, where losses fall fast, and becomes one-sided at the end, where they are flat.
    """
    present = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(present, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(present)])
    index = np.arange(len(values))
    low = index - np.minimum(index, reach)
    high = index + np.minimum(np.minimum(index, reach), len(values) - 1 - index) + 1
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def pooled(values: Array, bins: int = 40) -> tuple[Array, Array]:
    """(position from 1, mean) over windows that grow with the position, as a logarithmic axis shows them."""
    edges = np.unique(np.round(np.geomspace(1, len(values) + 1, bins + 1)).astype(int))
    centres = [math.sqrt(low * (high - 1)) for low, high in pairwise(edges)]
    windows = [values[low - 1 : high - 1] for low, high in pairwise(edges)]
    means = [window[np.isfinite(window)].mean() if np.isfinite(window).any() else math.nan for window in windows]
    return np.array(centres), np.array(means)


def tokens_axis(axes: Axes, last: float) -> None:
    """Label the horizontal axis in tokens, thousands or millions of them."""
    unit, name = next(((u, n) for u, n in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")) if last >= 2 * u), (1.0, ""))
    axes.set_xlabel(f"{name}tokens trained on")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(0, max(last, 1))


def value_axis(axes: Axes, values: Array) -> None:
    """A logarithmic vertical axis where the values are positive and span more than a factor of three."""
    finite = values[np.isfinite(values)]
    if not len(finite) or finite.min() <= 0 or finite.max() < 3 * finite.min():
        axes.yaxis.set_major_locator(MaxNLocator(6))
        return
    axes.set_yscale("log")
    decades = np.log10(finite.max() / finite.min())
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def label_ends(figure: Figure, axes: Axes, texts: list[tuple[float, str, Any]]) -> None:
    """Name each line at its right end: (value, text, colour); names that would touch are moved apart."""
    figure.draw_without_rendering()
    ordered = sorted((t for t in texts if np.isfinite(t[0])), key=lambda t: t[0])
    heights = [axes.transAxes.inverted().transform(axes.transData.transform((1, value)))[1] for value, _, _ in ordered]
    gap = 13 * figure.dpi / 72 / axes.get_window_extent().height
    for height, (_, text, colour) in zip(spread(heights, gap), ordered, strict=True):
        style = {"va": "center", "color": colour, "fontsize": 10}
        axes.annotate(text, (1, height), (7, 0), xycoords="axes fraction", textcoords="offset points", **style)


def spread(heights: list[float], gap: float) -> list[float]:
    """The places nearest to ascending `heights` that are at least `gap` apart (isotonic regression)."""
    blocks: list[list[float]] = []
    for index, height in enumerate(heights):
        block = [height - index * gap]
        while blocks and sum(blocks[-1]) / len(blocks[-1]) > sum(block) / len(block):
            block = blocks.pop() + block
        blocks.append(block)
    means = [sum(block) / len(block) for block in blocks for _ in block]
    return [mean + index * gap for index, mean in enumerate(means)]
