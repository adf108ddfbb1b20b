"""Step checkpoints of a stage: tensors and a manifest with hashes, complete or absent, the last two kept.

One process writes a safetensors file, several write their shards with torch.distributed.checkpoint; either is read by any
number of processes. Writing goes on beside training. The index of the latter is a pickle: resume only runs you trust.
"""

import json
import math
import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from radlads.backends.torch.moments import Packed, read
from radlads.backends.torch.parallel import rows_of
from radlads.backends.torch.world import World
from radlads.errors import RadladsError, fail
from radlads.files import check_space, new_folder, sha256, write_file
from radlads.tensors import read_header, read_raw, write_weights

TENSORS, MANIFEST = "state.safetensors", "manifest.json"
KEPT = 2

Shapes = Mapping[str, tuple[int, ...]]


class Checkpoints:
    """The checkpoints of a run, as `world` writes and reads them."""

    def __init__(self, folder: Path, world: World | None = None) -> None:
        self.folder, self.world = folder, world or World()
        self.writing: list[Future[Any]] = []
        self.threads = ThreadPoolExecutor(1, "checkpoint")

    def save(self, tensors: Mapping[str, Tensor | Packed], shapes: Shapes, record: dict[str, Any]) -> None:
        """Begin to write `tensors` (float32; this process's rows of those whose whole `shapes` are given) and the JSON `record`.

        Returns when the tensors may change again: they are copied to the CPU's memory one by one. Waits for the save before,
        and raises its error.
        """
        self.finish()
        final = self.folder / f"stage-{record['stage']}-step-{record['step']:08d}"
        record = {"schema": 1, **record, "tensors": {name: list(shapes[name]) for name in tensors}}
        self.world.once(lambda: check_space(self.folder, 4 * sum(map(math.prod, shapes.values()))))
        kept = {name: read(tensor).detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        if self.world.size == 1:
            self.writing = [self.threads.submit(self.write_one, final, kept, record)]
        else:
            self.write_shards(final, kept, shapes, record)

    def write_one(self, final: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """A whole checkpoint of one process."""
        with new_folder(final, overwrite=True) as path:
            plan = {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
            arrays = ((name, "F32", tensor.numpy()) for name, tensor in tensors.items())
            write_weights(path / TENSORS, arrays, plan, {"format": "pt"})
            write_manifest(path, record)
        drop_old(self.folder)

    def write_shards(self, final: Path, tensors: dict[str, Tensor], shapes: Shapes, record: dict[str, Any]) -> None:
        """This process's part of a checkpoint; rank 0 commits when all have written theirs."""
        opened: list[AbstractContextManager[Path]] = []

        def begin() -> str:
            opened.append(new_folder(final, overwrite=True))
            return str(opened[0].__enter__())

        path = Path(self.world.once(begin))
        state = {name: self.sharded(tensor, shapes[name]) for name, tensor in tensors.items()}
        self.writing = [self.threads.submit(self.write_shard, path, state, record, *opened)]

    def write_shard(
        self, path: Path, state: dict[str, Any], record: dict[str, Any], opened: AbstractContextManager[Path] | None = None
    ) -> None:
        """Write the shards of `state`. Rank 0, which has `opened` the folder, adds the manifest and gives it its name."""
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)  # a new thread begins with the first device
        try:
            # Returns when all processes have written.
            save(state, storage_writer=FileSystemWriter(path, sync_files=True), process_group=self.world.saving)
            if opened is not None:
                write_manifest(path, record)
        except BaseException as error:
            if opened is not None:
                opened.__exit__(type(error), error, error.__traceback__)
            raise
        if opened is not None:
            opened.__exit__(None, None, None)
            drop_old(self.folder)

    def sharded(self, local: Tensor, shape: tuple[int, ...]) -> Any:
        """The DTensor of which `local`, in the CPU's memory, holds this process's rows."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        placements = [Shard(0)] if self.world.copies == 1 else [Replicate(), Shard(0)]
        return DTensor.from_local(
            local, self.world.host_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def finish(self) -> None:
        """Wait for what is being written; all processes raise the first error of it."""
        pending, self.writing = self.writing, []
        error = next((found for found in (future.exception() for future in pending) if found is not None), None)
        if self.world.any(error is not None):
            raise error or fail("R406", where="checkpoint", why="another process could not write it", fix="See its message")

    def last(self, stage: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, record) of the newest checkpoint of `stage` whose hashes are right, this process's rows; or None.

        The tensors are in the CPU's memory.
        """
        found = self.world.once(lambda: newest(self.folder, stage))
        if found is None:
            return None
        path, record = Path(found[0]), found[1]
        if (path / TENSORS).exists():
            entries = read_header(path / TENSORS)
            rows = {name: rows_of(entry.shape[0], self.world) for name, entry in entries.items()}
            return {name: torch.from_numpy(np.array(read_raw(entry)[rows[name]])) for name, entry in entries.items()}, record
        return self.read_shards(path, {name: tuple(shape) for name, shape in record["tensors"].items()}), record

    def read_shards(self, path: Path, shapes: Shapes) -> dict[str, Tensor]:
        """This process's rows of a checkpoint that several processes wrote."""
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        local = {}
        for name, shape in shapes.items():
            rows = rows_of(shape[0], self.world)
            local[name] = torch.empty(rows.stop - rows.start, *shape[1:])
        alone = self.world.size == 1
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process reads what several wrote
        state = local if alone else {name: self.sharded(tensor, shapes[name]) for name, tensor in local.items()}
        load(state, storage_reader=FileSystemReader(path), process_group=self.world.saving, no_dist=alone)
        return local


def write_manifest(path: Path, record: dict[str, Any]) -> None:
    """The commit mark of a checkpoint: its record, and size and hash of every file."""
    names = sorted(item.name for item in path.iterdir())
    write_file(path / MANIFEST, json.dumps({**record, "files": dict(zip(names, map(list, hashes(path, names)), strict=True))}))


def hashes(path: Path, names: list[str]) -> list[tuple[int, str]]:
    """(size, SHA-256) of files, several at a time."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda name: ((path / name).stat().st_size, sha256(path / name)), names))


def drop_old(folder: Path) -> None:
    """Remove all but the last `KEPT` checkpoints; the newest is complete by now."""
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("stage-*-step-*") if (path / MANIFEST).is_file())


def newest(folder: Path, stage: int) -> tuple[str, dict[str, Any]] | None:
    """(path, record) of the newest checkpoint of `stage` whose files are as its manifest says; damaged ones are passed over."""
    for path in reversed(checkpoints(folder)):
        try:
            record = json.loads((path / MANIFEST).read_text())
            if record["stage"] != stage:
                continue
            files = record["files"]
            if [list(found) for found in hashes(path, list(files))] == list(files.values()):
                return str(path), record
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, RadladsError):
            continue
    return None
