"""`radlads inspect STATE`: what a state file holds, and whether it goes with a model (`--config`)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radlads.cli.inspect_ import InspectOptions, TensorRow, listings
from radlads.cli.render import Table, counted


@dataclass
class StateResult:
    """What a state file holds; `model` is the fingerprint of its model, `fits` None where no model was named to compare with."""

    path: str
    kind: str
    position: int
    follows: str
    backend: str
    bytes: int
    model: str
    fits: bool | None
    turns: list[str] = field(default_factory=list)
    tensors: list[TensorRow] = field(default_factory=list)

    def blocks(self) -> list[Table | str]:
        """The overview, what was said, and the tensors if asked for."""
        fit = {True: ", the one named", False: ", not the one named", None: ""}[self.fits]
        rows = [
            ("state", self.path),
            ("kind", "conversation" if self.kind == "session" else "state"),
            (
                "after",
                f"{counted(self.position, 'token')}, the end of {'a' if self.follows != 'answer' else 'an'} {self.follows}",
            ),
            ("made on", self.backend),
            ("model", f"{self.model[:12]}{fit}"),
        ]
        blocks: list[Table | str] = [Table(("", ""), rows)]
        if self.turns:
            blocks.append(Table(("said",), [(text,) for text in self.turns]))
        return [*blocks, *listings({self.path: self.bytes}, self.tensors)]


def inspect_state(options: InspectOptions) -> StateResult:
    """Read and check a state file, and hold its model against `--config`. R201, R304, and R101 for `--diff`."""
    from radlads.errors import fail, printable
    from radlads.folder import open_folder
    from radlads.states import load_state, model_fingerprint, read_about
    from radlads.tensors import read_header

    path = Path(options.model)
    if options.diff is not None:
        raise fail("R101", where="--diff", why=f"{path} is a state file", fix="Compare models")
    entries = read_header(path)
    about = read_about(path, entries)
    made_with = str(about.get("model"))
    saved = load_state(path, made_with)  # the whole of it is checked
    fits = None if options.config is None else model_fingerprint(open_folder(options.config)) == made_with
    turns: Any = (saved.session or {}).get("turns", [])
    return StateResult(
        path=str(path),
        kind="state" if saved.session is None else "session",
        position=saved.position,
        follows=saved.follows,
        backend=printable(str(about.get("backend")), 20),
        bytes=path.stat().st_size,
        model=printable(made_with, 64),
        fits=fits,
        turns=[printable(str(turn.get("said")), 80) for turn in turns if isinstance(turn, dict)],
        tensors=[TensorRow(name, entry.dtype, list(entry.shape), path.name) for name, entry in entries.items()]
        if options.tensors
        else [],
    )
