"""Times and checks training on several GPUs of one host against one GPU, and against `radlads plan`.

Run: python bench/scale.py [--gpus 2] [--only equal,kill,sequence,scale,whole] [--layouts replicated,optimizer] [--out r.jsonl]
Starts its own processes, over NCCL where there are GPUs, over gloo on a CPU (--cpu: tiny shapes, to see that it works). Every
run is the trainer's own (`run_stage`), on random weights and tokens that are the same for any number of processes.
equal: fp32 losses and gradient norms of N GPUs against 1 on the same global batch. scale: tok/s of N and 1 at the same
micro-batch, and the share of time in communication. whole: step 2 of every layer, memory and tok/s. kill: kill -9 of a process
at a step and in a save, then resume on N and on 1. sequence: one long sequence split over N. All with plan beside actual.
Prints one JSON line a result, and the table last; `--table results.jsonl` prints the table of earlier results. Before anything is
timed all timed jobs are compiled at once, each on two layers by a process of its own; several GPUs are timed first, so that a run
that is cut short knows what one GPU cannot tell. --share puts all processes on one GPU, over gloo:
no measure of speed, but layout replicated works there as on several.
"""
import argparse
import gc
import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32,
        "vocab_size": 512}
CHECKS = ("equal", "kill", "sequence", "scale", "whole")
# Sequences of one GPU in a step: as the recipes have it on two GPUs, and what a whole layer of 7B's width takes.
TIMED = {"smollm2-135m": {"align": 16, "distill": 48}, "": {"align": 4, "distill": 12}}
PROFILED = 3  # steps at the end of a run whose communication is looked at, and which are not timed
USUAL = ("whole", "never")  # what the table does not tell
Job = dict[str, Any]


# ---- one process ----


def work(jobs: list[Job]) -> None:
    """One process of a group: its part of each job in turn. Rank 0 prints what comes of each."""
    from radlads.backends.torch.world import join_world
    from radlads.errors import RadladsError

    if jobs[0]["share"]:  # NCCL takes one process a GPU
        import torch.distributed as dist

        begin: Any = dist.init_process_group
        dist.init_process_group = lambda backend, device_id, **rest: begin("gloo", **rest)  # type: ignore[assignment]
    world = join_world("cpu" if jobs[0]["cpu"] else None)
    for job in jobs:
        try:
            found = train(job, world)
        except RadladsError as error:
            sys.exit(f"error: {error}")
        if world.first:
            print("RESULT " + json.dumps(found), flush=True)
    world.leave()


