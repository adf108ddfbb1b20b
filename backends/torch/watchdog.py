"""Noticing a run that hangs: without a step for too long, every process saves the stacks of its threads and ends."""

import faulthandler
from pathlib import Path
from typing import IO

HEADER = "Stacks of rank {rank}, written because no step ended for {seconds:.0f} s:\n"


class Watchdog:
    """Call `beat` after each step. The timer is the C library's, so it fires even when Python or a collective is stuck."""

    def __init__(self, folder: Path, rank: int, seconds: float) -> None:
        self.seconds, self.path = seconds, folder / f"rank-{rank}.txt"
        self.file: IO[str] | None = None
        if seconds:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("w")
            self.file.write(HEADER.format(rank=rank, seconds=seconds))
            self.file.flush()
            self.beat()

    def beat(self) -> None:
        """A step has ended: wait `seconds` from now."""
        if self.file is not None:
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.file)

    def stop(self) -> None:
        """Nothing more to watch."""
        if self.file is not None:
            faulthandler.cancel_dump_traceback_later()
            self.file.close()
            self.file = None
            self.path.unlink(missing_ok=True)


def hung_stacks(folder: Path) -> list[Path]:
    """Files of stacks that an earlier start of the run left when it hung."""
    return sorted(path for path in folder.glob("rank-*.txt") if path.stat().st_size > len(HEADER) + 20)
