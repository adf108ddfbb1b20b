"""`radlads launch`: start a training on several processes, here, through Slurm, or as a command to copy.

It builds one torchrun line and hands it on. A run that is stopped or loses a process goes on where it was.
"""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from radlads.cli.options import opt
from radlads.cli.train import STOPPED, TrainOptions, checked_inputs, run_folder

PORT = 29500
# Seconds before the end of its time that Slurm warns a job; seconds that processes have to save when another one ended.
WARNING, GRACE = 300, 55


@dataclass(kw_only=True)
class LaunchOptions(TrainOptions):
    """What to train, and on which machines."""

    executor: Literal["local", "slurm", "print"] = opt("local", "Where: this machine, Slurm, or only print.", panel="Machines")
    nodes: int = opt(1, "Number of machines.", panel="Machines")
    gpus_per_node: int | None = opt(None, "Processes on each machine; all its GPUs without it.", panel="Machines")
    partition: str | None = opt(None, "Slurm partition.", panel="Machines")
    account: str | None = opt(None, "Slurm account.", panel="Machines")
    time: str = opt("24:00:00", "Slurm time limit, HH:MM:SS.", panel="Machines")
    requeue: bool = opt(True, "Let a preempted Slurm job start again.", "--requeue/--no-requeue", panel="Machines")
    restarts: int = opt(3, "New starts of the local executor after a process was lost.", panel="Machines")


@dataclass
class LaunchResult:
    """What was started."""

    executor: str
    command: list[str]
    script: str = ""
    job: str = ""
    folder: str = ""
    exit_status: int = field(default=0)

    def blocks(self) -> Iterator[str]:
        """The script or the job; nothing after a local run, which has spoken for itself."""
        if self.executor == "print":
            yield self.script or shlex.join(self.command)
        elif self.job:
            yield f"job {self.job} is queued; the run is {self.folder}"


def launch(options: LaunchOptions) -> LaunchResult:
    """Start a training on the machines asked for."""
    from radlads.errors import fail

    for name, value in (("--nodes", options.nodes), ("--gpus-per-node", options.gpus_per_node)):
        if value is not None and value < 1:
            raise fail("R101", where=name, why=f"it is {value}", fix="Give 1 or more")
    if options.executor == "local" and options.nodes > 1:
        fix = "Use --executor slurm, or print the line for each machine"
        raise fail("R101", where="--nodes", why="the local executor has one machine", fix=fix)
    minutes(options.time)
    recipe, _ = checked_inputs(options)
    folder = run_folder(options, recipe)
    if options.executor == "print":
        return printed(options, folder)
    if options.executor == "slurm":
        return queued(options, folder)
    command = torchrun(options, ["--standalone"])
    return LaunchResult("local", command, folder=str(folder), exit_status=run_here(command, folder, options.restarts))


def train_arguments(options: TrainOptions) -> list[str]:
    """The command line of `radlads train` with the same options."""
    given = ["train", *([options.recipe] if options.recipe else [])]
    for name in ("teacher", "student", "student_arch", "output_dir"):
        value = getattr(options, name)
        given += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    given += [f"--set={value}" for value in options.set] + [f"--report-to={name}" for name in options.report_to]
    given += ["--resume", options.resume]
    switches = ("measure_difficulty", "quiet", "json")
    return [*given, *(f"--{name.replace('_', '-')}" for name in switches if getattr(options, name))]


