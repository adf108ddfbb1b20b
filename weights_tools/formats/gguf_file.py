"""The strict reader of GGUF headers: metadata and where each tensor lies. Nothing is trusted, no tensor is read.

Stricter than gguf-py, gguflib (in MLX) and llama.cpp wherever they are known to disagree. What the tensors mean is `gguf`'s
affair.
"""

import math
import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from radlads.errors import fail
from radlads.files import open_regular, reason
from radlads.tensors import AGAIN, check_impostor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
HEADER_LIMIT = 2**27  # bytes of metadata and tensor list; the largest vocabularies take a sixth of it
ITEM_LIMIT = 2**21  # values in all arrays together
KEY_LIMIT = 65_536
TENSOR_LIMIT = 65_536
STRING_LIMIT = 2**24
NAME_LIMIT = 63  # bytes of a tensor's name; ggml holds 64 with the closing NUL
RANK_LIMIT = 4
ALIGNMENTS = tuple(2**power for power in range(3, 17))
DEFAULT_ALIGNMENT = 32

# Code of a metadata value -> its layout; 8 is a string and 9 an array.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
UINT32, BOOL, STRING, ARRAY = 4, 7, 8, 9

# Code of a tensor type -> (name, values in a block, bytes of a block). Q8_1 and Q8_K live in ggml's memory only, and readers
# disagree about their size.
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 28: ("F64", 1, 8),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """One stored tensor: its type as ggml spells it ("F32", "Q4_K", ...), its shape in numpy's order (rows first, the reverse
    of the file's), and its `nbytes` bytes from `offset` of the file on."""

    path: Path
    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """Header of a GGUF file: metadata (numbers, booleans, texts, lists of these) by key, tensors by name in file order."""

    metadata: dict[str, object]
    tensors: dict[str, GgufEntry]


