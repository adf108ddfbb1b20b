"""`radlads inspect`: what a model folder holds, from its headers alone. No code of the folder is run."""

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

from radlads.cli.options import arg, opt
from radlads.cli.render import Table, size

if TYPE_CHECKING:
    from radlads.folder import ModelFolder

STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(kw_only=True)
class InspectOptions:
    """Which folder, and how much of it."""

    model: str = arg("Folder of the model.", metavar="MODEL", flag="--model")
    variant: Literal["A", "B", "C"] | None = opt(None, "Era of a published RAD-RWKV7 model, which files do not say.")
    config: str | None = opt(None, "Folder or config.json to read instead of the model's.", metavar="PATH")
    tensors: bool = opt(False, "List every tensor.", "--tensors")
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
    """What a folder holds; sizes in bytes, the state for one sequence in float32."""

    path: str
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

    def blocks(self) -> list[Table | str]:
        """The overview, the layers, the history and, if asked for, the tensors."""
        dims = self.dimensions
        student = self.architecture != "softmax"
        kind = f"student, {self.architecture}{_stage_name(self.stage)}" if student else "softmax attention"
        rows = [
            ("model", self.path),
            ("architecture", f"{self.family} {kind}"),
            ("parameters", f"{self.parameters:,} ({self.dtype}, {size(self.weight_bytes)})"),
            ("width", f"{dims['hidden_size']}, feed-forward {dims['intermediate_size']}, vocabulary {dims['vocab_size']:,}"),
            ("heads", f"{dims['num_heads']} of size {dims['head_dim']}, {dims['num_kv_heads']} for keys and values"),
            *((f"layers {first_last}", mixer) for first_last, mixer in _runs(self.mixers)),
        ]
        if student:
            rows.append(("state", f"{size(self.state_bytes)} for each sequence, at any length"))
        if self.cache_bytes_per_token:
            rows.append(("softmax cache", f"{size(self.cache_bytes_per_token)} for each token"))
        if self.teacher:
            rows.append(("teacher", self.teacher))
        blocks: list[Table | str] = [Table(("", ""), rows)]
        if self.notices:
            blocks.append(Table(("inferred",), [(notice,) for notice in self.notices]))
        if self.history:
            blocks.append(Table(("history",), [(_event(event),) for event in self.history]))
        blocks.append(Table(("file", "size"), [(name, size(count)) for name, count in self.files.items()], right=("size",)))
        if self.tensors:
            rows_of = [(row.name, row.dtype, " x ".join(map(str, row.shape)), row.file) for row in self.tensors]
            blocks.append(Table(("tensor", "dtype", "shape", "file"), rows_of))
        return blocks


def inspect_model(options: InspectOptions) -> InspectResult:
    """Read config, manifest and weight headers; R201 to R205 when they do not hold together."""
    from radlads.folder import open_folder

    folder = open_folder(options.model, variant=options.variant, config_from=options.config)
    spec = folder.spec
    dimensions = spec.to_dict()
    mixers, mixer_options = dimensions.pop("mixers"), dimensions.pop("mixer")
    width = {"F32": 4}.get(folder.dtype, 2)
    manifest = folder.manifest or {}
    teacher = manifest.get("teacher")
    return InspectResult(
        path=str(folder.path),
        family=spec.family,
        architecture=spec.recurrent or "softmax",
        stage=folder.stage,
        dtype=STORED[folder.dtype],
        parameters=spec.parameters(),
        weight_bytes=sum(entry.nbytes for entry in folder.weights.values()),
        dimensions=dimensions,
        mixers=mixers,
        mixer_options=mixer_options if spec.recurrent else {},
        state_bytes=spec.state_bytes(),
        cache_bytes_per_token=2 * width * spec.Ckv * len(spec.kept_layers),
        teacher=teacher.get("name") if isinstance(teacher, dict) else None,
        history=_list(manifest.get("history")),
        files=_sizes(folder),
        notices=list(folder.notices),
        tensors=_tensors(folder) if options.tensors else [],
    )


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _sizes(folder: "ModelFolder") -> dict[str, int]:
    from radlads.errors import printable

    return {printable(path.name): path.stat().st_size for path in sorted(folder.path.iterdir()) if path.is_file()}


def _tensors(folder: "ModelFolder") -> list[TensorRow]:
    return [TensorRow(name, entry.dtype, list(entry.shape), entry.path.name) for name, entry in folder.weights.items()]


def _runs(mixers: list[str]) -> list[tuple[str, str]]:
    """Neighbouring layers of one mixer as ("0-3", "rwkv7")."""
    runs, first = [], 0
    for mixer, group in groupby(mixers):
        last = first + len(list(group)) - 1
        runs.append((str(first) if first == last else f"{first}-{last}", mixer))
        first = last + 1
    return runs


def _stage_name(stage: int | None) -> str:
    if stage is None:
        return ""
    return ", " + ("stage 0 (untrained)", "stage 1 (aligned)", "stage 2 (distilled)", "stage 3 (long context)")[stage]


def _event(event: object) -> str:
    """One entry of the history, its fields in a line."""
    from radlads.errors import printable

    if not isinstance(event, dict):
        return printable(str(event), 200)
    return printable(", ".join(f"{key} {value}" for key, value in event.items()), 200)
