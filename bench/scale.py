"""Times and checks training on several GPUs of one host against one GPU, and against `radlads plan`.

Run: python bench/scale.py [--gpus 2] [--checks equal,scale,whole,kill,sequence] [--steps 20] [--shape qwen2.5-7b] [--layers N]
Starts its own processes, over NCCL where there are GPUs, over gloo on a CPU (--cpu: tiny shapes, to see that it works).
equal: fp32 losses and gradient norms of N GPUs against 1 on the same global batch. scale: tok/s per GPU of 1 and N at the
same micro-batch, steps 1 and 2, with the share of time in communication. whole: every layer of the shape, memory and tok/s
against the plan. kill: kill -9 of one process at a step and in a save, then resume on N and on 1. sequence: one long sequence
split over N. Prints one JSON line a result, and the table last.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32,
         "vocab_size": 512}


def spec_of(shape: str, layers: int | None, cpu: bool) -> Any:
    from radlads.shapes import SHAPES
    found = SHAPES[shape]
    if cpu:
        found = replace(found, mixers=(), **SMALL)
    return found if layers is None or cpu else replace(found, num_layers=min(layers, found.num_layers), mixers=())


def recipe_of(kind: str, job: dict[str, Any]) -> Any:
    from radlads.recipe import Recipe
    T, batch = job["seq_len"], job["batch"]
    stage = {"kind": kind, "tokens": job["steps"] * T * batch, "seq_len": T, "batch_size": batch, "micro_batch": job["micro"],
             "lr": 1e-5, "warmup_steps": 1, "save_every": job.get("save_every", 0)}
    return Recipe(name="bench", teacher="t", data={"train": ["a"], "valid": ["a"]}, precision=job["precision"], stages=[stage],
                  parallel=job.get("parallel", {}))


class Random:
    """Synthetic tokens by position: the same for any number of processes."""

    def __init__(self, vocab: int, T: int) -> None:
        self.vocab, self.T = vocab, T

    def samples(self, *_: object) -> "Random":
        return self

    def batch(self, first: int, count: int) -> Any:
        import numpy as np
        rows = [np.random.default_rng(index).integers(0, self.vocab, self.T + 1) for index in range(first, first + count)]
        return np.stack(rows).astype(np.int64)


def models(spec: Any, student: Any, way: Any, world: Any, precision: str, kind: str) -> tuple[Any, Any]:
    """Random teacher and task, made on the device: no rank ever holds a whole model that it does not keep."""
    import torch

    from radlads.backends.torch import parallel
    from radlads.backends.torch.load import DTYPES
    from radlads.backends.torch.model import Model

    def values(model: Any, *_: object) -> None:
        generator = torch.Generator(device=world.device).manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                local = parallel.local_of(p)
                if name.endswith("norm.weight"):
                    local.fill_(1)
                elif name.endswith(".w0"):
                    local.fill_(-3)
                elif local.device.type == world.device.type and not job_exact():
                    local.normal_(0, 0.02, generator=generator)
                else:  # the same numbers whatever the number of processes
                    whole = torch.Generator().manual_seed(abs(hash_of(name)))
                    drawn = torch.randn(p.shape, generator=whole) * 0.02
                    rows = parallel.rows_of(p.shape[0], world) if parallel.sharded(p) and world.size > 1 else slice(None)
                    local.copy_(drawn[rows])

    parallel.fill = values  # random weights instead of a folder's
    folder = type("Folder", (), {"spec": spec, "weights": {}})()
    made = type("Folder", (), {"spec": student, "weights": {}})()
    def whole(folder: Any, world: Any, precision: str) -> Any:
        with torch.device("meta"):
            model = Model(folder.spec).to(DTYPES[precision])
        model = model.to_empty(device=world.device)
        values(model)
        return model.eval()
    parallel.load_on = whole
    teacher = None if kind == "lm" else parallel.load_frozen(folder, way, world, precision)
    stage = recipe_of(kind, JOB).stages[0]
    return parallel.build_task(stage, made, teacher, way, world, precision), stage


def hash_of(name: str) -> int:
    import zlib
    return zlib.crc32(name.encode())


def job_exact() -> bool:
    return bool(JOB.get("exact"))


JOB: dict[str, Any] = {}


def worker(job: dict[str, Any]) -> None:
    """One process of one measurement; rank 0 prints the result."""
    import torch

    from radlads import costs
    from radlads.backends.torch.trainer import StageRun
    from radlads.backends.torch.world import World, join_world
    from radlads.runs import Run

    JOB.update(job)
    if job["precision"] == "float32":
        torch.backends.cuda.matmul.allow_tf32 = False
    world = join_world("cpu" if job["cpu"] else None)
    spec = spec_of(job["shape"], job["layers"], job["cpu"])
    student = spec.as_student(job["arch"])
    recipe = recipe_of(job["kind"], job)
    name = "cpu" if job["cpu"] else torch.cuda.get_device_name()
    gpu = None if job["cpu"] else costs.gpu_called(name)
    way = costs.ways_of(recipe, spec, student, world.size, gpu)[job["kind"]]
    task, stage = models(spec, student, way, world, job["precision"], job["kind"])
    run = Run(Path(job["folder"]), recipe, False)
    corpus: Any = Random(spec.V, stage.seq_len)
    parts = StageRun(stage, task, corpus, run, world)
    first = parts.resume() if job.get("resume") else 0
    task.train()
    losses, norms, times = [], [], []
    on_gpu = world.device.type == "cuda"
    for step in range(first, job["steps"]):
        began = time.perf_counter()
        loss, _ = parts.gradients(parts.samples(step))
        _, norm = parts.update(step)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        losses.append(loss)
        norms.append(norm)
        if world.first:
            print(f"STEP {step + 1} {loss!r}", flush=True)
        if stage.save_every and (step + 1) % stage.save_every == 0:
            parts.save(step + 1)
    parts.checkpoints.finish()
    steady = sorted(times[min(5, len(times) // 2):])
    told = ("check", "kind", "shape", "layers", "precision", "arch", "micro", "seq_len")
    result: dict[str, Any] = {key: job[key] for key in told}
    result |= {"processes": world.size, "device": name, "layout": way.layout, "teacher": way.teacher, "losses": losses[:20],
               "norms": norms[:20], "first": first, "step_s": steady[len(steady) // 2]}
    result["tok_s_per_gpu"] = stage.tokens_per_step / result["step_s"] / world.size
    if on_gpu:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    if gpu is not None:
        plan = costs.plan_stage(stage, spec, student, way, world.size, gpu, job["precision"])
        result |= {"planned_gib": plan.peak_gib, "planned_step_s": plan.seconds / plan.steps}
        result["mfu"] = plan.flops_per_token * result["tok_s_per_gpu"] / gpu.flops
    if job.get("communication"):
        result["communication"] = communication_share(parts, job["steps"], on_gpu)
    world.barrier()
    if world.first:
        print("RESULT " + json.dumps(result), flush=True)
    if isinstance(world, World):
        world.leave()


def communication_share(parts: Any, step: int, on_gpu: bool) -> dict[str, float]:
    """Of two steps under the profiler: time in collectives' kernels, and the part of it in which nothing else ran."""
    if not on_gpu:
        return {}
    import torch
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for more in range(2):
            parts.gradients(parts.samples(step + more))
            parts.update(step + more)
        torch.cuda.synchronize()
    spans = [(e.time_range.start, e.time_range.end, "nccl" in e.name.lower()) for e in found.events()]
    busy = union([(a, b) for a, b, nccl in spans if not nccl])
    collective = union([(a, b) for a, b, nccl in spans if nccl])
    both = union([(a, b) for a, b, _ in spans])
    whole = max(b for _, b, _ in spans) - min(a for a, _, _ in spans)
    return {"collectives": collective / whole, "exposed": (both - busy) / whole, "idle": 1 - both / whole}


