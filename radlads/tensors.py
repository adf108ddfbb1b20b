"""The only reader and writer of safetensors: a strict check of the header, then raw bits through a memory map.

Stricter than the reference library wherever readers are known to disagree. What the tensors mean is `folder`'s affair.
"""

import json
import logging
import math
import os
import shlex
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from radlads.errors import RadladsError, fail
from radlads.files import check_space, new_file, open_regular, parse_json, read_json

Raw = npt.NDArray[Any]
Named = tuple[str, str, Raw]  # name, dtype, raw bits
Planned = tuple[str, tuple[int, ...]]  # dtype, shape
Plan = Mapping[str, Planned]

# BF16 is held as its bits: numpy has no such type.
DTYPES = {
    "F32": "<f4", "BF16": "<u2", "F16": "<f2", "F64": "<f8", "BOOL": "|b1",
    "I8": "|i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "|u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
}  # fmt: skip
FLOATS = ("F32", "BF16", "F16")

HEADER_LIMIT = 100_000_000
TENSOR_LIMIT = 300_000  # more would pass the bounds of `parse_json`
INDEX_LIMIT = 2**25
RANK_LIMIT = 8
NAME_LIMIT = 512
BLOCK = 2**24  # bytes read or written at a time
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OTHER_SUFFIXES = (".gguf", ".pth", ".pt", ".bin")  # of weights that `radlads convert` reads and nothing else here does
AGAIN = "Get the file again from its source"
CONVERT = "Convert it first with `radlads convert`"

