"""Writers killed and starved: `python -m tests.hostile.atomic --kills 100 --sizes 50`, or some of them: `... conversion archive`.

Each attempt runs in a forked child that is killed with SIGKILL, at a random moment or right before or after one of its calls to
the file system, or whose files may not grow beyond a size. Afterwards the output must be absent or whole, the old one whole if
there was one, the source as it was, and the next run must clear what was left. Prints one JSON line; exit status 1 for a fault.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from radlads.errors import RadladsError
from radlads.files import sha256, write_file
from radlads.folder import MANIFEST, open_folder
from radlads.verify import check_files
from radlads.weights_tools import output
from radlads.weights_tools.convert import convert
from radlads.weights_tools.formats.format import Writing
from radlads.weights_tools.surgery import make_student
from tests.hostile.set_cases import sound

CALLS = ("open", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir")  # of the module os
PLACE = "/dev/shm" if Path("/dev/shm").is_dir() else None  # many small files are synced, and a full disk is feigned anyway


class Work:
    """Something to write: from a source, to a place; `whole` tells whether the place holds one of the two right contents."""

    limit = 17_000  # some file of the output is larger
    again = False  # whether a run may follow on one that came to its end, without --overwrite

    def __init__(self, base: Path, old: bool) -> None:
        self.base, self.old = base, old
        self.out = base / "out"
        self.out.mkdir()

    def run(self) -> None:
        """Write it."""
        raise NotImplementedError

    def state(self) -> str:
        """ "absent", "old" or "new"; anything else is a fault."""
        raise NotImplementedError


class OneFile(Work):
    """`write_file` of 300 kB."""

    limit = 290_000

    def __init__(self, base: Path, old: bool) -> None:
        super().__init__(base, old)
        self.final = self.out / "file.bin"
        if old:
            write_file(self.final, b"o" * 200_000)

    def run(self) -> None:
        write_file(self.final, b"n" * 300_000)

    def state(self) -> str:
        if not self.final.exists():
            return "absent"
        data = self.final.read_bytes()
        return {b"o" * 200_000: "old", b"n" * 300_000: "new"}.get(data, f"{len(data)} bytes")


class Student(Work):
    """A student folder made of a sharded teacher, over another one if `old`."""

    def __init__(self, base: Path, old: bool) -> None:
        super().__init__(base, old)
        self.final, self.teacher = self.out / "student", open_folder(sound(base / "teacher"))
        if old:
            self.make("rwkv6")

    def make(self, arch: str) -> None:
        make_student(self.teacher, self.final, arch=arch, options={}, overwrite=self.old)

    def run(self) -> None:
        self.make("rwkv7")

    def state(self) -> str:
        if not self.final.exists():
            # Killed between the two renames of an overwrite: the old folder stands aside and comes back with the next run.
            aside = list(self.out.glob(".student.old.*"))
            return "old" if aside and (aside[0] / MANIFEST).exists() else "absent"
        folder = open_folder(self.final)
        found = check_files(self.final, folder.manifest or {})
        arch = folder.spec.recurrent
        return {"rwkv6": "old", "rwkv7": "new"}.get(str(arch), str(arch)) if found.status == "passed" else found.detail


class Conversion(Work):
    """A streamed conversion with its journal, synced at every tensor; its bytes are those of a conversion that nobody stopped."""

    target, name, again = "hf", "converted", True

    def __init__(self, base: Path, old: bool) -> None:
        super().__init__(base, old)
        self.teacher, self.final = sound(base / "teacher"), self.out / self.name
        self.known = {"new": self.made(base / "new" / self.name, "F32"), "old": self.made(base / "old" / self.name, "BF16")}
        if old:
            self.convert(self.final, "BF16")

    def made(self, place: Path, dtype: str) -> dict[str, str]:
        """What the conversion gives, made at another place."""
        place.parent.mkdir()
        self.convert(place, dtype)
        return hashes(place)

    def convert(self, place: Path, dtype: str) -> None:
        output.SYNC_BYTES = 1
        convert(self.teacher, place, self.target, writing=Writing(dtype=dtype), overwrite=self.old, say=lambda text: None)

    def run(self) -> None:
        self.convert(self.final, "F32")

    def state(self) -> str:
        aside = list(self.out.glob(f".{self.name}.old.*"))  # killed between the two renames of an overwrite
        found = hashes(self.final if self.final.exists() or not aside else aside[0])
        return next((name for name, known in self.known.items() if known == found), "absent" if not found else str(found))


class Archive(Conversion):
    """The same into a single file."""

    target, name = "pth", "converted.pth"


WORKS: dict[str, type[Work]] = {
    "file": OneFile,
    "folder": Student,
    "conversion": Conversion,
    "archive": Archive,
}


def attempt(work: Work, prepare: Callable[[], None], delay: float | None = None) -> int:
    """Run the work in a forked child after `prepare`; kill it after `delay` seconds. Its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.stderr = open(os.devnull, "w")
            prepare()
            work.run()
            status = 0
        except RadladsError as error:
            status = 3 if error.code in ("R401", "R402") else 2
        finally:
            os._exit(status)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def kill_at(count: int, after: bool) -> Callable[[], None]:
    """Make this process end at its `count`-th call of the file system, before or after the call is done."""

    def prepare() -> None:
        seen = 0

        def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*arguments: Any, **more: Any) -> Any:
                nonlocal seen
                seen += 1
                if seen == count and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = call(*arguments, **more)
                if seen == count and after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return counted

        for name in CALLS:
            setattr(os, name, wrap(getattr(os, name)))

    return prepare


