"""An exported rwkv6qwen2 file in llama.cpp itself: greedy text and the probabilities of every token, against our own engine.

    python bench/llama_cpp.py                       # a small student with random mixers, the demo's embedding and tokenizer
    python bench/llama_cpp.py STUDENT --tokens 64   # a RAD-RWKV6 folder

llama.cpp comes from xllamacpp (PyPI, prebuilt for the CPU): in this environment, or in the one whose Python --peer names.
Prints one JSON line; exit status 1 where the texts differ or a probability is further off than --tolerance (of its logarithm).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from radlads.backends import open_engine
from radlads.demo import DEMO
from radlads.folder import open_folder, save_folder
from radlads.spec import ModelSpec
from radlads.tensors import encode, read_float32
from radlads.tokenizer import Tokenizer
from radlads.weights_tools.convert import convert
from radlads.weights_tools.formats.format import DTYPES, Writing
from radlads.weights_tools.surgery import make_student

PROMPT = "Once upon a time there was a man who lived by the river, and every morning"
PEER = """
import importlib.metadata, json, sys
import xllamacpp as llama
path, ids, count, width = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
params = llama.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, 2048, 1, False
params.cpuparams.n_threads = 1
server = llama.Server(params)
wish = {"prompt": ids, "max_tokens": count, "temperature": 0, "logprobs": width}
answer = server.handle_completions(wish)["choices"][0]
steps = answer["logprobs"]["content"]
rows = [{row["id"]: row["logprob"] for row in step["top_logprobs"]} for step in steps]
tokens = [step["id"] for step in steps]
version = importlib.metadata.version("xllamacpp")
print("ANSWER" + json.dumps({"version": version, "text": answer["text"], "tokens": tokens, "rows": rows}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, nargs="?")
    parser.add_argument("--peer", default=sys.executable, help="Python that has xllamacpp")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        student = options.student or random_student(Path(place))
        said: list[str] = []
        writing = Writing(dtype=DTYPES[options.dtype])
        convert(student, Path(place) / "student.gguf", "gguf", writing=writing, say=said.append)
        convert(student, Path(place) / "same", "hf", writing=writing)
        folder = open_folder(Path(place) / "same")
        ids = Tokenizer(folder.path).encode(PROMPT)
        ours, rows = greedy(folder, ids, options.tokens)
        theirs = peer(options.peer, Path(place) / "student.gguf", ids, len(ours), folder.spec.V)
    worst = max(
        abs(mine[int(token)] - value)
        for mine, row in zip(rows, theirs["rows"], strict=True)
        for token, value in row.items()
        if value > -40  # below that llama.cpp's float32 softmax has little left
    )
    equal = ours == theirs["tokens"]
    result = {
        "student": str(options.student or "random"),
        "dtype": options.dtype,
        "xllamacpp": theirs["version"],
        "prompt_tokens": len(ids),
        "tokens": len(ours),
        "distinct": len(set(ours)),
        "same_tokens": equal,
        "probabilities": sum(map(len, theirs["rows"])),
        "largest_gap_of_log_probability": worst,
        "notices": said,
        "text": theirs["text"],
    }
    print(json.dumps(result))
    return 0 if equal and worst <= options.tolerance else 1


def random_student(place: Path) -> Path:
    """A RAD-RWKV6 student of two heads whose every tensor counts; sizes, embedding and tokenizer are the demo's."""
    demo = open_folder(DEMO / "tiny-teacher")
    fields = {"family": "qwen2", "qk_norm": False, "qkv_bias": True, "rope_theta": 1e6}
    spec = replace(demo.spec, **fields)
    rng = np.random.default_rng(0)

    def values(name: str, shape: tuple[int, ...]) -> Any:
        if name in demo.weights:
            return read_float32(demo.weights[name])
        return rng.standard_normal(shape).astype(np.float32) * 0.3

    tensors = [(name, "F32", encode(values(name, row.shape), "F32")) for name, row in spec.tensors().items()]
    teacher = save_folder(place / "teacher", spec=spec, tensors=tensors, source=demo, dtype="F32", manifest={})
    made = make_student(teacher, place / "untrained", arch="rwkv6", options={})
    return scrambled(made.path, place / "student", made.spec, rng)


def scrambled(source: Path, target: Path, spec: ModelSpec, rng: np.random.Generator) -> Path:
    """The student with random additions to its new tensors, as training would make them."""
    folder = open_folder(source)

    def values(name: str) -> Any:
        read = read_float32(folder.weights[name])
        if spec.tensors()[name].init == "copy":
            return read
        # The decay's additions are small enough that no input reaches the clamp, which llama.cpp lacks.
        return read + rng.standard_normal(read.shape).astype(np.float32) * (0.03 if "decay" in name else 0.15)

    tensors = [(name, "F32", encode(values(name), "F32")) for name in spec.tensors()]
    save_folder(target, spec=spec, tensors=tensors, source=folder, dtype="F32", manifest=dict(folder.manifest or {}))
    return target


def greedy(folder: Any, ids: list[int], count: int) -> tuple[list[int], list[Any]]:
    """(tokens, log-probabilities of all tokens at each step) of our engine in float32."""
    engine = open_engine(folder, backend="torch", dtype="float32")
    logits, state = engine.feed(engine.start(), ids)
    tokens, rows = [], []
    ends = Tokenizer(folder.path).eos_ids
    while len(tokens) < count:
        wide = logits.astype(np.float64)
        rows.append(wide - wide.max() - np.log(np.exp(wide - wide.max()).sum()))
        tokens.append(int(logits.argmax()))
        if tokens[-1] in ends:
            break
        logits, state = engine.feed(state, tokens[-1:])
    return tokens, rows


def peer(python: str, path: Path, ids: list[int], count: int, width: int) -> dict[str, Any]:
    """What llama.cpp makes of the same tokens."""
    command = [python, "-c", PEER, str(path), json.dumps(ids), str(count), str(width)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("ANSWER"):
            answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER"))
            return answer
    raise SystemExit(f"llama.cpp failed:\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
