"""`radlads inspect ADAPTER`: what an adapter of mlx-lm or peft holds, and whether it fits its model."""

import re
from collections import Counter
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from radlads.cli.inspect_ import InspectOptions, TensorRow, file_sizes, listings
from radlads.cli.render import Table, size


@dataclass
class AdapterResult:
    """What an adapter holds; `fits` says whether its tensors fit `model`, None where that is not here to be asked."""

    path: str
    format: str
    kind: str
    rank: int
    scale: float
    dropout: float
    parameters: int
    weight_bytes: int
    modules: list[str]
    model: str | None
    fits: bool | None
    files: dict[str, int]
    notices: list[str] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)

    def blocks(self) -> list[Table | str]:
        """The overview, and the tensors if asked for."""
        low_rank = [("rank", f"{self.rank}, scale {self.scale:g}, dropout {self.dropout:g}")] if self.rank else []
        fit = {True: ", which it fits", False: ", which it does not fit", None: ""}[self.fits]
        rows = [
            ("adapter", self.path),
            ("format", self.format),
            ("kind", self.kind),
            *low_rank,
            ("parameters", f"{self.parameters:,} ({size(self.weight_bytes)})"),
            *_by_layers(self.modules),
            ("model", f"{self.model or 'not named'}{fit}"),
        ]
        return [Table(("", ""), rows), *self.notices, *listings(self.files, self.tensors)]


def inspect_adapter(options: InspectOptions) -> AdapterResult:
    """Read an adapter's config and header, and hold it against its model where that is there. R201 to R205, R101."""
    from radlads.adapted import check_fit
    from radlads.adapters import base_of, read_config, stored_adapter
    from radlads.errors import RadladsError, fail, printable
    from radlads.folder import open_folder

    path = Path(options.model)
    if options.diff is not None:
        raise fail("R101", where="--diff", why=f"{path} is an adapter", fix="Compare models: `radlads fuse` makes it part of one")
    adapter = stored_adapter(path, read_config(path))
    base, fits, notices = options.config or base_of(path), None, []
    if base is not None and Path(base).is_dir():
        try:
            check_fit(adapter, open_folder(base, variant=options.variant))
            fits = True
        except RadladsError as error:
            fits, notices = False, [f"{error.where}: {error.why}"]
    elif base is not None:
        notices = ["The model is not here, so whether the adapter fits it was not checked (--config names its folder)."]
    entries = adapter.entries
    return AdapterResult(
        path=str(path),
        format="peft" if adapter.from_peft else "mlx-lm",
        kind=adapter.kind,
        rank=adapter.rank,
        scale=adapter.scale,
        dropout=adapter.dropout,
        parameters=sum(prod(entry.shape) for entry in entries.values()),
        weight_bytes=sum(entry.nbytes for entry in entries.values()),
        modules=adapter.modules() or list(entries),
        model=None if base is None else printable(base, 200),
        fits=fits,
        files=file_sizes(path),
        notices=notices,
        tensors=[TensorRow(name, entry.dtype, list(entry.shape), entry.path.name) for name, entry in entries.items()]
        if options.tensors
        else [],
    )


def _by_layers(modules: list[str]) -> list[tuple[str, str]]:
    """Modules below a layer as ("2 layers", "self_attn.q_proj, ..."), those of as many layers together."""
    counts = Counter(re.sub(r"^(model\.)?layers\.\d+\.", "", module) for module in modules)
    rows: dict[int, list[str]] = {}
    for name, count in counts.items():
        rows.setdefault(count, []).append(name)
    return [(f"{count} layer{'s' if count > 1 else ''}", ", ".join(names)) for count, names in rows.items()]
