"""Records of a run in TensorBoard, Weights & Biases or Trackio, beside metrics.jsonl. None is needed, and none can stop a run."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from radlads.errors import fail

TRACKERS = ("tensorboard", "wandb", "trackio")
Log = Callable[[str, float, int], None]


def follow(names: list[str], folder: Path, name: str, settings: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A listener for the records of a run that hands every number on. Raises as `library_of`."""
    logs = {tracker: opened(tracker, folder, name, settings) for tracker in dict.fromkeys(names)}

    def listen(record: dict[str, Any]) -> None:
        stage, step = record.get("stage"), record.get("step", 0)
        place = record.get("kind") if stage is None else f"{record.get('kind')}/stage-{stage}"
        for tracker, log in list(logs.items()):
            try:
                for key, value in record.items():
                    if isinstance(value, int | float) and not isinstance(value, bool) and key not in ("stage", "step"):
                        log(f"{place}/{key}", float(value), int(step))
            except Exception as error:
                # A service that is down must not cost a run.
                print(f"warning: {tracker} is left out from here on: {error}", file=sys.stderr, flush=True)
                del logs[tracker]

    return listen


def library_of(tracker: str) -> Any:
    """The library of a tracker. R101 for an unknown one, R104 for a missing one: ask before a run is begun."""
    if tracker not in TRACKERS:
        raise fail("R101", where="--report-to", why=f"unknown tracker {tracker[:40]!r}", fix=f"Use one of: {', '.join(TRACKERS)}")
    try:
        return import_module({"tensorboard": "torch.utils.tensorboard"}.get(tracker, tracker))
    except ImportError:
        fix = f"Run `pip install 'radlads[{tracker}]'`"
        raise fail("R104", where=f"--report-to {tracker}", why=f"{tracker} is not installed", fix=fix) from None


def opened(tracker: str, folder: Path, name: str, settings: dict[str, Any]) -> Log:
    """A function (name, value, step) of one tracker. Raises as `library_of`."""
    library = library_of(tracker)
    if tracker == "tensorboard":
        writer = library.SummaryWriter(str(folder / "tensorboard"))
        return lambda key, value, step: writer.add_scalar(key, value, step)
    if tracker == "wandb":
        # Without a key it keeps its files here; `wandb sync` sends them later.
        online = os.environ.get("WANDB_API_KEY") or Path("~/.netrc").expanduser().exists()
        mode = os.environ.get("WANDB_MODE", "online" if online else "offline")
        run = library.init(project="radlads", name=name, dir=str(folder), config=settings, mode=mode, resume="allow", id=name)
        return lambda key, value, step: run.log({key: value, "step": step})
    library.init(project="radlads", name=name, config=settings, resume="allow")
    return lambda key, value, step: library.log({key: value, "step": step})
