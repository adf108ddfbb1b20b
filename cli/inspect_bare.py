"""`radlads inspect FILE.pth` without a config: what names and shapes of the tensors alone show."""

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from radlads.cli.inspect_ import STORED, InspectOptions, TensorRow, file_sizes, layer_rows, listings, rank_text, weight_rows
from radlads.cli.render import Table

MISSING = "head size, norm epsilon and rotary base are not in the file: --config names the teacher's folder or config.json"


@dataclass
class BareResult:
    """What a file of weights holds, under the names of `InspectResult`; `dimensions` are those that shapes show."""

    path: str
    format: str
    layout: str
    architecture: str
    stage: int | None
    dtype: str
    parameters: int
    weight_bytes: int
    dimensions: dict[str, Any]
    mixers: list[str]
    files: dict[str, int]
    notices: list[str] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)

    def blocks(self) -> list[Table | str]:
        """The overview, what is missing, the file and, if asked for, the tensors."""
        ranks = [("ranks", rank_text(self.dimensions["ranks"]))] if self.architecture != "softmax" else []
        rows = [*weight_rows(self), *layer_rows(self.mixers), *ranks]
        notices = Table(("inferred",), [(notice,) for notice in self.notices])
        return [Table(("", ""), rows), notices, *listings(self.files, self.tensors)]


def is_bare(options: InspectOptions) -> bool:
    """Whether a .pth file without a config.json is named, and nothing is asked that needs one."""
    from radlads.folder import CONFIG
    from radlads.weights_tools.formats import recognise

    if any(value is not None for value in (options.config, options.variant, options.stage, options.diff)):
        return False
    name, place = recognise(Path(options.model))
    return name == "pth" and not (place.parent / CONFIG).exists()


def inspect_bare(options: InspectOptions) -> BareResult:
    """Read the names and shapes of a file; R202 refused, R203 where they are those of no model of ours, R205 experts."""
    from radlads.families.outline import outline
    from radlads.families.published import NO_WEIGHTS
    from radlads.weights_tools.formats import recognise, stage_by_name
    from radlads.weights_tools.formats.format import most_bytes
    from radlads.weights_tools.formats.pth import named_tensors
    from radlads.weights_tools.formats.pth_file import read_pth

    _, path = recognise(Path(options.model))
    entries = read_pth(path)
    dtype = most_bytes(entries.values())
    named, layout = named_tensors(path, entries)
    found = outline({name: tensor.shape for name, tensor in named.items()})
    stage, told = stage_by_name(path) if found.recurrent else (None, None)
    weights = (entry for entry in entries.values() if not entry.name.endswith(NO_WEIGHTS))
    places = {(entry.start, entry.stop): entry for entry in weights}  # tied tensors share theirs
    rows = [TensorRow(entry.name, entry.dtype, list(entry.shape), path.name) for entry in entries.values()]
    return BareResult(
        path=str(path),
        format="pth",
        layout=layout,
        architecture=found.recurrent or "softmax",
        stage=stage,
        dtype=STORED.get(dtype, dtype),
        parameters=sum(prod(entry.shape) for entry in places.values()),
        weight_bytes=sum(entry.nbytes for entry in places.values()),
        dimensions=found.dimensions,
        mixers=list(found.mixers),
        files=file_sizes(path),
        notices=[MISSING, *found.notices, *([told] if told else [])],
        tensors=rows if options.tensors else [],
    )
