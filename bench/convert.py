"""Conversion at the size of the largest published model: memory under a limit, and speed against a plain copy.

    python bench/convert.py --sink              # 144 GB, sparse, into a hash; the process may have 2 GB of address space
    python bench/convert.py --disk 20           # 20 GB of random bits on the disk, converted and copied
    python bench/convert.py --pth 6             # a .pth beyond 4 GB, read back by torch.load

The sparse input takes no room on the disk; its one large tensor (the embedding) has 2.5 GB. Prints one JSON line a figure.
"""

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from radlads.families import write_config
from radlads.folder import INDEX, split
from radlads.spec import ModelSpec
from radlads.tensors import layout
from radlads.weights_tools.convert import convert
from radlads.weights_tools.formats import FORMATS, open_source
from radlads.weights_tools.formats.format import Writing

QWEN_72B: dict[str, Any] = {
    "family": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_layers": 80, "num_heads": 64, "num_kv_heads": 8,
    "head_dim": 128, "vocab_size": 152064, "rope_theta": 1e6, "qkv_bias": True,
}  # fmt: skip
LIMIT = 2 * 2**30
COPY_BYTES = 2**24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sink", action="store_true")
    parser.add_argument("--disk", type=float, metavar="GB")
    parser.add_argument("--pth", type=float, metavar="GB")
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder by default")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        sink(options.child)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        if options.sink:
            spec = ModelSpec(**QWEN_72B)
            make(Path(place) / "sparse", spec, filled=False)
            subprocess.run([sys.executable, __file__, "--child", f"{place}/sparse"], check=True)
        for size, work in ((options.disk, on_disk), (options.pth, beyond_4_gb)):
            if size:
                make(Path(place) / "real", of_size(size * 1e9), filled=True)
                work(Path(place))


def say(what: str, **figures: object) -> None:
    """One line of results."""
    print(json.dumps({"what": what, **figures}), flush=True)


def of_size(nbytes: float) -> ModelSpec:
    """The 72B with as many layers as fit."""
    one, rest = (2 * ModelSpec(**{**QWEN_72B, "num_layers": layers}).parameters() for layers in (2, 1))
    return ModelSpec(**{**QWEN_72B, "num_layers": max(1, 1 + int((nbytes - rest) / (one - rest)))})


def make(path: Path, spec: ModelSpec, filled: bool) -> None:
    """A folder in bf16: of holes, or of random bits (finite ones)."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(write_config(spec)))
    plan = {name: ("BF16", row.shape) for name, row in spec.tensors().items()}
    places: dict[str, str] = {}
    shards = list(split(plan))
    block = np.random.default_rng(0).integers(0, 2**16, 2**23, dtype=np.uint16) & 0xBFFF
    for number, part in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, _, size = layout(part, {})
        with open(path / name, "wb") as file:
            file.write(header)
            while filled and file.tell() < len(header) + size:
                file.write(block.tobytes()[: len(header) + size - file.tell()])
            file.truncate(len(header) + size)
        places |= dict.fromkeys(part, name)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def sink(path: Path) -> None:
    """Every output byte into a hash, in a process with 2 GB of address space."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    before = peak()
    source = open_source(path)
    began, done, digest = time.perf_counter(), 0, hashlib.sha256()
    for file in FORMATS["mlx"].plan(source, Writing(), "key").files:
        for segment in file.segments:
            for piece in segment.pieces({}):
                digest.update(piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).data)
                done += memoryview(piece).nbytes
    seconds = time.perf_counter() - began
    largest = max(tensor.nbytes for tensor in source.tensors.values())
    say(
        "sink",
        gb=done / 1e9,
        largest_tensor_gb=largest / 1e9,
        seconds=round(seconds, 1),
        gb_per_second=round(done / 1e9 / seconds, 3),
        mb_above_imports=round((peak() - before) / 1e6),
        sha256=digest.hexdigest(),
        load=os.getloadavg()[0],
    )


def peak() -> int:
    """Largest resident size so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def on_disk(place: Path) -> None:
    """Conversion and plain copy of the same folder, both synced, twice in turn; the better of each counts.

    Processor seconds tell what a busy machine makes of it: the conversion hashes what it reads and writes, in two more threads.
    """
    source, seconds, cpu = place / "real", {"convert": 1e9, "copy": 1e9}, {"convert": 1e9, "copy": 1e9}
    size = sum(path.stat().st_size for path in source.iterdir())
    for _ in range(2):
        for name, work in (("copy", copy), ("convert", lambda a, b: convert(a, b, "hf"))):
            began, used = time.perf_counter(), time.process_time()
            work(source, place / name)
            seconds[name] = min(seconds[name], time.perf_counter() - began)
            cpu[name] = min(cpu[name], time.process_time() - used)
            shutil.rmtree(place / name)
    say(
        "disk",
        gb=size / 1e9,
        copy_seconds=round(seconds["copy"], 1),
        convert_seconds=round(seconds["convert"], 1),
        copy_cpu=round(cpu["copy"], 1),
        convert_cpu=round(cpu["convert"], 1),
        share_of_copy=round(seconds["copy"] / seconds["convert"], 2),
        load=os.getloadavg()[0],
    )


def copy(source: Path, target: Path) -> None:
    """Plain reads and writes, and a sync of each file."""
    target.mkdir()
    for path in source.iterdir():
        with open(path, "rb", buffering=0) as a, open(target / path.name, "wb", buffering=0) as b:
            for data in chunks(a):
                b.write(data)
            os.fsync(b.fileno())


def chunks(file: Any) -> Iterator[bytes]:
    """The file in pieces."""
    while data := file.read(COPY_BYTES):
        yield data


def beyond_4_gb(place: Path) -> None:
    """A .pth whose records lie beyond the fields of 32 bits, loaded by torch and converted back."""
    import torch

    convert(place / "real", place / "model.pth", "pth")
    state = torch.load(place / "model.pth", weights_only=True, mmap=True)
    source = open_source(place / "real")
    for name, tensor in source.tensors.items():
        ours, theirs = next(tensor.pieces()), state[name].view(torch.int16).numpy()[: len(next(tensor.pieces()))]
        if ours.tobytes() != theirs.tobytes():
            raise SystemExit(f"{name} differs")
    say("pth", gb=(place / "model.pth").stat().st_size / 1e9, tensors=len(state))


if __name__ == "__main__":
    main()