def train(job: Job, world: Any) -> dict[str, Any]:
    """Run one job, and say what it took."""
    import torch

    from radlads import costs
    from radlads.backends.torch import parallel
    from radlads.backends.torch.trainer import run_stage
    from radlads.cli.train import open_run
    from radlads.recipe import Recipe
    from radlads.runs import read_metrics

    on_gpu = world.device.type == "cuda"
    torch.set_float32_matmul_precision("highest" if job["precision"] == "float32" else "high")
    spec = spec_of(job)
    student = spec.as_student(job["arch"])
    stage = {"kind": job["kind"], "tokens": job["steps"] * job["seq_len"] * job["batch"], "seq_len": job["seq_len"], "lr": 1e-5,
             "batch_size": job["batch"], "micro_batch": job["micro"], "warmup_steps": 1, "save_every": job.get("save_every", 0)}
    how = {"compile": job.get("compile", "auto"), **job.get("parallel", {})}
    recipe = Recipe(name="bench", teacher="t", data={"train": ["a"], "valid": ["a"]}, precision=job["precision"], stages=[stage],
                    parallel=how)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    gpu = costs.gpu_called(name) if on_gpu else None
    way = costs.ways_of(recipe, spec, student, world.size, gpu)[job["kind"]]
    gc.collect()  # FSDP's groups hold their modules, and those them
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() / 2**30 if on_gpu else 0.0
    began = time.perf_counter()
    parallel.fill, parallel.load_on = random_values, random_whole
    folders = [type("Folder", (), {"spec": one, "weights": {}})() for one in (spec, student)]
    teacher = None if job["kind"] == "lm" else parallel.load_frozen(folders[0], way, world, job["precision"])
    (planned,) = recipe.stages
    task = parallel.build_task(planned, folders[1], teacher, way, world, job["precision"])
    built = time.perf_counter() - began
    look = Look(job, world, on_gpu)
    with open_run(Path(job["folder"]), recipe, "auto", world) as run:
        run_stage(planned, task, Tokens(spec.V, planned.seq_len), run, look.step, world=world)
        communication = look.communication()
    world.barrier()
    records = read_metrics(job["folder"])
    steps = [r for r in records if r["kind"] == "train"]
    told = ("check", "kind", "shape", "precision", "micro", "seq_len")
    result: dict[str, Any] = {key: job[key] for key in told} | {"layers": spec.L, "processes": world.size, "device": name}
    result |= {"layout": way.layout, "teacher": way.teacher, "recompute": way.recompute, "moments": way.moments}
    result |= {"steps": len(steps), "build_s": round(built, 1), "first_step_s": steps[0]["step_s"]}
    result |= {"step_s": usual(steps, PROFILED * look.wanted), "saved_s": [round(s, 2) for s in look.saved]}
    result |= {"graphs": look.graphs, "notes": [r["text"] for r in records if r["kind"] == "note"]}
    result |= {"losses": [r["loss"] for r in steps], "norms": [r["grad_norm"] for r in steps]}
    result["tok_s_per_gpu"] = planned.tokens_per_step / result["step_s"] / world.size
    if on_gpu:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        result["held_before_gib"] = held
    if gpu is not None:
        plan = costs.plan_stage(planned, spec, student, way, world.size, gpu, job["precision"])
        result |= {"planned_gib": plan.peak_gib, "planned_step_s": plan.seconds / plan.steps}
        result["mfu"] = plan.flops_per_token * result["tok_s_per_gpu"] / gpu.flops
    return result | communication