def torchrun(options: LaunchOptions, meeting: list[str]) -> list[str]:
    """The torchrun line of one machine; `meeting` says how machines find one another."""
    from importlib.metadata import version

    here = options.executor == "local"
    processes = options.gpus_per_node if options.gpus_per_node is not None else 1 if here and not has_gpu() else "gpu"
    line = [sys.executable, "-m", "torch.distributed.run", *meeting, f"--nproc-per-node={processes}"]
    if tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2]) >= (2, 13):
        line.append(f"--shutdown-timeout={GRACE}")  # a large checkpoint takes longer than the usual 30 s
    return [*line, "-m", "radlads", *train_arguments(options)]


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, asked without importing PyTorch."""
    return Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists()


def run_here(command: list[str], folder: Path, restarts: int) -> int:
    """Run torchrun until the run is done or stopped, starting again at most `restarts` times; its exit status."""
    asked: list[int] = []
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    for attempt in range(restarts + 1):
        with subprocess.Popen(command, env=environment) as process:

            def pass_on(number: int, _: object, process: "subprocess.Popen[bytes]" = process) -> None:
                asked.append(number)
                process.send_signal(signal.SIGTERM)

            before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
            try:
                status = process.wait()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)
        state = run_status(folder)
        if state == "done" and status == 0:
            return 0
        if asked or state == "stopped":
            return 130 if signal.SIGINT in asked else STOPPED
        if attempt < restarts:
            print(f"a process was lost; start {attempt + 2} of {restarts + 1}", file=sys.stderr, flush=True)
    return 1


def run_status(folder: Path) -> str | None:
    """ "running", "stopped" or "done"; None before a run began."""
    import json

    try:
        return str(json.loads((folder / "run.json").read_bytes()).get("status"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def minutes(text: str) -> int:
    """Minutes of a Slurm time limit HH:MM:SS. R101 for anything else."""
    from radlads.errors import fail

    parts = text.split(":")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
        raise fail("R101", where="--time", why=f"{text[:40]!r} is no time limit", fix="Write HH:MM:SS, such as 24:00:00")
    hours, mins, seconds = map(int, parts)
    return max(1, hours * 60 + mins + (seconds > 0))


def printed(options: LaunchOptions, folder: Path) -> LaunchResult:
    """One torchrun line for one machine, a Slurm script for several."""
    if options.nodes == 1:
        command = torchrun(options, ["--standalone"])
        return LaunchResult("print", command, folder=str(folder))
    meeting = [f"--nnodes={options.nodes}", "--rdzv-backend=c10d", "--rdzv-id=$SLURM_JOB_ID", f"--rdzv-endpoint=$HEAD:{PORT}"]
    command = torchrun(options, meeting)
    line = " ".join(word if word.startswith("--rdzv") else shlex.quote(word) for word in command)
    about = [f"--nodes={options.nodes}", "--ntasks-per-node=1", f"--time={options.time}", f"--signal=TERM@{WARNING}"]
    about += [f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else ["--exclusive"]
    about += [f"--{name}={getattr(options, name)}" for name in ("partition", "account") if getattr(options, name)]
    about += ["--requeue"] if options.requeue else []
    script = ["#!/bin/bash", *(f"#SBATCH {word}" for word in about)]
    script += ['HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)', f"srun {line}"]
    return LaunchResult("print", command, script="\n".join(script), folder=str(folder))


@dataclass
class NodeTask:
    """What runs on each machine of a Slurm job: torchrun, which finds the others through the first machine."""

    command: list[str]
    nodes: int
    folder: str
    requeue: bool
    process: Any = None

    def __call__(self) -> int:
        """Run to the end; returns the exit status."""
        meeting = ["--standalone"]
        if self.nodes > 1:
            listed = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
            head = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()[0]
            meeting = [f"--nnodes={self.nodes}", "--rdzv-backend=c10d", f"--rdzv-id={os.environ['SLURM_JOB_ID']}"]
            meeting.append(f"--rdzv-endpoint={head}:{PORT}")
        line = [word for part in self.command for word in (meeting if part == "MEETING" else [part])]
        self.process = subprocess.Popen(line, env={"OMP_NUM_THREADS": "1", **os.environ})
        status = int(self.process.wait())
        self.process = None
        if status and run_status(Path(self.folder)) not in ("done", "stopped"):
            raise RuntimeError(f"torchrun ended with {status}")
        return status

    def checkpoint(self) -> Any:
        """Slurm is about to end the job: let the run save, and ask for the same job again unless `requeue` is off."""
        import submitit

        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
        if not self.requeue:
            return None  # submitit's word for a job that ends here
        return submitit.helpers.DelayedSubmission(NodeTask(self.command, self.nodes, self.folder, self.requeue))


def queued(options: LaunchOptions, folder: Path) -> LaunchResult:
    """Hand the run to Slurm through submitit. R104 without it, R405 where there is no Slurm."""
    from importlib.util import find_spec

    from radlads.errors import fail

    if find_spec("submitit") is None:
        raise fail("R104", where="--executor slurm", why="submitit is not installed", fix="Run `pip install 'radlads[slurm]'`")
    import submitit

    command = torchrun(options, ["MEETING"])
    settings = {"nodes": options.nodes, "tasks_per_node": 1, "timeout_min": minutes(options.time), "name": folder.name}
    settings |= {"gpus_per_node": options.gpus_per_node} if options.gpus_per_node else {}
    slurm = {"slurm_signal_delay_s": WARNING, "slurm_partition": options.partition, "slurm_account": options.account}
    try:
        # The folder of the run itself must stay empty until the run begins.
        executor = submitit.AutoExecutor(folder.with_name(f"{folder.name}-slurm"), cluster="slurm", slurm_max_num_timeout=100)
        executor.update_parameters(**settings, **{key: value for key, value in slurm.items() if value is not None})
        job = executor.submit(NodeTask(command, options.nodes, str(folder), options.requeue))
    except (RuntimeError, OSError) as error:
        raise fail("R405", where="Slurm", why=str(error).split("\n")[0], fix="Use --executor print and submit by hand") from None
    return LaunchResult("slurm", command, job=str(job.job_id), folder=str(folder))
