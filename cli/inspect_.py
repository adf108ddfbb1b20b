"""`radlads inspect`: what a model of any format, an adapter or a state holds, or how two models differ; none of its code runs."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from radlads.cli.options import arg, opt
from radlads.cli.render import Table, progress, size

if TYPE_CHECKING:
    from radlads.cli.inspect_adapter import AdapterResult
    from radlads.cli.inspect_bare import BareResult
    from radlads.cli.inspect_state import StateResult
    from radlads.weights_tools.diff import Difference
    from radlads.weights_tools.formats.format import Source

HASH = re.compile("[0-9a-f]{64}")
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(kw_only=True)
class InspectOptions:
    """Which model, and how much of it."""

    model: str = arg("Folder or file: safetensors, MLX, .pth or .gguf; an adapter; a state.", metavar="MODEL", flag="--model")
    variant: Literal["A", "B", "C"] | None = opt(None, "Era of a published RAD-RWKV7 model, which files do not say.")
    config: str | None = opt(
        None, "Folder or config.json to read instead of the model's; the model of an adapter or a state.", metavar="PATH"
    )
    stage: Literal["0", "1", "2", "3"] | None = opt(None, "Stage of a student whose files do not say.")
    tensors: bool = opt(False, "List every tensor.", "--tensors")
    diff: str | None = opt(None, "Another model: say how the two differ, values included.", metavar="OTHER")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class TensorRow:
    """One stored tensor."""

    name: str
    dtype: str
    shape: list[int]
    file: str


@dataclass
class InspectResult:
    """What a model holds; sizes in bytes, the state for one sequence in float32. `dtype` is that of the float values."""

    path: str
    format: str
    layout: str
    quantised: bool
    family: str
    architecture: str
    stage: int | None
    dtype: str
    parameters: int
    weight_bytes: int
    dimensions: dict[str, Any]
    mixers: list[str]
    mixer_options: dict[str, Any]
    state_bytes: int
    cache_bytes_per_token: int
    teacher: str | None
    history: list[Any]
    files: dict[str, int]
    notices: list[str] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)
    diff: dict[str, Any] | None = None

    def blocks(self) -> list[Table | str]:
        """The overview, the layers, the history and, if asked for, the tensors."""
        dims = self.dimensions
        student = self.architecture != "softmax"
        flags = _flags(self.architecture, self.mixer_options, any(mixer == "softmax" for mixer in self.mixers))
        rows = [
            *weight_rows(self, f"{self.family} "),
            ("heads", f"{dims['num_heads']} of size {dims['head_dim']}, {dims['num_kv_heads']} for keys and values"),
            *layer_rows(self.mixers),
        ]
        if student:
            rows += [("mixer", flags), ("ranks", rank_text(dims["ranks"]))]
            rows.append(("state", f"{size(self.state_bytes)} for each sequence, at any length"))
        if self.cache_bytes_per_token:
            rows.append(("softmax cache", f"{size(self.cache_bytes_per_token)} for each token"))
        if self.teacher:
            rows.append(("teacher", self.teacher))
        if self.diff is not None:
            return [Table(("", ""), rows), *_difference(self.diff)]
        blocks: list[Table | str] = [Table(("", ""), rows)]
        if self.notices:
            blocks.append(Table(("inferred",), [(notice,) for notice in self.notices]))
        if self.history:
            blocks.append(Table(("history",), [(_event(event),) for event in self.history]))
        return [*blocks, *listings(self.files, self.tensors)]


def inspect_model(options: InspectOptions) -> "InspectResult | AdapterResult | BareResult | StateResult":
    """Read config, manifest and weight headers; R201 to R205 when they do not hold together."""
    from radlads.adapters import is_adapter
    from radlads.cli.inspect_bare import inspect_bare, is_bare
    from radlads.states import is_state
    from radlads.weights_tools.diff import compare
    from radlads.weights_tools.formats import open_source
    from radlads.weights_tools.formats.format import Reading

    if is_adapter(options.model):
        from radlads.cli.inspect_adapter import inspect_adapter

        return inspect_adapter(options)
    if is_state(options.model):
        from radlads.cli.inspect_state import inspect_state

        return inspect_state(options)
    if is_bare(options):
        return inspect_bare(options)
    stage = None if options.stage is None else int(options.stage)
    source = open_source(options.model, Reading(options.config, options.variant, stage))
    difference = None
    if options.diff is not None:
        other = open_source(options.diff, Reading(options.config, options.variant))
        with progress("compare") as report:
            difference = _plain_difference(compare(source, other, report), str(other.path))
    return _result(source, options.tensors, difference)


def _result(source: "Source", tensors: bool, difference: dict[str, Any] | None) -> InspectResult:
    spec = source.spec
    dimensions = spec.to_dict()
    mixers, mixer_options = dimensions.pop("mixers"), dimensions.pop("mixer")
    manifest = source.manifest or {}
    teacher = manifest.get("teacher") or source.teacher
    rows = [TensorRow(row.name, row.dtype, list(row.shape), row.file) for row in source.stored] if tensors else []
    return InspectResult(
        path=str(source.path),
        format=source.format,
        layout=source.layout,
        quantised=source.quantised,
        family=spec.family,
        architecture=spec.recurrent or "softmax",
        stage=source.stage,
        dtype=STORED[source.dtype],
        parameters=spec.parameters(),
        weight_bytes=sum(row.nbytes for row in source.stored),
        dimensions=dimensions,
        mixers=mixers,
        mixer_options=mixer_options if spec.recurrent else {},
        state_bytes=spec.state_bytes(),
        cache_bytes_per_token=2 * (4 if source.dtype == "F32" else 2) * spec.Ckv * len(spec.kept_layers),
        teacher=_teacher(teacher) if isinstance(teacher, Mapping) else None,
        history=_list(manifest.get("history")),
        files=file_sizes(source.path),
        notices=list(source.notices),
        tensors=rows,
        diff=difference,
    )


def _teacher(record: Mapping[str, Any]) -> str | None:
    """Where it can be had, or its name; and its revision, where that is known."""
    from radlads.errors import printable

    name, revision = record.get("repository") or record.get("name"), record.get("revision")
    return printable(f"{name} at {revision}" if revision else str(name), 200) if name else None


def _plain_difference(found: "Difference", other: str) -> dict[str, Any]:
    return {"other": other, "same": found.same, **asdict(found)}


def _difference(found: dict[str, Any]) -> list[Table | str]:
    """What differs, as tables; the tensors that are furthest apart first."""
    if found["same"]:
        return [f"The same as {found['other']}: settings, and {found['equal']} tensors to the bit."]
    blocks: list[Table | str] = [f"Compared with {found['other']}: {found['equal']} tensors are equal to the bit."]
    if found["settings"]:
        blocks.append(Table(("setting", "here", "there"), found["settings"]))
    for title, names in (("only here", found["only_left"]), ("only there", found["only_right"])):
        if names:
            blocks.append(Table((title,), [(name,) for name in names]))
    if found["tensors"]:
        order = sorted(found["tensors"], key=lambda row: -(row["relative"] if row["relative"] is not None else 1e9))
        rows = [
            (row["name"], row["what"], row["left"], row["right"], _number(row["largest"]), _number(row["relative"]))
            for row in order
        ]
        columns = ("tensor", "differs in", "here", "there", "largest gap", "relative")
        blocks.append(Table(columns, rows, right=columns[-2:]))
    return blocks


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def file_sizes(place: Path) -> dict[str, int]:
    """{name: bytes} of the files of a folder, or of one file; names that may be printed."""
    from radlads.errors import printable

    found = sorted(place.iterdir()) if place.is_dir() else [place]
    return {printable(path.name): path.stat().st_size for path in found if path.is_file()}


def listings(files: dict[str, int], tensors: list[TensorRow]) -> list[Table]:
    """The files with their sizes, and the tensors where there are any to show."""
    found = [Table(("file", "size"), [(name, size(count)) for name, count in files.items()], right=("size",))]
    if tensors:
        rows = [(row.name, row.dtype, " x ".join(map(str, row.shape)), row.file) for row in tensors]
        found.append(Table(("tensor", "dtype", "shape", "file"), rows))
    return found


def weight_rows(found: "InspectResult | BareResult", family: str = "") -> list[tuple[str, str]]:
    """What every model's weights show; `family` is told before the architecture."""
    dims = found.dimensions
    student = found.architecture != "softmax"
    kind = f"student, {found.architecture}{stage_text(found.stage)}" if student else "softmax attention"
    return [
        ("model", found.path),
        ("format", f"{found.format}: {found.layout}"),
        ("architecture", f"{family}{kind}"),
        ("parameters", f"{found.parameters:,} ({found.dtype}, {size(found.weight_bytes)})"),
        ("width", f"{dims['hidden_size']}, feed-forward {dims['intermediate_size']}, vocabulary {dims['vocab_size']:,}"),
    ]