def usual(steps: list[dict[str, Any]], left_out: int = 0) -> float:
    """Median seconds of a step, the first third (compilation) and some last ones left out."""
    timed = sorted(r["step_s"] for r in steps[len(steps) // 3 : len(steps) - left_out])
    return float(timed[len(timed) // 2])


def spec_of(job: Job) -> Any:
    from radlads.shapes import SHAPES

    found = SHAPES[job["shape"]]
    if job["cpu"]:
        return replace(found, mixers=(), **TINY)
    return replace(found, num_layers=job["layers"] or found.num_layers, mixers=())


class Tokens:
    """Random tokens by position."""

    def __init__(self, vocab: int, T: int) -> None:
        self.vocab, self.T = vocab, T

    def samples(self, *_: object) -> "Tokens":
        return self

    def batch(self, first: int, count: int) -> Any:
        import numpy as np

        rows = [np.random.default_rng(index).integers(0, self.vocab, self.T + 1) for index in range(first, first + count)]
        return np.stack(rows).astype(np.int64)


def random_values(model: Any, _: Any, world: Any) -> None:
    """Weights by name, the same for any number of processes; instead of a folder's (radlads.backends.torch.parallel.fill).

    A GPU and a CPU draw different numbers from one seed, so all are drawn where there is a GPU on it: step 1 loads a student that
    is not sharded in the CPU's memory.
    """
    import zlib

    import torch

    from radlads.backends.torch import parallel

    place = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    with torch.no_grad():
        for name, p in model.named_parameters():
            local = parallel.local_of(p)
            if not parallel.sharded(p) and local.device.type != place.type and ".self_attn." not in name:
                continue  # in step 1 the rest of the student waits in the CPU's memory, and nothing reads it
            if name.endswith("norm.weight"):
                local.fill_(1)
            elif name.endswith(".w0"):
                local.fill_(-3)
            else:
                drawn = torch.Generator(place).manual_seed(zlib.crc32(name.encode()))
                whole = torch.empty(p.shape, device=place).normal_(0, 0.02, generator=drawn)
                local.copy_(whole[parallel.rows_of(p.shape[0], world)] if parallel.sharded(p) and world.size > 1 else whole)


def random_whole(folder: Any, world: Any, precision: str) -> Any:
    """A whole model of random weights on this process's device (radlads.backends.torch.parallel.load_on)."""
    import torch

    from radlads.backends.torch.load import DTYPES
    from radlads.backends.torch.model import Model

    with torch.device("meta"):
        model = Model(folder.spec).to(DTYPES[precision])
    model = model.to_empty(device=world.device)
    random_values(model, folder, world)
    return model.eval()


class Look:
    """Sees every step of a run: says so on rank 0, profiles the last ones, notes what saves take, and counts CUDA graphs."""

    def __init__(self, job: Job, world: Any, on_gpu: bool) -> None:
        from radlads.backends.torch.checkpoint import Checkpoints
        from radlads.backends.torch.graphed import Graphed

        self.job, self.world = job, world
        self.wanted = bool(job.get("communication")) and on_gpu
        self.profile: Any = None
        self.saved: list[float] = []
        save = Checkpoints.__dict__.get("plain_save", Checkpoints.save)

        def timed(checkpoints: Any, *arguments: Any) -> None:
            began = time.perf_counter()
            save(checkpoints, *arguments)
            self.saved.append(time.perf_counter() - began)

        Checkpoints.plain_save, Checkpoints.save = save, timed  # type: ignore[attr-defined,method-assign]
        self.graphs = 0
        record = Graphed.__dict__.get("plain_record", Graphed.record)

        def counted(graphed: Any, first: bool) -> None:
            record(graphed, first)
            self.graphs += 1

        Graphed.plain_record, Graphed.record = record, counted  # type: ignore[attr-defined,method-assign]

    def step(self, progress: Any) -> None:
        if self.world.first:
            print(f"STEP {progress.step} {progress.loss!r} {self.peak():.2f} GiB", flush=True)
        if self.wanted and self.world.first and progress.step == self.job["steps"] - PROFILED:
            from torch.profiler import ProfilerActivity, profile

            self.profile = profile(activities=[ProfilerActivity.CUDA])
            self.profile.start()

    def peak(self) -> float:
        """GiB that were allocated at once so far."""
        import torch

        return torch.cuda.max_memory_allocated() / 2**30 if self.world.device.type == "cuda" else 0.0

    def communication(self) -> dict[str, float]:
        """Shares of the profiled steps: in collectives, in collectives while nothing else ran, and in which nothing ran."""
        if self.profile is None:
            return {}
        import torch

        torch.cuda.synchronize()
        self.profile.stop()
        kernels = [e for e in self.profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        spans = [(e.time_range.start, e.time_range.end, e.name.lower().startswith("nccl")) for e in kernels]
        busy = union([(a, b) for a, b, nccl in spans if not nccl])
        both = union([(a, b) for a, b, _ in spans])
        whole = max(b for _, b, _ in spans) - min(a for a, _, _ in spans)
        collective = union([(a, b) for a, b, nccl in spans if nccl])
        return {"collectives": collective / whole, "exposed": (both - busy) / whole, "idle": 1 - both / whole}


def union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(spans):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


# ---- groups of processes ----


class Group:
    """Processes on the GPUs from `first` on, that do some jobs one after the other."""

    def __init__(self, jobs: list[Job], processes: int, first: int = 0) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder = Path(tempfile.mkdtemp(prefix="group-", dir=jobs[0]["place"]))
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(processes):
            place = 0 if jobs[0]["share"] else rank
            own: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": place, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
                                   "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
            if processes == 1:
                visible = os.environ.get("CUDA_VISIBLE_DEVICES")
                own["CUDA_VISIBLE_DEVICES"] = visible.split(",")[first] if visible else first
            environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
            with (self.folder / f"err{rank}.txt").open("w") as err:
                self.processes.append(subprocess.Popen([sys.executable, __file__, "--worker", json.dumps(jobs)], env=environment,
                                                       stdout=subprocess.PIPE, stderr=err, text=True))
        self.lines: queue.Queue[str] = queue.Queue()
        self.seen = ""
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        out = self.processes[0].stdout
        for line in out or ():
            self.lines.put(line)
        self.lines.put("")

    def until(self, begins: str, seconds: float) -> str | None:
        """The next line that begins so; None when the processes end first, or have not come there in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                line = self.lines.get(timeout=0.2)
            except queue.Empty:
                continue
            if not line:
                return None
            self.seen = line.strip() or self.seen
            if line.startswith(begins):
                return line[len(begins) :].strip()
        return None

    def words(self, rank: int, lines: int = 3) -> list[str]:
        """The last lines that a process wrote to its standard error."""
        return (self.folder / f"err{rank}.txt").read_text(errors="replace").strip().splitlines()[-lines:]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def measure(
    jobs: list[Job], processes: int, first: int = 0, limit: float = 240, keep: Callable[[dict[str, Any]], None] = lambda _: None
) -> list[dict[str, Any]]:
    """The results of jobs on `processes` GPUs, in one group unless one fails: the rest goes on in another.

    `keep` is called with each result when it is there.
    """
    results: list[dict[str, Any]] = []
    while len(results) < len(jobs):
        group = Group(jobs[len(results) :], processes, first)
        while len(results) < len(jobs):
            found = group.until("RESULT ", limit)
            if found is None:
                job = jobs[len(results)]
                time.sleep(2)  # the others may still say why
                failed = {rank: group.words(rank, 4) for rank in range(processes)}
                result = {key: job[key] for key in ("check", "kind", "shape")} | {"processes": processes, "failed": failed}
                results.append(result | partial_result(job, group.seen))
                keep(results[-1])
                break
            results.append(dict(json.loads(found)))
            keep(results[-1])
        else:
            for process in group.processes:
                process.wait(60)
        group.end()
    return results


def partial_result(job: Job, seen: str) -> dict[str, Any]:
    """What is known of a job that did not come to its end."""
    from radlads.runs import read_metrics

    path = Path(job["folder"])
    steps = [r for r in read_metrics(path) if r["kind"] == "train"] if (path / "metrics.jsonl").exists() else []
    return {"last_line": seen, "steps": len(steps), **({"step_s": usual(steps)} if steps else {})}


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What several functions return that run at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [running.result() for running in [pool.submit(call) for call in calls]]


# ---- what is looked at ----


class Bench:
    """The jobs by check, for one shape on `gpus` GPUs, and their results."""

    def __init__(self, given: argparse.Namespace, place: str) -> None:
        self.given, self.N, self.cpu, self.place = given, given.gpus, given.cpu, place
        self.base: Job = {"arch": given.arch, "cpu": given.cpu, "share": given.share, "shape": given.shape, "layers": None,
                          "place": place, "precision": "float32" if given.cpu else "bfloat16", "steps": given.steps}
        self.results: list[dict[str, Any]] = []
        self.kinds = given.kinds.split(",")
        self.lock = threading.Lock()
        self.numbers = iter(range(10**6))

    def add(self, *found: dict[str, Any]) -> None:
        with self.lock:
            for one in found:
                self.results.append(one)
                print(json.dumps(one), flush=True)
                if self.given.out:
                    with Path(self.given.out).open("a") as out:
                        out.write(json.dumps(one) + "\n")

    def job(self, check: str, kind: str, **more: Any) -> Job:
        length, micro = {"align": (512, 4), "distill": (512, 12), "lm": (65536, 1)}[kind]
        if self.cpu:
            length, micro = 256 if kind == "lm" else 64, min(micro, 2)
        return {**self.base, "check": check, "kind": kind, "seq_len": length, "micro": micro, "batch": micro,
                "folder": f"{self.place}/run-{next(self.numbers)}", **more}

    def folders(self, jobs: list[Job], **more: Any) -> list[Job]:
        return [{**job, "folder": f"{self.place}/run-{next(self.numbers)}", **more} for job in jobs]

    def exact_jobs(self) -> list[Job]:
        """fp32 on the same global batch."""
        same = {"precision": "float32", "steps": 4, "micro": 2, "batch": 2 * self.N, "compile": "off"}
        jobs = [self.job("equal", kind, **same, shape=shape, layers=layers)
                for shape, layers in (("smollm2-135m", None), (self.given.shape, 4)) for kind in ("align", "distill")]
        jobs.append(self.job("equal", "lm", precision="float32", steps=3, shape="smollm2-135m", compile="off",
                             parallel={"recompute": "always"}))
        return [job for job in jobs if job["kind"] in self.kinds]

    def spread(self, jobs: list[Job]) -> list[Job]:
        """The same jobs for all GPUs, in each of the layouts that are asked for; long sequences are split over all processes."""
        found = []
        for layout in self.given.layouts.split(","):
            for job in self.folders(jobs):
                more = {"sequence": {"lm": self.N}} if job["kind"] == "lm" else {}
                batch = job["batch"] if job["check"] == "equal" or more else job["batch"] * self.N
                found.append({**job, "batch": batch, "parallel": {"layout": layout, **job.get("parallel", {}), **more}})
        return found

    def timed_jobs(self) -> list[list[Job]]:
        """bf16 on one GPU, the jobs of each shape; step 2 with as many layers as one GPU holds with its optimiser."""
        found = []
        for shape in self.given.shapes.split(","):
            sizes = TIMED.get(shape, TIMED[""])
            layers = {} if shape in TIMED else {"align": self.given.align_layers, "distill": self.given.layers}
            jobs = [self.job("scale", kind, shape=shape, layers=layers.get(kind), communication=True) for kind in sizes]
            if not self.cpu:
                jobs = [{**job, "micro": sizes[job["kind"]], "batch": sizes[job["kind"]]} for job in jobs]
            found.append([job for job in jobs if job["kind"] in self.kinds])
        return found

    def long_job(self) -> Job:
        """One long sequence."""
        return self.job("sequence", "lm", shape="qwen2.5-1.5b", steps=8, parallel={"recompute": "always"}, communication=True)

    def kill(self, precision: str) -> None:
        """kill -9 at a step and in a save; resume on all and on one; losses against an uninterrupted run."""
        layers = None if self.cpu else 8
        job = self.job("kill", "distill", shape="smollm2-135m", layers=layers, steps=16, save_every=4, micro=2, batch=2 * self.N,
                       precision=precision, compile="off", parallel={"layout": self.given.layouts.split(",")[0]})
        own = {**job, "folder": f"{self.place}/killed-{precision}"}

        def interrupted() -> list[dict[str, Any]]:
            return [self.killed(own, moment, victim) for moment, victim in (("step", self.N - 1), ("save", 0))]

        (whole,), ends = at_once(lambda: measure([{**job, "folder": f"{self.place}/whole-{precision}"}], self.N), interrupted)
        self.add(whole, *({**end, "precision": precision} for end in ends))
        alone = f"{own['folder']}-alone"
        shutil.copytree(own["folder"], alone)
        runs = ((self.N, own["folder"]), (1, alone))
        found = at_once(*(lambda n=n, folder=folder: measure([{**own, "folder": folder}], n) for n, folder in runs))
        for (n, _), (result,) in zip(runs, found, strict=True):
            if "failed" in result or "failed" in whole:
                self.add(result)
                continue
            told = {"check": "kill", "precision": precision, "resumed_on": n, "steps": len(result["losses"])}
            self.add(told | {"loss_difference": difference(whole["losses"], result["losses"])})

    def killed(self, job: Job, moment: str, victim: int) -> dict[str, Any]:
        """Kill one process of a run, and see how the others end."""
        before = checkpoints(job["folder"])
        group = Group([job], self.N)
        if moment == "step":
            while (line := group.until("STEP ", 120)) is not None and int(line.split()[0]) < 2 * job["save_every"] + 2:
                pass
        else:
            group.until("STEP ", 120)
            end = time.monotonic() + 60
            while not saving(job["folder"]) and time.monotonic() < end:
                time.sleep(0.001)
        in_save = saving(job["folder"])
        group.processes[victim].kill()
        began = time.monotonic()
        survivor = next(rank for rank in range(self.N) if rank != victim)
        try:
            status: int | None = group.processes[survivor].wait(90)
        except subprocess.TimeoutExpired:
            status = None
        took = time.monotonic() - began
        words = [line for line in group.words(survivor, 40) if line.startswith("error")] or group.words(survivor, 1)
        group.end()
        return {"check": "kill", "moment": moment, "victim": victim, "in_save": in_save, "ended_after_s": took, "status": status,
                "message": "".join(words[-1:]), "checkpoints": [before, checkpoints(job["folder"])]}

    def run(self, checks: list[str]) -> None:
        """Untimed work shares the GPUs, timed work has its GPUs alone."""
        N = self.N
        lists = self.timed_jobs() if "scale" in checks else []
        if "sequence" in checks:
            lists.append([self.long_job()])
        if lists:
            jobs = [job for some in lists for job in some]
            self.compile(jobs)
            measure(self.spread(jobs), N, keep=self.add)
        if lists and not self.given.skip_one:
            # Shapes are dealt to the GPUs.
            dealt = [(gpu, [job for jobs in lists[gpu::N] for job in jobs]) for gpu in range(min(N, len(lists)))]
            calls = [lambda gpu=gpu, jobs=jobs: measure(jobs, 1, 0 if self.cpu else gpu, keep=self.add) for gpu, jobs in dealt]
            at_once(*calls)
        untimed: list[Callable[[], None]] = [self.exact] if "equal" in checks else []
        if "kill" in checks:
            precisions = ["float32"] if self.cpu else self.given.kill.split(",")
            untimed += [lambda precision=precision: self.kill(precision) for precision in precisions]
        if untimed:
            at_once(*untimed)
        if "whole" in checks:
            self.whole()

    def compile(self, jobs: list[Job]) -> None:
        """Fill the compilers' caches: every layer is compiled alike, so two of each job are enough, and all jobs go at once."""
        began = time.perf_counter()
        short = self.folders(jobs, check="compile", layers=2, steps=2, communication=False)
        calls = [lambda gpu=i % self.N, job=job: measure([job], 1, 0 if self.cpu else gpu) for i, job in enumerate(short)]
        for (found,) in at_once(*calls):
            if "failed" in found:
                why = f"{found['kind']} of {found['shape']} was not compiled before: {found['failed']}"
                print(why, file=sys.stderr, flush=True)
        print(f"compiled {len(short)} jobs after {time.perf_counter() - began:.0f} s", flush=True)

    def exact(self) -> None:
        """The exact jobs on one GPU and on all."""
        jobs = self.exact_jobs()
        one, many = at_once(lambda: measure(jobs, 1, keep=self.add), lambda: measure(self.spread(jobs), self.N, keep=self.add))
        for a, b in zip(one * len(many), many, strict=False):  # those of each layout are in the same order
            if "failed" not in a and "failed" not in b:
                told = {key: a[key] for key in ("check", "kind", "shape", "layers", "precision")} | {"layout": b["layout"]}
                told["loss_difference"] = difference(a["losses"], b["losses"])
                self.add(told | {"norm_difference": difference(a["norms"], b["norms"])})

    def whole(self) -> None:
        """Step 2 of every layer, with the settings that are given."""
        given = dict(text.split("=", 1) for text in self.given.set)
        micro = int(given.pop("micro", 12))
        job = self.job("whole", "distill", steps=self.given.whole_steps, communication=True, parallel=given)
        micro = min(micro, job["micro"])
        job |= {"batch": job["micro"] * self.N, "micro": micro}
        measure([job], self.N, limit=330, keep=self.add)


def saving(folder: str) -> bool:
    """Whether a checkpoint is being written."""
    return any(Path(folder, "checkpoints").glob(".*.partial"))


def checkpoints(folder: str) -> list[int]:
    """Steps of the complete checkpoints."""
    return sorted(int(path.parent.name.rpartition("-")[2]) for path in Path(folder, "checkpoints").glob("stage-*/manifest.json"))


def difference(wanted: list[float], found: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))


def beside_one(result: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """How many times as fast several GPUs are as one, where that was timed too; of a long sequence how far losses are apart."""
    same = ("check", "kind", "shape", "layers", "micro")
    if result["check"] not in ("scale", "sequence") or result["processes"] == 1 or "failed" in result:
        return {}
    for one in results:
        if one.get("processes") == 1 and "failed" not in one and all(one.get(key) == result[key] for key in same):
            times = result["processes"] * result["tok_s_per_gpu"] / one["tok_s_per_gpu"]
            apart = {"loss_difference": difference(one["losses"], result["losses"])} if result["kind"] == "lm" else {}
            return {"times": times, **apart}
    return {}


def table(results: list[dict[str, Any]]) -> str:
    """Results for people."""
    lines = ["check    kind    n layers  tok/s/GPU   MFU  GiB (reserved) planned   step s planned  what"]
    for r in ({**result, **beside_one(result, results)} for result in results):
        mfu, nan = r.get("mfu"), float("nan")
        cells = [f"{r.get(key, nan):7.2f}" for key in ("peak_gib", "reserved_gib", "planned_gib", "step_s", "planned_step_s")]
        names = ("times", "loss_difference", "norm_difference", "collectives", "exposed", "idle", "precision", "moment", "victim",
                 "in_save", "ended_after_s", "status", "checkpoints", "message", "last_line", "resumed_on", "steps", "layout",
                 "teacher", "recompute", "moments", "micro", "graphs", "notes", "first_step_s", "build_s", "saved_s", "failed")
        told = {name: r[name] for name in names if r.get(name) not in (None, [], *USUAL)}
        told |= {"shape": r["shape"]} if r.get("shape") not in (None, "qwen2.5-7b") else {}
        rest = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in told.items()}
        lines.append(f"{r['check']:8} {r.get('kind', ''):7} {r.get('processes', '')!s:2} {r.get('layers', '')!s:5}"
                     f"{r.get('tok_s_per_gpu', 0):10.0f} {'' if mfu is None else f'{mfu:.1%}':>6} {' '.join(cells)}  "
                     + " ".join(f"{name} {value}" for name, value in rest.items()))
    return "\n".join(lines)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--gpus", type=int, default=2)
    args.add_argument("--only", default=",".join(CHECKS), help="checks, comma-separated")
    args.add_argument("--steps", type=int, default=20, help="of the timed runs")
    args.add_argument("--whole-steps", type=int, default=100)
    args.add_argument("--shape", default="qwen2.5-7b")
    args.add_argument("--arch", default="rwkv7")
    args.add_argument("--shapes", default="smollm2-135m,qwen2.5-7b", help="that are timed, comma-separated")
    args.add_argument("--kinds", default="align,distill,lm", help="of stages that are looked at, comma-separated")
    args.add_argument("--layouts", default="auto", help="of the student on all GPUs, comma-separated")
    args.add_argument("--layers", type=int, default=8, help="of the step 2 that one GPU is timed with, where it is not SmolLM2")
    args.add_argument("--align-layers", type=int, help="of such a step 1 (all of them)")
    args.add_argument("--kill", default="float32,bfloat16", help="precisions")
    args.add_argument("--skip-one", action="store_true", help="do not time one GPU")
    args.add_argument("--cpu", action="store_true")
    args.add_argument("--share", action="store_true", help="all processes on the first GPU")
    args.add_argument("--set", action="append", default=[], help="of the whole model: micro=3, or a value of `parallel`")
    args.add_argument("--out", help="file to add results to, a line each")
    args.add_argument("--table", help="print the table of such a file, and do nothing else")
    args.add_argument("--worker", help=argparse.SUPPRESS)
    given = args.parse_args()
    if given.worker:
        work(json.loads(given.worker))
        return
    if given.table:
        print(table([json.loads(line) for line in Path(given.table).read_text().splitlines()]))
        return
    with tempfile.TemporaryDirectory(prefix="scale-") as place:
        bench = Bench(given, place)
        try:
            bench.run(given.only.split(","))
        finally:
            print("\n" + table(bench.results), flush=True)


if __name__ == "__main__":
    main()
