"""`radlads train` in 2 processes, killed again and again: `python -m tests.walks.cluster_kills --kills 20`.

Each kill is SIGKILL to one process or to both, at a random moment: after a random step, or while a checkpoint is being written.
What is left over must notice and end with R406. The same command goes on until it is killed again; after four kills a run may
come to its end. Then its losses must be those of a run that nobody killed, to the bit, and so must its model. Prints a line for
each kill and one of JSON; exit status 1 for a fault.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

from radlads.backends.torch import world
from radlads.files import sha256
from tests.models import tiny_teacher
from tests.processes import wait
from tests.walks.cluster_checks import RECIPE, STEPS, begin, losses, steps_of, until

KILLS_OF_A_RUN = 4
# Seconds that the other process may take to notice on a busy machine (half of them for one that never comes), and that a
# whole run may take.
PATIENCE, RUN = 60.0, 900.0


def being_saved(name: str) -> list[str]:
    """Checkpoints of a run that have not got their name yet."""
    return [path.name for path in Path(name, "checkpoints").glob(".*.partial")]


def ended(pids: list[int]) -> bool:
    """Whether one of the processes has come to its end (it stays to be waited for)."""
    return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None for pid in pids)


def model_hashes(name: str) -> dict[str, str]:
    """SHA-256 of the files of a run's final model that hold its weights."""
    return {path.name: sha256(path) for path in sorted(Path(name, "model").glob("*.safetensors"))}


class Killer:
    """Kills runs at moments that `rng` draws, and keeps count of what they hit and what went wrong."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.hit: Counter[str] = Counter()
        self.faults: list[str] = []
        self.noticed: list[float] = []

    def kill(self, name: str, in_save: bool) -> bool:
        """Start the run `name` and kill it; False where it came to its end first."""
        lines, old = steps_of(name), set(being_saved(name))
        pids = begin(name, 2, self.folder)
        if in_save:
            until(lambda: bool(set(being_saved(name)) - old) or ended(pids), PATIENCE)
            time.sleep(self.rng.random() * 0.03)
        else:
            more = self.rng.randrange(STEPS // 2)
            # The metrics may be cut back when the run goes on, so the number of lines is only about where it is.
            until(lambda: steps_of(name) >= lines + more or ended(pids), PATIENCE)
            time.sleep(self.rng.random() * 0.2)
        if ended(pids):
            self.expect(wait(pids) == [0, 0], f"{name} ended by itself, but not well")
            return False
        victims = self.rng.choice(([0], [1], [0, 1]))
        saving, lines = bool(set(being_saved(name)) - old), steps_of(name)
        for rank in victims:
            os.kill(pids[rank], signal.SIGKILL)
        began = time.monotonic()
        statuses = wait(pids, PATIENCE)
        took = time.monotonic() - began
        where = "in a save" if saving else "between saves"
        who = "both" if len(victims) == 2 else f"rank {victims[0]}"
        print(f"{name}, {lines} lines, {where}, {who} killed: {statuses} after {took:.1f} s", flush=True)
        if any(statuses[rank] == 0 for rank in victims):
            return False
        self.hit[f"{where}, {who}"] += 1
        for rank in {0, 1} - set(victims):
            self.noticed.append(took)
            message = (self.folder / f"{name}.err{rank}").read_text()
            self.expect(statuses[rank] == 1 and "R406" in message and "Traceback" not in message,
                        f"{name}: rank {rank} ended with {statuses[rank]}, saying {message[-300:]!r}")  # fmt: skip
        return True

    def expect(self, right: bool, fault: str) -> None:
        """Note a fault where something is not right."""
        if not right:
            self.faults.append(fault)

    def trial(self, name: str, kills: int, whole: list[tuple[int, int, float]], model: dict[str, str]) -> int:
        """A run that is killed up to `kills` times and then left alone, and what came of it; the kills."""
        done = 0
        while done < kills and self.kill(name, in_save=self.rng.random() < 0.5):
            done += 1
        statuses = wait(begin(name, 2, self.folder), RUN)
        message = (self.folder / f"{name}.err0").read_text()[-300:] if any(statuses) else ""
        self.expect(statuses == [0, 0], f"{name} does not come to its end: {statuses} {message!r}")
        self.expect(losses(name) == whole, f"{name}: its losses are others: {losses(name)}")
        self.expect(model_hashes(name) == model, f"{name}: its model is another")
        left = [path.name for path in Path(name, "checkpoints").glob(".*")]
        self.expect(not left, f"{name} leaves {left}")
        return done


def main() -> int:
    """Run trials until there were enough kills."""
    parser = argparse.ArgumentParser(description="Training in two processes, killed again and again.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    world.JOIN = timedelta(seconds=PATIENCE / 2)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.chdir(folder)
        tiny_teacher(folder / "teacher", "qwen3", tie_embeddings=True)
        (folder / "text.txt").write_text("Once upon a time there was a house by the sea. The cat said: it is high. " * 100)
        (folder / "cluster.yaml").write_text(RECIPE)
        statuses = wait(begin("whole", 2, folder), RUN)
        whole, model = losses("whole"), model_hashes("whole")
        if statuses != [0, 0] or len(whole) != STEPS or not model:
            sys.exit(f"the run that nobody kills ended with {statuses}: " + (folder / "whole.err0").read_text()[-2000:])
        killer, done, trials = Killer(folder, random.Random(options.seed)), 0, 0
        while done < options.kills and trials < 4 * options.kills:
            done += killer.trial(f"killed-{trials}", min(KILLS_OF_A_RUN, options.kills - done), whole, model)
            trials += 1
        os.chdir("/")
    noticed = max(killer.noticed, default=0.0)
    print(json.dumps({"kills": done, "runs": trials, **killer.hit, "noticed_within_s": noticed, "faults": killer.faults[:20]}))
    return 1 if killer.faults or done < options.kills else 0


if __name__ == "__main__":
    sys.exit(main())
