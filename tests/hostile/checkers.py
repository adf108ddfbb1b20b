"""The header checkers as functions of bytes: what each accepts must keep its promises, what it refuses is a RadladsError.

Any other exception, and any broken promise, is a finding.
"""

import io
import json
import math
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from radlads import files, tensors
from radlads.errors import RadladsError
from radlads.tensors import DTYPES, INDEX, is_plain_name, parse_header, read_index
from radlads.weights_tools.formats import gguf_file, pth_pickle
from radlads.weights_tools.formats.gguf_file import TYPES, parse_gguf
from tests.hostile import gguf_cases, pth_cases, safetensors_cases

NOWHERE = Path("x")


@dataclass(frozen=True)
class Checker:
    """A checker under test: `check` is True for accepted, False for refused, and raises for a finding.

    `modules` are the files whose lines guide the search; `repair` mends what a blind change nearly always breaks.
    """

    check: Callable[[bytes], bool]
    seeds: list[bytes]
    words: list[bytes]
    modules: tuple[str, ...]
    repair: Callable[[Random, bytes], bytes] = lambda rng, data: data


def check_safetensors(data: bytes) -> bool:
    """Accepted tensors tile the file."""
    source = io.BytesIO(data)
    try:
        entries = parse_header(NOWHERE, source.read(8), source.read, len(data))
    except (ValueError, RadladsError):
        return False
    (length,) = struct.unpack("<Q", data[:8])
    end = 8 + length
    for entry in entries.values():
        assert entry.start == end, entry
        assert entry.nbytes == math.prod(entry.shape) * np.dtype(DTYPES[entry.dtype]).itemsize, entry
        end = entry.stop
    assert end == len(data)
    return True


def check_gguf(data: bytes) -> bool:
    """Accepted tensors lie in the file one after the other."""
    try:
        header = parse_gguf(NOWHERE, io.BytesIO(data), len(data))  # type: ignore[arg-type]
    except (ValueError, RadladsError):
        return False
    sizes = {name: (block, width) for name, block, width in TYPES.values()}
    end = 0
    for entry in header.tensors.values():
        block, width = sizes[entry.type]
        assert end <= entry.offset and entry.offset + entry.nbytes <= len(data), entry
        assert entry.nbytes == math.prod(entry.shape) // block * width > 0 and entry.shape[-1] % block == 0, entry
        end = entry.offset + entry.nbytes
    return True


def check_pth(data: bytes) -> bool:
    """Accepted tensors lie in the file. Data that begin with "." are the pickle alone, in a sound archive."""
    data = pth_cases.saved(data[1:]) if data[:1] == b"." else data
    try:
        rows = pth_pickle.tensors_of(io.BytesIO(data), len(data))
    except ValueError:  # `Refused` is one; the rest comes from pickletools and is caught by `main`
        return False
    for _, dtype, shape, start, stop in rows:
        assert 0 <= start <= stop <= len(data) and stop - start == math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
    return True


def index_checker() -> Callable[[bytes], bool]:
    """A checker of index files; they are read from the disk."""
    folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    path = Path(folder.name) / INDEX

    def check(data: bytes) -> bool:
        """Accepted shard names can lie nowhere but in the folder."""
        assert folder
        path.write_bytes(data)
        try:
            places, _ = read_index(path)
        except RadladsError as error:
            assert error.code == "R203", error
            return False
        assert all(is_plain_name(name) and name.endswith(".safetensors") for name in places.values())
        return True

    return check


def mend_length(rng: Random, data: bytes) -> bytes:
    """A safetensors file whose length of the header is right again, most of the time."""
    end = data.rfind(b"}") + 1
    return struct.pack("<Q", end - 8) + data[8:] if end > 8 and rng.random() < 0.8 else data


JSON_WORDS = [*safetensors_cases.NUMBERS, *safetensors_cases.WORDS, *safetensors_cases.BYTES]
GGUF_WORDS = [struct.pack("<I", code) for code in (*range(14), 16, 30, 32, 64)]
GGUF_WORDS += [b"general.alignment", b"split.count", gguf_cases.ZEROS]
PTH_WORDS = [bytes([code]) for code in b"(.0q}])tRQbsuhcX\x85\x86\x87\x88\x89\x8aKMJN\x93\x94\x8c"] + [
    *(b"ctorch\n" + name.encode() + b"\n" for name in pth_pickle.STORAGES),
    *(pth_cases.tensor(), pth_cases.place(), pth_cases.numbers((2, 2)), pth_cases.number(2**40), pth_cases.word("a")),
    *(b"ccollections\nOrderedDict\n)R", b"ctorch._utils\n_rebuild_parameter\n"),
    *(b"PK\1\2", b"PK\3\4", b"PK\5\6", b"PK\6\6", b"PK\6\7"),
]  # fmt: skip
INDEX_SEEDS = [
    json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode(),
    b'{"weight_map":{"a":"m.safetensors"}}',
]
INDEX_WORDS = [b'"weight_map"', b'"../x.safetensors"', b'"/x.safetensors"', b'"\\u0000.safetensors"', *JSON_WORDS]
OWN = (tensors.__file__, files.__file__)

CHECKERS = {
    "safetensors": Checker(check_safetensors, safetensors_cases.SEEDS, JSON_WORDS, OWN, mend_length),
    "gguf": Checker(check_gguf, gguf_cases.SEEDS, GGUF_WORDS, (gguf_file.__file__,)),
    "pth": Checker(
        check_pth,
        [*pth_cases.SEEDS, b"." + pth_cases.table(), b"." + pth_cases.table() + b"q\0h\0"],
        PTH_WORDS,
        (pth_pickle.__file__,),
    ),
    "index": Checker(index_checker(), INDEX_SEEDS, INDEX_WORDS, OWN),
}
