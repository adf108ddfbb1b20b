"""Several processes on this machine, as a launcher starts them, without paying PyTorch's imports once for each.

`python -m tests.processes MODULE OUT` imports everything once, forks a child for each rank of each world that the MODULE's
`CHECKS` asks for, and writes what the functions return to OUT as a pickle. Forking is safe here: nothing has run before.
"""

import importlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def printed_by(module: str, *words: str, **env: str) -> Any:
    """The last line that `python -m module words` prints, as JSON: a process of its own for what imports decide."""
    run = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env}, timeout=600,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(size: int, function: Callable[..., Any], *arguments: Any, results: Path, quiet: bool = False) -> list[int]:
    """Fork `size` processes that call `function(*arguments)` with a launcher's environment; returns their pids."""
    port = free_port()
    sys.stdout.flush()
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                if quiet:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                    os.dup2(os.open(results.with_suffix(f".err{rank}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                found = function(*arguments)
                results.with_suffix(f".{rank}").write_bytes(pickle.dumps(found))
                status = found if isinstance(found, int) else 0
            except SystemExit as leaving:
                status = int(leaving.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    return pids


def wait(pids: list[int], seconds: float = 120) -> list[int]:
    """Exit statuses of the processes (minus the signal that ended one); all are killed when time runs out."""
    statuses: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(statuses) < len(pids):
        for pid in set(pids) - set(statuses):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
            until = float("inf")
        time.sleep(0.01)
    return [statuses[pid] for pid in pids]


def together(size: int, function: Callable[..., Any], *arguments: Any, results: Path) -> list[Any]:
    """What `function` returns in each of `size` processes; raises when one fails."""
    statuses = wait(start(size, function, *arguments, results=results))
    if any(statuses):
        raise RuntimeError(f"{function.__name__} on {size} processes ended with {statuses}")
    return [pickle.loads(results.with_suffix(f".{rank}").read_bytes()) for rank in range(size)]


def main(module: str, out: str) -> None:
    """Run `checks(folder)` of a module and pickle what it returns."""
    import torch

    torch.set_num_threads(1)
    found = importlib.import_module(module).checks(Path(out).parent)
    Path(out).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
