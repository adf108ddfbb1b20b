"""Coverage-guided fuzzing of the header checkers: `python -m tests.hostile.fuzz gguf --seconds 600`.

Keeps the inputs that reach something new in found/NAME.zip and adds up what was done in found/record.json. A finding is saved
as found/NAME-finding-*.bin, and the exit status is 1. Sessions side by side need a --found of their own without a record;
`--merge DIR...` adds theirs to ours.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from tests.hostile.checkers import CHECKERS, Checker
from tests.hostile.mutate import mutated

FOUND = Path(__file__).with_name("found")
RECORD = "record.json"
SLOW = 1.0  # seconds of processor time for a file of a few kilobytes


def edges_of(check: Callable[[bytes], bool], data: bytes, modules: tuple[str, ...]) -> set[int]:
    """The steps from line to line that checking `data` takes in the modules; raises what `check` raises."""
    seen: set[int] = set()
    last = 0

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal last
        line = frame.f_lineno
        seen.add(last << 16 | line)
        last = line
        return local

    def entered(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename in modules else None

    sys.settrace(entered)
    try:
        check(data)
    finally:
        sys.settrace(None)
    return seen


def load(name: str, found: Path = FOUND) -> list[bytes]:
    """The inputs kept from earlier sessions."""
    path = found / f"{name}.zip"
    if not path.exists():
        return []
    with ZipFile(path) as archive:
        return [archive.read(entry) for entry in archive.namelist()]


def keep(name: str, inputs: list[bytes], found: Path) -> None:
    """Write the inputs as a zip that is the same for the same inputs."""
    with ZipFile(found / f"{name}.zip", "w", ZIP_DEFLATED) as archive:
        for data in sorted(inputs, key=lambda data: (len(data), data)):
            entry = ZipInfo(hashlib.sha256(data).hexdigest()[:16])
            entry.compress_type = ZIP_DEFLATED
            archive.writestr(entry, data)


def minimal(checker: Checker, inputs: list[bytes]) -> tuple[list[bytes], set[int]]:
    """The shortest inputs that together take every step, and the steps."""
    seen: set[int] = set()
    kept = []
    for data in sorted(set(inputs), key=len):
        edges = edges_of(checker.check, data, checker.modules)
        if not edges <= seen:
            seen |= edges
            kept.append(data)
    return kept, seen


def trimmed(checker: Checker, data: bytes, wanted: set[int]) -> bytes:
    """A shorter input that still takes the wanted steps: what is left is more likely to be changed where it matters."""
    size = len(data) // 2
    while size:
        start = 0
        while start < len(data):
            shorter = data[:start] + data[start + size :]
            try:
                enough = wanted <= edges_of(checker.check, shorter, checker.modules)
            except Exception:  # a finding, which the search will come upon by itself
                return data
            data, start = (shorter, start) if enough else (data, start + size)
        size //= 4
    return data


def fuzz(name: str, seconds: float, seed: int, found: Path) -> bool:
    """One session of `seconds` of processor time; True if there was no finding."""
    checker, rng = CHECKERS[name], random.Random(seed)
    corpus, seen = minimal(checker, [*checker.seeds, *load(name, found)])
    start = time.process_time()
    executions = 0
    sound = True
    with suppress(KeyboardInterrupt):  # stopped early, it keeps what it has
        while time.process_time() - start < seconds:
            # Newer inputs are nearer to what has not been seen yet.
            base = corpus[max(rng.randrange(len(corpus)), rng.randrange(len(corpus)))]
            data = checker.repair(rng, mutated(rng, base, corpus, checker.words))
            began = time.process_time()
            try:
                edges = edges_of(checker.check, data, checker.modules)
                if (took := time.process_time() - began) > SLOW:
                    raise TimeoutError(f"{took:.1f} s for {len(data)} bytes")
            except Exception as error:
                sound = False
                path = found / f"{name}-finding-{hashlib.sha256(data).hexdigest()[:16]}.bin"
                path.write_bytes(data)
                print(f"{path}: {type(error).__name__}: {error}", flush=True)
                continue
            executions += 1
            if not edges <= seen:
                corpus.append(trimmed(checker, data, edges - seen))
                seen |= edges
    note(name, executions, round(time.process_time() - start), corpus, found)
    print(f"{name}: {executions:,} new executions{'' if sound else ', FINDINGS'}", flush=True)
    return sound


def note(name: str, executions: int, seconds: int, inputs: list[bytes], found: Path) -> None:
    """Keep what of the inputs is needed, and add the work to the record."""
    kept, seen = minimal(CHECKERS[name], inputs)
    keep(name, kept, found)
    record = recorded(found)
    total = record.setdefault(name, {"executions": 0, "cpu_seconds": 0})
    total["executions"] += executions
    total["cpu_seconds"] += seconds
    total |= {"inputs": len(kept), "steps": len(seen)}
    (found / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    print(f"{name}: {json.dumps(total)}", flush=True)


def recorded(found: Path) -> dict[str, dict[str, int]]:
    """What was done in the sessions of a folder."""
    return json.loads((found / RECORD).read_text()) if (found / RECORD).exists() else {}


def merge(folders: list[Path], found: Path) -> bool:
    """Add the sessions of other folders to those of `found`; True if none had a finding."""
    for name, checker in CHECKERS.items():
        done = [total for folder in folders if (total := recorded(folder).get(name))]
        if done:
            executions, seconds = (sum(total[key] for total in done) for key in ("executions", "cpu_seconds"))
            inputs = [data for folder in (found, *folders) for data in load(name, folder)]
            note(name, executions, seconds, [*checker.seeds, *inputs], found)
    findings = [path for folder in folders for path in folder.glob("*-finding-*.bin")]
    for path in findings:
        shutil.copy(path, found)
    return not findings


def main() -> int:
    """Fuzz the named checkers in turn."""
    parser = argparse.ArgumentParser(description="Coverage-guided fuzzing of the header checkers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(CHECKERS)}; all by default")
    parser.add_argument("--seconds", type=float, default=60, help="processor time for each (default 60)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the random changes; drawn by default")
    parser.add_argument("--found", type=Path, default=FOUND, metavar="DIR", help="where inputs and findings are kept")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="DIR", help="fuzz nothing: add the sessions in these folders")
    options = parser.parse_args()
    options.found.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        if name not in CHECKERS:
            parser.error(f"{name} is none of {', '.join(CHECKERS)}")
    if options.merge:
        return 0 if merge(options.merge, options.found) else 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a session in the background can be stopped by nothing gentler
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    return 0 if all([fuzz(name, options.seconds, seed, options.found) for name in options.names or CHECKERS]) else 1


if __name__ == "__main__":
    sys.exit(main())
