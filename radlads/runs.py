"""The run folder: its recipe, its metrics and its record, and who may write to it.

Layout: run.json, recipe.yaml (resolved), metrics.jsonl, data/, checkpoints/, stage-1 ... stage-3/, model/, plots/, report.html;
micro_batch.json and stacks/ where memory ran out or a process hung.
"""

import errno
import fcntl
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

import radlads
from radlads.errors import fail
from radlads.files import plain, write_file
from radlads.recipe import Recipe, load_recipe

RECIPE, RECORD, METRICS, LOCK = "recipe.yaml", "run.json", "metrics.jsonl", ".lock"
MICRO_BATCH = "micro_batch.json"
FINAL = ("teacher_ppl", "student_ppl", "ppl_ratio", "kl", "agreement")
PACKAGES = ("torch", "triton", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy")


class Run:
    """An open run folder; `resumed` tells whether it held a begun run. Close it, or use it in a `with` statement.

    Without a `lock` it belongs to another process of the same run: it may be read, and what is logged there counts.
    """

    def __init__(self, path: Path, recipe: Recipe, resumed: bool, lock: IO[str] | None = None) -> None:
        self.path, self.recipe, self.resumed = path, recipe, resumed
        self.data, self.checkpoints, self.plots = path / "data", path / "checkpoints", path / "plots"
        self.stacks = path / "stacks"
        self.model, self.report = path / "model", path / "report.html"
        self._lock = lock
        self._metrics: IO[str] | None = None
        # Called with every record that is logged.
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder."""
        self._close_metrics()
        if self._lock is not None:
            self._lock.close()

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            # What could not be flushed has been reported by `log` already.
            with suppress(OSError):
                self._metrics.close()
            self._metrics = None

    def stage_folder(self, number: int) -> Path:
        """Model folder that stage `number` leaves behind."""
        return self.path / f"stage-{number}"

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; numbers that are not finite become null. Raises R401 or R402."""
        if self._lock is None:
            return
        line = json.dumps(plain(record), allow_nan=False)
        try:
            if self._metrics is None:
                self._metrics = (self.path / METRICS).open("a", encoding="utf-8")
            self._metrics.write(line + "\n")
            self._metrics.flush()
        except OSError as error:
            code = "R402" if error.errno == errno.ENOSPC else "R401"
            raise fail(
                code, where=self.path / METRICS, why=str(error.strerror), fix="Make room and run it again: it resumes"
            ) from None
        for listen in self.listeners:
            listen(record)

    def record(self) -> dict[str, Any]:
        """What run.json holds; its "status" is "running", "stopped" or "done". Empty when there is none that can be read."""
        try:
            record = json.loads((self.path / RECORD).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def metrics(self) -> list[dict[str, Any]]:
        """All whole records of metrics.jsonl."""
        return read_metrics(self.path)

    def truncate_metrics(self, stage: int, step: int) -> None:
        """Forget what was logged after step `step` of stage `stage`, from where the run is taken up again.

        A record with a stage but no step stands at the end of its stage; records of the teacher stay.
        """
        if self._lock is None:
            return
        self._close_metrics()
        kept = [record for record in self.metrics() if when(record) <= (stage, step)]
        write_file(self.path / METRICS, "".join(json.dumps(record) + "\n" for record in kept))

    def finish(self, final: dict[str, float], stages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Write run.json: `final` holds the keys of FINAL, `stages` one table per stage, `more` goes beside; returns it."""
        missing = [key for key in FINAL if key not in final]
        if missing:
            raise ValueError(f"final has no {missing[0]!r}")
        return self.conclude(stages=stages, final=final, model="model", **more)

    def conclude(self, **told: Any) -> dict[str, Any]:
        """Say in run.json that the run is done, and what came of it; returns the record."""
        return self._record("done", **told)

    def micro_batch(self, stage: int) -> int | None:
        """The micro-batch that fitted the memory of an earlier start; None where the recipe's did."""
        try:
            found = json.loads((self.path / MICRO_BATCH).read_bytes()).get(str(stage))
        except (OSError, ValueError, AttributeError, RecursionError):
            return None
        return found if isinstance(found, int) and found > 0 else None

    def set_micro_batch(self, stage: int, size: int) -> None:
        """Remember a micro-batch for later starts; any process of the run may."""
        try:
            known = json.loads((self.path / MICRO_BATCH).read_bytes())
        except (OSError, ValueError):
            known = {}
        write_file(self.path / MICRO_BATCH, json.dumps({**known, str(stage): size}) + "\n")

    def stop(self) -> None:
        """Say in run.json that the run was stopped and can go on."""
        self._record("stopped")

    def _record(self, status: str, **more: Any) -> dict[str, Any]:
        about = {"schema": 1, "name": self.recipe.name, "status": status, "recipe_sha256": self.recipe.fingerprint()}
        record: dict[str, Any] = plain({**about, **more, "environment": environment()})
        if self._lock is None:
            return record
        write_file(self.path / RECORD, json.dumps(record, indent=2, allow_nan=False) + "\n")
        return record


def begin_run(
    path: str | Path,
    recipe: Recipe,
    resume: Literal["auto", "never"] = "auto",
    *,
    load: Callable[[Path], Recipe] = load_recipe,
    flag: str = "--output-dir",
    fruit: str | None = None,
) -> Run:
    """Open the run folder `path` for `recipe`, new or, with `resume` "auto", begun earlier with the same recipe.

    `load` reads the recipe back that lies there, and `flag` is what chooses the folder on the command line. A run that has
    left no file called `fruit` yet may begin anew with another recipe.
    Raises R303 when the folder holds another recipe's run, a run that may not be resumed, other files, or is in use.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
        begun = (folder / RECIPE).is_file()
        if strangers and not begun:
            why = f"it holds {strangers[0]!r} and is no run folder"
            raise fail("R303", where=folder, why=why, fix=f"Give a new or empty folder with `{flag}`")
        lock = (folder / LOCK).open("w")
    except OSError as error:
        why = "it is no folder" if folder.exists() and not folder.is_dir() else str(error.strerror)
        raise fail("R401", where=folder, why=why, fix=f"Give a folder that can be written with `{flag}`") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise fail(
            "R303", where=folder, why="another process is training there", fix="Wait for it or give another folder"
        ) from None
    try:
        if begun and fruit is not None and not (folder / fruit).exists():
            begun = False
            (folder / METRICS).unlink(missing_ok=True)
        run = Run(folder, recipe, begun, lock)
        if begun:
            check_same_run(load(folder / RECIPE), recipe, resume, folder, flag)
            drop_torn_line(folder / METRICS)
        else:
            write_file(folder / RECIPE, recipe.to_yaml())
        if run.record().get("status") != "done":
            run._record("running")
    except BaseException:
        lock.close()
        raise
    return run


def check_same_run(begun: Recipe, recipe: Recipe, resume: str, folder: Path, flag: str) -> None:
    """Raise R303 unless the run `begun` in `folder` is one of `recipe` and may be resumed."""
    if resume == "never":
        fix = "Allow it with `--resume auto`, or give another folder"
        raise fail("R303", where=folder, why="it holds a run already, and resuming is off", fix=fix)
    differing = differences(begun.identity(), recipe.identity())
    if differing:
        shown = "; ".join(f"{key} was {old!r}, now {new!r}" for key, old, new in differing[:3])
        more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
        raise fail("R303", where=folder, why=f"its recipe differs: {shown}{more}", fix=f"Give another folder with `{flag}`")


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every value in which two trees of plain values differ."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(name for name in new if name not in old)]
        return [d for name in keys for d in differences(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))]
    return [] if old == new else [(key, old, new)]


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Records of a run's metrics.jsonl; a last line cut short by a kill is left out. Raises R304 for other damage."""
    path = Path(folder) / METRICS
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise fail("R201", where=path, why=str(error.strerror), fix="Check the file") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise fail("R304", where=f"{path}:{number}", why="the line is no JSON record", fix="Remove the line")
        records.append(record)
    return records


def drop_torn_line(path: Path) -> None:
    """Cut off a last line without its end, so that the next record starts on a line of its own."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def when(record: dict[str, Any]) -> tuple[float, float]:
    """(stage, step) of a record for comparing; what belongs to no numbered stage comes first."""
    stage, step = record.get("stage"), record.get("step")
    return (stage if isinstance(stage, int) else -1, step if isinstance(step, int) else math.inf)


def environment() -> dict[str, Any]:
    """What the run was made with: versions, platform and processors."""
    found = {"radlads": radlads.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        **found,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "byteorder": sys.byteorder,
    }
