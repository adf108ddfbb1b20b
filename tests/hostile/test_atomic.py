"""Writers killed at their calls and at random, and out of space: output complete or absent, source untouched. The long run is
`python -m tests.hostile.atomic`."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

NAIVE = """
from tests.hostile import atomic

class Naive(atomic.OneFile):
    def run(self):
        import os
        fd = os.open(self.final, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(fd, b"n" * 100_000)
        os.fsync(fd)
        os.write(fd, b"n" * 200_000)

atomic.WORKS = {"file": Naive}
import json
print(json.dumps(atomic.run(4, 4, 0)))
"""


def run(*arguments: str) -> dict[str, object]:
    """The last line of a program's output as JSON."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_and_starved_writers_leave_nothing_half_written() -> None:
    result = run("-m", "tests.hostile.atomic", "--kills", "16", "--sizes", "16", "--step", "7")
    assert result["faults"] == []
    assert result["at a call"] >= 15 and result["at random"] == 16 and result["disk full"] == 16, result  # type: ignore[operator]


def test_a_writer_in_place_would_be_noticed() -> None:
    faults = str(run("-c", NAIVE)["faults"])
    assert "the output is 100000 bytes" in faults and "the output is 0 bytes" in faults
