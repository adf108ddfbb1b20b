"""What our checkers accept, other readers must read identically: `python -m tests.hostile.compare --count 100000`.

Mutants of sound files go through our checker; those that it accepts are read by safetensors, MLX, torch and gguf-py too. Runs as
a program of its own, for a reader that crashes or hangs is a finding as well. Prints one JSON line a format.
"""

import argparse
import io
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import safetensors
import torch

from radlads.errors import RadladsError
from radlads.tensors import DTYPES, read_header, read_raw
from radlads.weights_tools.formats import pth_pickle
from radlads.weights_tools.formats.gguf_file import read_gguf
from tests.hostile import gguf_cases, pth_cases
from tests.hostile.checkers import CHECKERS
from tests.hostile.mutate import mutated
from tests.hostile.safetensors_cases import mutants

Told = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> dtype or type, shape, bytes

TORCH = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64"}
TORCH |= {torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
MLX = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.int64: "I64", mx.int32: "I32", mx.int16: "I16"}
MLX |= {mx.int8: "I8", mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32", mx.uint64: "U64", mx.bool_: "BOOL"}


def same_bits(dtype: str, data: bytes) -> bytes:
    """Booleans as 0 and 1, for readers keep or mend other bytes as they like; all else as it is."""
    return bytes(byte != 0 for byte in data) if dtype == "BOOL" else data


def by_mlx(path: Path) -> Told:
    """What mx.load reads, with the bits of each array."""
    told = {}
    for name, array in mx.load(str(path)).items():
        bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 and array.size else array
        data = np.array(bits.astype(mx.uint8) if array.dtype == mx.bool_ else bits).tobytes() if array.size else b""
        told[name] = (MLX[array.dtype], tuple(array.shape), data)
    return told


def by_torch(tensors: dict[str, torch.Tensor]) -> Told:
    """The tensors that torch made, with their bits."""
    told = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        told[name] = (TORCH[tensor.dtype], tuple(tensor.shape), data)
    return told


def compare_safetensors(path: Path) -> bool:
    """Our reading of an accepted file against the reference library's and MLX's; False if we refuse it."""
    try:
        entries = read_header(path)
    except RadladsError:
        return False
    ours: Told = {name: (entry.dtype, entry.shape, read_raw(entry).tobytes()) for name, entry in entries.items()}
    theirs = safetensors.deserialize(path.read_bytes())
    check(ours, {name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in theirs})
    if not any(dtype == "F64" for dtype, _, _ in ours.values()):  # MLX has none
        check(ours, by_mlx(path))
    return True


def compare_gguf(path: Path) -> bool:
    """Our reading of an accepted file against gguf-py's, and MLX's where it does not convert."""
    try:
        header = read_gguf(path)
    except RadladsError:
        return False
    data = path.read_bytes()
    ours: Told = {
        entry.name: (entry.type, entry.shape, data[entry.offset : entry.offset + entry.nbytes])
        for entry in header.tensors.values()
    }
    reader = gguf.GGUFReader(path)
    theirs = {
        tensor.name: (tensor.tensor_type.name, tuple(map(int, reversed(tensor.shape))), tensor.data.tobytes())
        for tensor in reader.tensors
    }
    check(ours, theirs)
    for key, value in header.metadata.items():
        found = reader.fields[key].contents() if value != [] else []
        assert found == value or (value != value and found != found), f"{key}: {value!r:.100} and {found!r:.100}"
    if all(kind in ("F32", "F16", "I8", "I16", "I32") for kind, _, _ in ours.values()):
        check(ours, by_mlx(path))
    return True


def compare_pth(path: Path) -> bool:
    """Our reading of an accepted file against torch.load's."""
    data = path.read_bytes()
    answer = pth_pickle.answer(io.BytesIO(data))
    if "tensors" not in answer:
        return False
    ours: Told = {name: (dtype, tuple(shape), data[start:stop]) for name, dtype, shape, start, stop in answer["tensors"]}
    theirs: Any = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    nests = [key for key in pth_pickle.NESTS if isinstance(theirs.get(key), dict)]
    check(ours, by_torch(theirs[nests[0]] if len(nests) == 1 else theirs))
    return True


def check(ours: Told, theirs: Told) -> None:
    """AssertionError unless both tell the same of every tensor."""
    assert ours.keys() == theirs.keys(), f"names {sorted(ours)} and {sorted(theirs)}"
    for name, (dtype, shape, data) in ours.items():
        other = theirs[name]
        assert (dtype, shape) == other[:2], f"{name!r}: {dtype} {shape} and {other[:2]}"
        assert same_bits(dtype, data) == same_bits(dtype, other[2]), f"{name!r}: other bytes"
        if dtype in DTYPES:
            assert len(data) == math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize


def gguf_mutants(rng: random.Random) -> bytes:
    """A sound file with few changes."""
    return mutated(rng, rng.choice(gguf_cases.SEEDS), gguf_cases.SEEDS, CHECKERS["gguf"].words)


def pth_mutants(rng: random.Random) -> bytes:
    """A sound archive whose pickle or whose bytes have few changes."""
    if rng.random() < 0.5:
        words = CHECKERS["pth"].words
        return pth_cases.saved(mutated(rng, pth_cases.table(), [pth_cases.table()], words), **{"data/1": pth_cases.FLOATS})
    return mutated(rng, rng.choice(pth_cases.SEEDS), pth_cases.SEEDS, CHECKERS["pth"].words)


def run(name: str, count: int, seed: int, path: Path) -> dict[str, Any]:
    """Compare `count` mutants of a format; counts, and the first findings."""
    rng, start = random.Random(seed), time.process_time()
    compare: Callable[[Path], bool] = {"safetensors": compare_safetensors, "gguf": compare_gguf, "pth": compare_pth}[name]
    makers: dict[str, Callable[[], bytes]] = {"gguf": lambda: gguf_mutants(rng), "pth": lambda: pth_mutants(rng)}
    files = mutants(seed, count) if name == "safetensors" else (makers[name]() for _ in range(count))
    accepted, findings = 0, []
    for data in files:
        path.write_bytes(data)
        try:
            accepted += compare(path)
        except Exception as error:
            findings.append(f"{type(error).__name__}: {error}: {data[:400].hex()}")
    seconds = round(time.process_time() - start, 1)
    return {"format": name, "mutants": count, "accepted": accepted, "seconds": seconds, "findings": findings[:20]}


def main() -> int:
    """Compare the named formats in turn."""
    parser = argparse.ArgumentParser(description="What our checkers accept, other readers must read identically.")
    parser.add_argument("names", nargs="*", default=["safetensors", "gguf", "pth"], metavar="FORMAT")
    parser.add_argument("--count", type=int, default=10_000, help="mutants of each format (default 10,000)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sound = True
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for name in options.names:
            suffix = {"safetensors": ".safetensors", "gguf": ".gguf", "pth": ".pth"}[name]
            result = run(name, options.count, options.seed, Path(folder) / f"x{suffix}")
            sound &= not result["findings"]
            print(json.dumps(result), flush=True)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
