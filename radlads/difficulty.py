"""The record of how hard each layer was to convert, and which layers it suggests to keep as softmax."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from radlads.errors import fail
from radlads.files import read_json, write_file

CSV, JSON = "difficulty.csv", "difficulty.json"
COLUMNS = ("layer", "error", "relative", "kl")


def write_difficulty(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write the rows (COLUMNS) as CSV and as JSON, with the layers in the order in which they are suggested."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(folder / CSV, text.getvalue())
    write_file(
        folder / JSON, json.dumps({"schema": 1, "layers": list(rows), "hardest_first": hardest_first(rows)}, indent=1) + "\n"
    )


def read_difficulty(folder: Path) -> list[dict[str, Any]]:
    """The rows that a run wrote. Raises R201 when it wrote none."""
    if not (folder / JSON).is_file():
        raise fail("R201", where=folder, why="its layers were not measured", fix="Run step 1 with `--measure-difficulty`")
    return list(read_json(folder / JSON)["layers"])


def hardest_first(rows: Sequence[Mapping[str, float]]) -> list[int]:
    """Layers by the KL that each costs alone. Layer 0 stays out: RAD-RWKV7 and hxa079 mix its values into later layers."""
    return [int(row["layer"]) for row in sorted(rows, key=lambda row: -row["kl"]) if row["layer"] != 0]


def suggested(rows: Sequence[Mapping[str, float]], count: int) -> list[int]:
    """The `count` layers to keep as softmax, ascending."""
    return sorted(hardest_first(rows)[:count])