def union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(spans):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def start(job: dict[str, Any], processes: int) -> list[subprocess.Popen[str]]:
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
               "OMP_NUM_THREADS": 1, "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}}
        command = [sys.executable, __file__, "--worker", json.dumps(job)]
        out = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        err = open(Path(job["folder"]) / f"err{rank}.txt", "w")
        started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err, text=True))
    return started


def measure(job: dict[str, Any], processes: int, limit: float = 400) -> dict[str, Any]:
    """The result of one job on `processes` GPUs; its last words where it failed."""
    Path(job["folder"]).mkdir(parents=True, exist_ok=True)
    started = start(job, processes)
    try:
        out, _ = started[0].communicate(timeout=limit)
        for process in started[1:]:
            process.wait(60)
    except subprocess.TimeoutExpired:
        out = ""
    finally:
        for process in started:
            process.kill()
    lines = [line for line in (out or "").splitlines() if line.startswith("RESULT ")]
    if lines:
        return dict(json.loads(lines[-1][7:]))
    words = [(Path(job["folder"]) / f"err{rank}.txt").read_text().strip().splitlines()[-3:] for rank in range(processes)]
    return {"check": job["check"], "kind": job["kind"], "processes": processes, "failed": words}


def killed(job: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """kill -9 of the last process at a step and in a save; then resume on all and on one; losses against an uninterrupted run."""
    whole = measure({**job, "folder": job["folder"] + "/whole"}, processes)
    results: list[dict[str, Any]] = []
    own = {**job, "folder": job["folder"] + "/killed", "resume": True}
    Path(own["folder"]).mkdir(parents=True, exist_ok=True)
    for moment in ("step", "save"):
        started = start(own, processes)
        assert started[0].stdout is not None
        for line in started[0].stdout:
            # A step is printed before the save that follows it.
            if line.startswith("STEP ") and int(line.split()[1]) >= job["save_every"] * 2 - (moment == "step"):
                break
        started[-1].kill()
        began = time.perf_counter()
        try:
            started[0].communicate(timeout=90)
        except subprocess.TimeoutExpired:
            pass
        waited = time.perf_counter() - began
        for process in started:
            process.kill()
        words = (Path(own["folder"]) / "err0.txt").read_text().strip().splitlines()
        results.append({"check": "kill", "moment": moment, "other_ended_after_s": waited, "message": words[-1] if words else ""})
    import shutil
    shutil.copytree(own["folder"], own["folder"] + "-1")
    for count, folder in ((processes, own["folder"]), (1, own["folder"] + "-1")):
        found = measure({**own, "folder": folder}, count)
        if "failed" in found or "failed" in whole:
            results.append(found)
            continue
        error = difference(whole["losses"][found["first"]:], found["losses"])
        results.append({"check": "kill", "resumed_on": count, "from_step": found["first"], "largest_relative_difference": error})
    return results


def difference(wanted: list[float], found: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--gpus", type=int, default=2)
    args.add_argument("--checks", default="equal,scale,whole,kill,sequence")
    args.add_argument("--steps", type=int, default=20)
    args.add_argument("--shape", default="qwen2.5-7b")
    args.add_argument("--arch", default="rwkv7")
    args.add_argument("--layers", type=int, default=4)
    args.add_argument("--cpu", action="store_true")
    args.add_argument("--set", action="append", default=[], help="a value of `parallel`: moments=int8")
    args.add_argument("--worker", help=argparse.SUPPRESS)
    given = args.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    N, cpu = given.gpus, given.cpu
    how = dict(item.split("=", 1) for item in given.set)
    place = tempfile.TemporaryDirectory(prefix="scale-")
    base: dict[str, Any] = {"arch": given.arch, "cpu": cpu, "shape": given.shape, "layers": given.layers, "steps": given.steps,
                            "precision": "float32" if cpu else "bfloat16", "parallel": how}
    T = {"align": (64, 2) if cpu else (512, 4), "distill": (64, 2) if cpu else (512, 12)}
    results: list[dict[str, Any]] = []

    def add(found: dict[str, Any]) -> dict[str, Any]:
        results.append(found)
        print(json.dumps(found), flush=True)
        return found

    for check in given.checks.split(","):
        folder = f"{place.name}/{check}"
        for kind, (length, micro) in T.items():
            job = {**base, "check": check, "kind": kind, "seq_len": length, "micro": micro, "folder": f"{folder}-{kind}"}
            if check == "equal":
                for shape, layers in (("smollm2-135m", None), (given.shape, given.layers)):
                    exact = {**job, "shape": shape, "layers": layers, "precision": "float32", "exact": True, "steps": 3,
                             "micro": 2, "batch": 2 * N}
                    one, many = (add(measure({**exact, "folder": f"{folder}-{shape}-{kind}-{n}"}, n)) for n in (1, N))
                    if "failed" not in one and "failed" not in many:
                        add({"check": "equal", "kind": kind, "shape": shape, "losses": difference(one["losses"], many["losses"]),
                             "norms": difference(one["norms"], many["norms"])})
            elif check == "scale":
                one, many = (add(measure({**job, "batch": micro * n, "communication": True, "folder": f"{folder}-{kind}-{n}"}, n))
                             for n in (1, N))
                if "failed" not in one and "failed" not in many:
                    add({"check": "scale", "kind": kind, "times": N * many["tok_s_per_gpu"] / one["tok_s_per_gpu"], "of": N})
            elif check == "whole":
                add(measure({**job, "layers": None, "batch": micro * N, "communication": True}, N))
            elif check == "kill" and kind == "distill":
                own = {**job, "shape": "smollm2-135m", "layers": None, "batch": 2 * N, "micro": 2, "steps": 12, "save_every": 4}
                for precision in ("float32",) if cpu else ("float32", "bfloat16"):
                    for found in killed({**own, "exact": True, "precision": precision, "folder": folder + precision}, N):
                        add({**found, "precision": precision})
            elif check == "sequence" and kind == "distill":
                long = {**job, "kind": "lm", "seq_len": 256 if cpu else 65536, "micro": 1, "batch": 1, "steps": 3, "exact": True}
                one = add(measure({**long, "folder": folder + "-1", "parallel": {**how, "recompute": "always"}}, 1))
                split = {**how, "recompute": "always", "sequence": {"lm": N}}
                many = add(measure({**long, "folder": folder + "-n", "parallel": split}, N))
                if "failed" not in one and "failed" not in many:
                    error = difference(one["losses"], many["losses"])
                    add({"check": "sequence", "losses": error, "times": one["step_s"] / many["step_s"], "of": N})
    print("\ncheck     kind     n  layers  tok/s/GPU     MFU  peak GiB  planned  step s  planned  what")
    for r in results:
        layers, mfu = r.get("layers") or "all", r.get("mfu")
        cells = [f"{r.get(key, float('nan')):8.2f}" for key in ("peak_gib", "planned_gib", "step_s", "planned_step_s")]
        rest = {key: value for key, value in r.items() if (key in (
            "times", "losses", "norms", "failed", "message", "moment", "resumed_on", "largest_relative_difference",
            "other_ended_after_s", "communication") and not isinstance(value, list)) or key == "failed"}
        print(f"{r['check']:9} {r.get('kind', ''):8} {r.get('processes', '')!s:2} {layers!s:6} {r.get('tok_s_per_gpu', 0):10.0f} "
              f"{'' if mfu is None else f'{mfu:.1%}':>7} {' '.join(cells)}  {rest or ''}")


if __name__ == "__main__":
    main()