def limit_size(size: int) -> Callable[[], None]:
    """No file of this process may grow beyond `size` bytes: the kernel then refuses the write, as on a full disk."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


def faults_after(work: Work, before: dict[str, str], allowed: set[str]) -> list[str]:
    """What is wrong now, and after the work is done once more."""
    found = []
    if (state := work.state()) not in allowed:
        found.append(f"the output is {state}")
    if hashes(work.base / "teacher") != before:
        found.append("the source has changed")
    if state != "new" or work.old or work.again:
        work.run()
    if work.state() != "new":
        found.append(f"the next run leaves {work.state()}")
    if len(list(work.out.iterdir())) != 1:
        found.append(f"the next run leaves {sorted(path.name for path in work.out.iterdir())}")
    return found


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of each one in a folder; nothing where there is none."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return {file.name: sha256(file) for file in files}


def trial(kind: str, old: bool, prepare: Callable[[], None], delay: float | None, expected: set[int] | None) -> list[str]:
    """One attempt in a fresh folder; [] if all is well, ["done"] if the child came to its end."""
    base = Path(tempfile.mkdtemp(dir=PLACE))
    try:
        work = WORKS[kind](base, old)
        before = hashes(base / "teacher")
        status = attempt(work, prepare, delay)
        if status == 0:
            return ["done"] if work.state() == "new" else [f"done, but the output is {work.state()}"]
        found = faults_after(work, before, {"old", "new"} if old else {"absent", "new"})
        if expected is not None and os.waitstatus_to_exitcode(status) not in expected:
            found.append(f"the child ended with {os.waitstatus_to_exitcode(status)}")
        return found
    finally:
        shutil.rmtree(base, ignore_errors=True)


def run(kills: int, sizes: int, seed: int, step: int = 1, kinds: Sequence[str] = ()) -> dict[str, Any]:
    """All trials of the named kinds of work, of all by default; numbers of each kind of trial, and the faults.

    Kills at random and sizes are shared out among the kinds, each with and without an old output.
    """
    rng = random.Random(seed)
    counts = {"at a call": 0, "at random": 0, "disk full": 0}
    faults: list[str] = []

    def record(name: str, label: str, found: list[str]) -> None:
        if found != ["done"]:
            counts[name] += 1
            faults.extend(f"{label}: {fault}" for fault in found)

    share = 2 * len(kinds or WORKS)
    for kind in kinds or WORKS:
        for old in (False, True):
            for after in (False, True):
                number = 1
                while (found := trial(kind, old, kill_at(number, after), None, {-signal.SIGKILL})) != ["done"]:
                    record("at a call", f"{kind}, old {old}, killed {'after' if after else 'before'} call {number}", found)
                    number += step
            start = time.perf_counter()
            trial(kind, old, lambda: None, None, None)
            span = time.perf_counter() - start
            left, tries = -(-kills // share), 0
            while left and tries < 20 * kills:  # some come to their end before they are killed
                tries, delay = tries + 1, rng.random() * span
                found = trial(kind, old, lambda: None, delay, None)
                left -= found != ["done"]
                record("at random", f"{kind}, old {old}, killed after {delay:.4f} s", found)
            limit = WORKS[kind].limit
            for size in np.unique(np.geomspace(1, limit, -(-sizes // share)).astype(int)):
                record("disk full", f"{kind}, old {old}, {size} bytes", trial(kind, old, limit_size(int(size)), None, {3}))
    return {**counts, "faults": faults[:20]}


def main() -> int:
    """Run the trials and print what came of them."""
    parser = argparse.ArgumentParser(description="Writers killed and starved.")
    parser.add_argument("kinds", nargs="*", choices=[[], *WORKS], help="what is written; all by default")
    parser.add_argument("--kills", type=int, default=100, help="kills at random moments (default 100)")
    parser.add_argument("--sizes", type=int, default=50, help="sizes at which the disk is full (default 50)")
    parser.add_argument("--step", type=int, default=1, help="kill at every n-th call only (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = run(options.kills, options.sizes, options.seed, options.step, options.kinds)
    print(json.dumps(result))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
