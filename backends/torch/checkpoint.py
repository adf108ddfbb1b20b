"""Step checkpoints of a stage: safetensors and a manifest with hashes, complete or absent, the last two kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radlads.errors import RadladsError
from radlads.files import new_folder, sha256, write_file
from radlads.tensors import read_header, read_raw, write_weights

TENSORS, MANIFEST = "state.safetensors", "manifest.json"
KEPT = 2


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write `tensors` (float32) and the JSON `record` ("stage", "step", ...) to a new folder, then drop older ones."""
    with new_folder(folder / f"stage-{record['stage']}-step-{record['step']:08d}", overwrite=True) as path:
        plan = {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
        arrays = ((name, "F32", tensor.detach().cpu().contiguous().numpy()) for name, tensor in tensors.items())
        write_weights(path / TENSORS, arrays, plan, {"format": "pt"})
        write_file(path / MANIFEST, json.dumps({"schema": 1, **record, "sha256": sha256(path / TENSORS)}))
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("stage-*-step-*") if (path / MANIFEST).is_file())


def last_checkpoint(folder: Path, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and record of the newest checkpoint of `stage` whose hash is right; damaged ones are passed over."""
    for path in reversed(checkpoints(folder)):
        try:
            record = json.loads((path / MANIFEST).read_text())
            if record["stage"] != stage or record["sha256"] != sha256(path / TENSORS):
                continue
            entries = read_header(path / TENSORS)
            return {name: torch.from_numpy(np.array(read_raw(entry))) for name, entry in entries.items()}, record
        except (OSError, ValueError, KeyError, RadladsError):
            continue
    return None