def read_gguf(path: Path | str) -> GgufFile:
    """The checked header of a GGUF file of version 2 or 3; R201 unreadable, R202 any broken rule of the format."""
    path = Path(path)
    with open_regular(path) as file:
        try:
            return parse_gguf(path, file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            raise fail("R202", where=path, why=str(error), fix=AGAIN) from None
        except OSError as error:
            raise fail("R201", where=path, why=reason(error), fix="Check the disk") from None


def parse_gguf(path: Path, file: BufferedReader, size: int) -> GgufFile:
    """The header at the start of `file`, which has `size` bytes; ValueError names the broken rule."""
    start = file.read(4)
    if start != MAGIC:
        check_impostor(path, start + file.read(28))
        raise ValueError("it does not begin with 'GGUF'")
    source = Source(file, size, position=4)
    version = source.number("<I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        why = "it is a big-endian file" if swapped in VERSIONS else f"its version is {version}"
        raise ValueError(f"{why}; little-endian files of version 2 and 3 are read")
    tensor_count, key_count = source.number("<Q"), source.number("<Q")
    # The least that a tensor and a key take bounds both counts by the size of the file, before anything is made of them.
    if tensor_count > TENSOR_LIMIT or key_count > KEY_LIMIT or tensor_count * 32 + key_count * 13 > source.left:
        raise ValueError(f"{tensor_count:,} tensors and {key_count:,} keys are promised, which the file cannot hold")
    metadata: dict[str, object] = {}
    codes: dict[str, int] = {}
    for _ in range(key_count):
        key = source.text("a key")
        if not key or not key.isprintable() or len(key) > 512:
            raise ValueError(f"the key {key[:80]!r} is empty, not printable or longer than 512 characters")
        if key in metadata:
            raise ValueError(f"the key {key} stands twice")
        codes[key] = source.number("<I")
        metadata[key] = source.value(codes[key], key)
    check_whole(metadata)
    alignment = read_alignment(metadata, codes)
    found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name, row = read_row(source)
        if name in found:
            raise ValueError(f"the tensor {name} stands twice")
        found[name] = row
    origin = aligned(source.position, alignment)
    check_spans(found, origin, alignment, size)
    tensors = {
        name: GgufEntry(path, name, kind, shape, origin + offset, nbytes) for name, (kind, shape, offset, nbytes) in found.items()
    }
    return GgufFile(metadata, tensors)


class Source:
    """The file as a run of values, none of which may end behind the file or make the header larger than is sane."""

    def __init__(self, file: BufferedReader, size: int, position: int) -> None:
        self.file, self.limit, self.position, self.items = file, min(size, HEADER_LIMIT), position, 0

    @property
    def left(self) -> int:
        """Bytes that the header may still take."""
        return self.limit - self.position

    def take(self, count: int) -> bytes:
        """The next `count` bytes; checked before they are read."""
        if count > self.left:
            raise ValueError(f"the header ends behind the file or {HEADER_LIMIT:,} bytes: {count:,} bytes at {self.position:,}")
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("the file became shorter while it was read")
        self.position += count
        return data

    def number(self, layout: str) -> int:
        """One whole number."""
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return value

    def text(self, what: str) -> str:
        """A length and that many bytes of UTF-8."""
        length = self.number("<Q")
        if length > STRING_LIMIT:
            raise ValueError(f"{what} has {length:,} bytes; at most {STRING_LIMIT:,} are read")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is no UTF-8 text") from None

    def value(self, code: int, key: str) -> object:
        """A metadata value of the type `code`."""
        if code == STRING:
            return self.text(f"the value of {key}")
        if code == ARRAY:
            code = self.number("<I")
            if code == ARRAY:
                raise ValueError(f"the key {key} holds an array of arrays, which no model has")
            return self.array(code, self.number("<Q"), key)
        return self.numbers(code, 1, key)[0]

    def array(self, code: int, count: int, key: str) -> list[object]:
        """`count` values of the type `code`."""
        self.items += count
        if self.items > ITEM_LIMIT:
            raise ValueError(f"the key {key} has {count:,} values; all together may have {ITEM_LIMIT:,}")
        if code != STRING:
            return self.numbers(code, count, key)
        if count * 8 > self.left:  # each has a length of 8 bytes at least
            raise ValueError(f"the key {key} promises {count:,} texts, more than the file holds")
        what = f"a value of {key}"
        return [self.text(what) for _ in range(count)]

    def numbers(self, code: int, count: int, key: str) -> list[object]:
        """`count` numbers or booleans."""
        if code not in SCALARS:
            raise ValueError(f"the key {key} has the unknown type {code}")
        layout = struct.Struct(SCALARS[code])
        data = self.take(count * layout.size)
        if code == BOOL and data.strip(b"\0\1"):
            raise ValueError(f"the key {key} holds a boolean that is neither 0 nor 1")
        return [value for (value,) in layout.iter_unpack(data)]


def check_whole(metadata: dict[str, object]) -> None:
    """ValueError for one part of a split model: its tensors are not all here."""
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise ValueError(f"it is one of {parts} parts of a split model; join them first with `llama-gguf-split --merge`")


def read_alignment(metadata: dict[str, object], codes: dict[str, int]) -> int:
    """The alignment of tensor data; ValueError unless it is a uint32 and a power of two from 8 to 65,536."""
    if "general.alignment" not in metadata:
        return DEFAULT_ALIGNMENT
    alignment = metadata["general.alignment"]
    if codes["general.alignment"] != UINT32 or alignment not in ALIGNMENTS:
        raise ValueError("general.alignment is no uint32 that is a power of two from 8 to 65,536")
    assert isinstance(alignment, int)
    return alignment


def read_row(source: Source) -> tuple[str, tuple[str, tuple[int, ...], int, int]]:
    """Name and (type, shape, offset in the data, bytes) of the next tensor."""
    name = source.text("a tensor's name")
    if not name or not name.isprintable() or len(name.encode()) > NAME_LIMIT:
        raise ValueError(f"the tensor name {name[:80]!r} is empty, not printable or longer than {NAME_LIMIT} bytes")
    rank = source.number("<I")
    if not 1 <= rank <= RANK_LIMIT:
        raise ValueError(f"tensor {name} has {rank:,} dimensions; 1 to {RANK_LIMIT} are possible")
    sizes = [source.number("<Q") for _ in range(rank)]
    code, offset = source.number("<I"), source.number("<Q")
    if code not in TYPES:
        raise ValueError(f"tensor {name} has the unknown type {code}")
    kind, block, width = TYPES[code]
    total = math.prod(sizes)
    if not 0 < total < 2**60:
        raise ValueError(f"tensor {name}: the shape {sizes[::-1]} is empty or overflows")
    if sizes[0] % block:
        raise ValueError(f"tensor {name}: rows of {sizes[0]} values are no whole number of {kind} blocks of {block}")
    return name, (kind, tuple(reversed(sizes)), offset, total // block * width)


def check_spans(rows: dict[str, tuple[str, tuple[int, ...], int, int]], origin: int, alignment: int, size: int) -> None:
    """ValueError unless the tensors follow one another, each aligned, up to the end of the file."""
    end = stop = 0
    for name, (_, _, offset, nbytes) in rows.items():
        if offset != end:
            raise ValueError(f"tensor {name} begins at {offset:,} of the data, where {end:,} is the next aligned place")
        stop = offset + nbytes
        end = aligned(stop, alignment)
    if origin + stop > size and rows:
        raise ValueError(f"the file is cut: {origin + stop:,} bytes are promised and {size:,} are there")
    if size > origin + end:
        raise ValueError(f"{size - origin - end:,} bytes follow the last tensor")


def aligned(position: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-position // alignment) * alignment
