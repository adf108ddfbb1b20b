"""The token files of RWKV and Megatron, PREFIX.idx and PREFIX.bin (protocol section 1.8)."""

import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from radlads.data.documents import Piece, bad

MAGIC = b"MMIDIDX\x00\x00"
# Codes of the types that hold tokens; 6 and 7 are floats.
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_binidx(index: Path, progress: Callable[[int], None]) -> Iterator[Piece]:
    """The token sequences of a binidx pair, each one document. Raises R301 for anything that does not fit together."""
    try:
        data = index.read_bytes()
        packed = index.with_suffix(".bin")
        size = packed.stat().st_size
    except OSError as error:
        raise bad(index, str(error.strerror), "Put the .idx and the .bin file side by side") from None
    if data[:9] != MAGIC or len(data) < 34:
        raise bad(index, "it is no index of a token file (MMIDIDX)", "Give the .idx file")
    version, code, sequences, documents = struct.unpack_from("<QBQQ", data, 9)
    if version != 1 or code not in DTYPES:
        raise bad(index, f"version {version} with type {code} is not known", "Write it again as version 1 with integers")
    if len(data) != 34 + 12 * sequences + 8 * documents:
        raise bad(index, f"its size does not fit {sequences} sequences and {documents} documents", "Get the file again")
    dtype = np.dtype(DTYPES[code])
    sizes = np.frombuffer(data, "<i4", sequences, 34).astype(np.int64)
    pointers = np.frombuffer(data, "<i8", sequences, 34 + 4 * sequences)
    if (sizes < 0).any() or sizes.sum() * dtype.itemsize != size:
        raise bad(packed, f"its {size} bytes are not the {sizes.sum()} tokens of the index", "Get both files again")
    if not np.array_equal(pointers, (np.cumsum(sizes) - sizes) * dtype.itemsize):
        raise bad(index, "its sequences do not follow each other in the .bin file", "Write the file again, in order")
    tokens = np.memmap(packed, dtype, "r") if size else np.zeros(0, dtype)
    place = 0
    for number, count in enumerate(sizes.tolist(), 1):
        yield Piece(np.asarray(tokens[place : place + count]), True, f"{index}: sequence {number}")
        place += count
        progress(place * dtype.itemsize)


def write_binidx(index: Path, sequences: Iterable[npt.NDArray[np.integer]], vocab_size: int) -> None:
    """Write token sequences, each one document, as a binidx pair: two bytes a token where `vocab_size` allows it."""
    code = 8 if vocab_size <= 1 << 16 else 4
    dtype, sizes = np.dtype(DTYPES[code]), []
    with index.with_suffix(".bin").open("wb") as file:
        for sequence in sequences:
            file.write(np.ascontiguousarray(sequence, dtype).tobytes())
            sizes.append(len(sequence))
    lengths = np.array(sizes, "<i8")
    pointers = (np.cumsum(lengths) - lengths) * dtype.itemsize
    head = MAGIC + struct.pack("<QBQQ", 1, code, len(sizes), len(sizes) + 1)
    documents = np.arange(len(sizes) + 1, dtype="<i8")
    index.write_bytes(head + lengths.astype("<i4").tobytes() + pointers.tobytes() + documents.tobytes())