def layer_rows(mixers: list[str]) -> list[tuple[str, str]]:
    """Neighbouring layers of one mixer as ("layers 0-3", "rwkv7")."""
    rows, first = [], 0
    for mixer, group in groupby(mixers):
        last = first + len(list(group)) - 1
        rows.append((f"layers {first}" if first == last else f"layers {first}-{last}", mixer))
        first = last + 1
    return rows


def rank_text(ranks: Mapping[str, int]) -> str:
    """The widths of the low-rank pairs that there are."""
    return ", ".join(f"{name.replace('_', ' ')} {width}" for name, width in ranks.items() if width)


def _flags(architecture: str, options: dict[str, Any], hybrid: bool) -> str:
    """The flags that the model's mixers read, for people."""
    from radlads.mixers import MIXERS

    if not options:
        return ""
    words = {
        "variant": f"variant {options['variant']}",
        "gate": {"full": "full gate", "lowrank": "low-rank gate", "none": "no gate"}[options["gate"]],
        "rope": "RoPE" if options["rope"] else "no RoPE",
        "token_shift": "token shift" if options["token_shift"] else "no token shift",
        "balance": "balanced keys" if options["balance"] else "keys not balanced",
        "groupnorm": "GroupNorm" if options["groupnorm"] else "no GroupNorm",
        "clamp": "log-decay not clamped" if options["clamp"] is None else f"log-decay clamped at {options['clamp']:g}",
    }
    told = [text for name, text in words.items() if name in MIXERS[architecture].flags]
    return ", ".join([*told, f"softmax layers with{'' if options['kept_rope'] else 'out'} RoPE"] if hybrid else told)


def stage_text(stage: int | None) -> str:
    if stage is None:
        return ""
    return ", " + ("stage 0 (untrained)", "stage 1 (aligned)", "stage 2 (distilled)", "stage 3 (long context)")[stage]


def _event(event: object) -> str:
    """One entry of the history, its fields in a line."""
    from radlads.errors import printable

    if not isinstance(event, dict):
        return printable(str(event), 200)
    return printable(", ".join(f"{key} {_short(value)}" for key, value in event.items()), 200)


def _short(value: object) -> object:
    """A table by the name in it, a list by its length, a hash by its beginning; anything else as it is."""
    if isinstance(value, dict):
        return value.get("repository") or value.get("name") or f"of {len(value)} entries"
    if isinstance(value, str) and HASH.fullmatch(value):
        return value[:12]
    return f"({len(value)})" if isinstance(value, list) else value