# First bytes of what is met under a weights file's name, and what to say about it.
IMPOSTORS = {
    b"version https://git-lfs": ("it is a Git LFS pointer, not the weights", "Fetch the weights with `git lfs pull`"),
    b"<!doctype": ("it is a web page, not weights", "Download the file itself"),
    b"<html": ("it is a web page, not weights", "Download the file itself"),
    b"pk\x03\x04": ("it is a ZIP archive, as PyTorch's pickle files are", CONVERT),
    b"\x80\x02": ("it is a pickle and is not loaded", "Use the safetensors form of the model"),
    b"\x80\x03": ("it is a pickle and is not loaded", "Use the safetensors form of the model"),
    b"\x80\x04": ("it is a pickle and is not loaded", "Use the safetensors form of the model"),
    b"\x80\x05": ("it is a pickle and is not loaded", "Use the safetensors form of the model"),
    b"gguf": ("it is a GGUF file", CONVERT),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One stored tensor: its dtype in safetensors' spelling, its shape, and its bytes [start, stop) in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


def read_header(path: Path | str) -> dict[str, Entry]:
    """Tensors of one safetensors file by name, in file order; R201 unreadable, R202 any broken rule of the format."""
    path = Path(path)
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            return parse_header(path, file.read(8), file.read, size)
        except ValueError as error:
            raise fail("R202", where=path, why=str(error), fix=AGAIN) from None
        except OSError as error:
            raise fail("R201", where=path, why=str(error), fix="Check the disk") from None


def parse_header(path: Path, start: bytes, read: Any, size: int) -> dict[str, Entry]:
    """The entries behind the first 8 bytes; ValueError names the broken rule."""
    if len(start) < 8:
        raise ValueError(f"the file has {len(start)} bytes, too few for a header")
    (length,) = struct.unpack("<Q", start)
    if length > min(HEADER_LIMIT, size - 8) or length < 2:
        check_impostor(path, start + read(24))
        if HEADER_LIMIT >= length > size - 8:
            raise ValueError(f"the file is cut: the header takes {length:,} bytes and {size - 8:,} follow")
        raise ValueError(f"the header length is {length:,}; 2 to {HEADER_LIMIT:,} are possible")
    data = read(length)
    if data[:1] != b"{":
        raise ValueError("the header does not begin with '{'")
    header = parse_json(data, parse_int=natural)
    del data
    check_metadata(header.pop("__metadata__", None))
    entries = [read_entry(name, fields, path, 8 + length) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    check_tiling(entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def check_impostor(path: Path, start: bytes) -> None:
    """R202 naming what the file really is, if its first bytes tell."""
    folded = start.lstrip().lower()
    for magic, (why, fix) in IMPOSTORS.items():
        if folded.startswith(magic):
            raise fail("R202", where=path, why=why, fix=fix)


def natural(text: str) -> int:
    """A number of the header: whole, not negative, below 2^64; "-0" is refused as the reference library does."""
    if text.startswith("-") or len(text) > 20 or int(text) >= 2**64:
        raise ValueError(f"{text[:40]} is no natural number below 2^64")
    return int(text)


def check_metadata(metadata: object) -> None:
    """ValueError unless it is a table from text to text (or null, as MLX writes)."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is no table from text to text")
    try:
        "".join((*metadata, *metadata.values())).encode()
    except UnicodeEncodeError:
        raise ValueError("__metadata__ holds half a surrogate pair") from None


def read_entry(name: str, fields: object, path: Path, origin: int) -> Entry:
    """One tensor of the header; `origin` is where the data begins. ValueError names the broken rule."""
    check_name(name)
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name}: dtype, shape and data_offsets are needed, and nothing else")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name}: {dtype_reason(dtype)}")
    for key, value in (("shape", shape), ("data_offsets", offsets)):
        # type() and not isinstance: true is an int in Python
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            raise ValueError(f"tensor {name}: {key} is no list of whole numbers")
    if len(shape) > RANK_LIMIT:
        raise ValueError(f"tensor {name}: {len(shape)} dimensions; at most {RANK_LIMIT} are supported")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name}: data_offsets {offsets[:3]} are no begin and end")
    # Empty dimensions are left out of the bound, so that no reader's product can wrap around on its way to zero.
    if math.prod(max(size, 1) for size in shape) >= 2**60:
        raise ValueError(f"tensor {name}: the shape {shape} overflows")
    needed, span = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize, offsets[1] - offsets[0]
    if needed != span:
        raise ValueError(f"tensor {name}: {dtype} of shape {shape} takes {needed} bytes and its span has {span}")
    return Entry(name, dtype, tuple(shape), path, origin + offsets[0], origin + offsets[1])


def check_name(name: str) -> None:
    """ValueError unless a tensor's name is printable and of 1 to 512 bytes."""
    if not name or not name.isprintable() or len(name.encode()) > NAME_LIMIT:
        raise ValueError(f"the tensor name {name[:80]!r} is empty, not printable or longer than {NAME_LIMIT} bytes")


def dtype_reason(dtype: object) -> str:
    """Why a dtype is refused."""
    if isinstance(dtype, str) and dtype.startswith(("F8_", "F6_", "F4")):
        return f"{dtype} is refused: its scales lie outside the tensor and readers lose the type; convert the model to BF16 first"
    return f"the dtype {str(dtype)[:40]!r} is unknown; known: {', '.join(DTYPES)}"


def check_tiling(entries: list[Entry], origin: int, size: int) -> None:
    """ValueError unless the sorted entries cover the data exactly: no overlap, no hole, no byte left over."""
    end = origin
    for entry in entries:
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise ValueError(f"tensor {entry.name} {fault}")
        end = entry.stop
    if end > size:
        raise ValueError(f"the file is cut: {end:,} bytes are promised and {size:,} are there")
    if end < size:
        raise ValueError(f"{size - end:,} bytes follow the last tensor")


def open_weights(folder: Path | str) -> dict[str, Entry]:
    """Tensors of a model folder, from one file or from the shards of an index; R201, R202 or R203."""
    folder = Path(folder)
    if (folder / INDEX).exists():
        return open_shards(folder)
    if not (folder / SINGLE).exists() and not (folder / SINGLE).is_symlink():
        raise no_weights(folder)
    entries = read_header(contained(folder, SINGLE))
    if not entries:
        raise fail("R203", where=folder / SINGLE, why="it holds no tensors", fix=AGAIN)
    return entries


def no_weights(folder: Path) -> RadladsError:
    """The error for a folder without safetensors; the conversion to do first where it holds a model of another format."""
    if other := other_weights(folder):
        return unconverted(folder, f"its weights are {other}")
    why = f"there is no {SINGLE} and no {INDEX}"
    return fail("R201", where=folder, why=why, fix="Give a model folder with safetensors weights")


def other_weights(folder: Path) -> str | None:
    """The file of another format in a folder without safetensors, None where there is none."""
    try:
        if (folder / SINGLE).exists() or (folder / INDEX).exists():
            return None
        return next((path.name for path in sorted(folder.iterdir()) if path.suffix in OTHER_SUFFIXES), None)
    except OSError:
        return None


def unconverted(path: Path, why: str) -> RadladsError:
    """R201 for a model that has to become a folder of safetensors before anything computes with it."""
    name = path.resolve().name if path.is_dir() else path.stem
    command = f"radlads convert {shlex.quote(str(path))} --to hf --output-dir {shlex.quote(f'{name}-hf')}"
    return fail("R201", where=path, why=f"{why}, and models run from safetensors", fix=f"Convert it: `{command}`")


def contained(folder: Path, name: str) -> Path:
    """Path of a file of the folder; R201 if a symbolic link leads out of it, other than into the hub cache's blobs."""
    path = folder / name
    if not path.is_symlink():
        return path
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else None
    if root in target.parents or target.parent == blobs:
        return path
    raise fail("R201", where=path, why="it is a link that leaves the model folder", fix="Replace it by the file itself")


def open_shards(folder: Path) -> dict[str, Entry]:
    """Tensors of an indexed set, in the index's order; the index and the shards must tell the same story."""
    places, total = read_index(contained(folder, INDEX))
    shards = sorted(set(places.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        why = f"{len(missing)} of {len(shards)} shards missing: {listed(missing)}"
        raise fail("R201", where=folder, why=why, fix="Download them")
    stray = sorted(path.name for path in folder.glob("model*.safetensors") if path.name not in shards)
    if stray:
        why = f"{listed(stray)} stands beside the index but not in it"
        raise fail("R203", where=folder, why=why, fix="Remove one of the two")
    found: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in read_header(contained(folder, shard)).items():
            if name in found:
                raise fail("R203", where=folder, why=f"tensor {name} lies in {found[name].path.name} and in {shard}", fix=AGAIN)
            found[name] = entry
    wrong = [name for name in {**places, **found} if name not in found or places.get(name) != found[name].path.name]
    if wrong:
        why = f"the index and the shards disagree about {len(wrong)} tensors: {listed(sorted(wrong))}"
        raise fail("R203", where=folder / INDEX, why=why, fix=AGAIN)
    size = sum(entry.nbytes for entry in found.values())
    if isinstance(total, int) and total != size:
        logging.getLogger(__name__).warning("%s: total_size is %d, the shards hold %d bytes", folder / INDEX, total, size)
    return {name: found[name] for name in places}


def read_index(path: Path) -> tuple[dict[str, str], object]:
    """(tensor name -> shard name, total size as stated); R203 for a name that is no plain file name."""
    index = read_json(path, code="R203", limit=INDEX_LIMIT)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise fail("R203", where=path, why="it has no weight_map", fix=AGAIN)
    for shard in {str(value) for value in places.values()}:
        if not is_plain_name(shard) or not shard.endswith(".safetensors"):
            why = f"the shard name {shard[:200]!r} is no plain name of a safetensors file"
            raise fail("R203", where=path, why=why, fix=AGAIN)
    if not all(isinstance(value, str) for value in places.values()):
        raise fail("R203", where=path, why="a shard name is no text", fix=AGAIN)
    metadata = index.get("metadata")
    return places, metadata.get("total_size") if isinstance(metadata, dict) else None


def listed(items: list[str], limit: int = 40) -> str:
    """The items in one line, the first 40 in full."""
    return "; ".join(items[:limit]) + (f"; and {len(items) - limit} more" if len(items) > limit else "")


def is_plain_name(name: str) -> bool:
    """True for a file name that can lie nowhere but in its own folder."""
    return name.isprintable() and not set(name) & set("/\\:") and name not in ("", ".", "..")


def read_raw(entry: Entry) -> Raw:
    """The stored bits as a read-only memory-mapped array of `entry.shape`; BF16 as uint16."""
    dtype = np.dtype(DTYPES[entry.dtype])
    if not entry.nbytes:
        return np.zeros(entry.shape, dtype)
    try:
        return np.memmap(entry.path, dtype, "r", entry.start, entry.shape)
    except (OSError, ValueError) as error:
        raise fail("R201", where=entry.path, why=f"it changed after it was opened: {error}", fix="Start again") from None


def read_float32(entry: Entry) -> npt.NDArray[np.float32]:
    """The values as float32, shape `entry.shape`; R202 for a tensor of whole numbers."""
    return decode(read_raw(entry), entry.dtype, where=f"{entry.path}: {entry.name}")


def decode(raw: Raw, dtype: str, where: str = "tensor") -> npt.NDArray[np.float32]:
    """float32 values of raw bits."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    if not dtype.startswith("F"):
        raise fail("R202", where=where, why=f"it holds {dtype}, not floating-point numbers", fix="Use the unquantised model")
    return raw.astype(np.float32)


def encode(array: npt.NDArray[np.floating], dtype: str) -> Raw:
    """Raw bits of F32, F16 or BF16, rounded to nearest with ties to even; a NaN stays one."""
    values = np.ascontiguousarray(array, np.float32).reshape(np.shape(array))
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    if dtype != "BF16":
        raise ValueError(f"cannot encode {dtype}; known: {', '.join(FLOATS)}")
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    # Rounding could carry a NaN into infinity or zero, so its upper half is kept and made quiet.
    return np.where(np.isnan(values), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)


def blocks(raw: Raw) -> Iterator[Raw]:
    """The array flat, in pieces of at most `BLOCK` bytes."""
    flat, step = raw.reshape(-1), max(1, BLOCK // raw.itemsize)
    for start in range(0, flat.size, step):
        yield flat[start : start + step]


def write_weights(path: Path | str, tensors: Iterable[Named], plan: Plan, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file atomically from (name, dtype, raw bits), which come in the plan's order one by one.

    `plan` maps each name to (dtype, shape). R401 or R402 on failure, ValueError where tensors and plan differ.
    """
    header, starts, total = layout(plan, metadata or {"format": "pt"})
    check_space(Path(path).parent, len(header) + total)
    with new_file(path, len(header) + total) as file:
        file.write(header)
        expected = iter(plan.items())
        for name, dtype, raw in tensors:
            planned, (planned_dtype, shape) = next(expected, ("nothing", ("", ())))
            fits = raw.itemsize == np.dtype(DTYPES.get(dtype, "V0")).itemsize and raw.shape == tuple(shape)
            if (name, dtype) != (planned, planned_dtype) or not fits:
                raise ValueError(f"{name} {dtype} {raw.shape} came where the plan has {planned} {planned_dtype} {shape}")
            file.seek(len(header) + starts[name])
            for block in blocks(raw):
                file.write(np.ascontiguousarray(block).data)
        if next(expected, None) is not None:
            raise ValueError("fewer tensors came than were planned")


def layout(plan: Plan, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """(length and header as bytes, start of each tensor in the data, bytes of data); wide dtypes first, for alignment."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name, (dtype, shape) in sorted(plan.items(), key=lambda item: -np.dtype(DTYPES[item[1][0]]).itemsize):
        check_name(name)
        if len(shape) > RANK_LIMIT:
            raise ValueError(f"tensor {name}: {len(shape)} dimensions; at most {RANK_LIMIT} are supported")
        starts[name] = end
        end += math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT or len(plan) > TENSOR_LIMIT:
        raise ValueError(f"{len(plan)} tensors make a header that no reader accepts")
    return struct.pack("<Q", len(text)) + text, starts, end
