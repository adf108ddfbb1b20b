"""Where the tensors of a torch.save file lie, found without executing anything. Run as a program on its own, see `pth_file`.

Standard library only: it runs in a bare child process with little memory, little time and no way to open or start anything.
The pickle is read by a machine of its own, which knows the few steps that a state dict needs and no functions at all.
"""

import json
import os
import pickletools
import resource
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

MEMORY_LIMIT = 320 * 2**20
SECONDS_LIMIT = 20
PICKLE_LIMIT = 2**24
DIRECTORY_LIMIT = 2**25
RANK_LIMIT = 8
VERSIONS = tuple(b"%d\n" % version for version in range(1, 11))
RESAVE = "Load it in PyTorch with weights_only=True and save the plain state dict again with torch.save"

# Storage class of torch -> (dtype as safetensors spells it, bytes of a value).
STORAGES = {
    "FloatStorage": ("F32", 4), "BFloat16Storage": ("BF16", 2), "HalfStorage": ("F16", 2), "DoubleStorage": ("F64", 8),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}  # fmt: skip
TENSOR, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
ORDERED_DICT = "collections OrderedDict"
KNOWN = {TENSOR, PARAMETER, ORDERED_DICT, *(f"torch {name}" for name in STORAGES)}
NESTS = ("state_dict", "model", "module")  # keys under which trainers put the state dict

FLAGS = 0x808  # of a zip record: its sizes follow it, its name is UTF-8
FOLDER = 0x10  # attribute of a zip record that has no content

VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Refused(ValueError):
    """The file is not read: the reason, and as second argument the fix where there is one."""


class Name(str):
    """A function or class that the pickle names; one of `KNOWN`, never looked up."""


class Ordered(dict[Any, Any]):
    """An OrderedDict of the pickle."""


class Storage(NamedTuple):
    """A record of the archive that holds the values of tensors."""

    dtype: str
    width: int
    key: str
    length: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset, sizes and strides in values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Record(NamedTuple):
    """A file in the archive: its bytes are [start, stop) of the whole."""

    start: int
    stop: int


def main() -> None:
    """Print the answer about the file on standard input as JSON."""
    with suppress(ValueError, OSError):  # macOS does not know them all
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS_LIMIT, SECONDS_LIMIT))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    sys.addaudithook(deny)
    sys.stdout.write(json.dumps(answer(sys.stdin.buffer)))
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own cleaning up would meet the audit hook


def answer(file: BinaryIO) -> dict[str, Any]:
    """{"tensors": [[name, dtype, shape, start, stop], ...]}, or {"error", "fix"}."""
    try:
        return {"tensors": tensors_of(file, file.seek(0, os.SEEK_END))}
    except Refused as error:
        why, fix = (*error.args, "")[:2]
        return {"error": why[:1000], "fix": fix}
    except MemoryError:
        return {"error": f"reading it takes more than {MEMORY_LIMIT:,} bytes of memory", "fix": RESAVE}
    except Exception as error:
        return {"error": f"it is no torch.save file that can be read ({type(error).__name__})", "fix": RESAVE}


def deny(event: str, arguments: Sequence[object]) -> None:
    """Audit hook that forbids this process to open, import, start or connect to anything from now on."""
    raise PermissionError(event)


def tensors_of(file: BinaryIO, size: int) -> list[list[Any]]:
    """[name, dtype, shape, start, stop] of every tensor in the state dict, in its order."""
    records = read_archive(file, size)
    if (order := small_record(file, records, "byteorder")) not in (None, b"little"):
        raise Refused(f"its byte order is {order!r:.40}", RESAVE)
    if (version := small_record(file, records, "version")) not in VERSIONS:
        raise Refused(f"its format version is {version!r:.40}", RESAVE)
    if any(name.startswith("code/") or name == "constants.pkl" for name in records):
        raise Refused("it is a TorchScript program, not a state dict", RESAVE)
    if "data.pkl" not in records:
        raise Refused("the archive has no data.pkl", RESAVE)
    start, stop = records["data.pkl"]
    if stop - start > PICKLE_LIMIT:
        raise Refused(f"its data.pkl has {stop - start:,} bytes; at most {PICKLE_LIMIT:,} are read", RESAVE)
    state = state_dict(Machine().run(read_at(file, start, stop - start)))
    return [locate(name, tensor, records) for name, tensor in state.items()]


def state_dict(value: object) -> dict[str, Tensor]:
    """The table of tensors that was saved, or the one under `NESTS`."""
    if not isinstance(value, dict):
        raise Refused("it holds no state dict", RESAVE)
    nests = [key for key in NESTS if isinstance(value.get(key), dict)]
    table = value[nests[0]] if len(nests) == 1 else value
    for name, tensor in table.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise Refused(f"its entry {name!r:.100} is no tensor under a name", RESAVE)
    return table


def locate(name: str, tensor: Tensor, records: dict[str, Record]) -> list[Any]:
    """Name, dtype, shape and bytes of a tensor; refused unless it lies in one piece within its storage."""
    storage, shape = tensor.storage, tensor.shape
    record = records.get(f"data/{storage.key}")
    if record is None:
        raise Refused(f"tensor {name}: the archive lacks its storage")
    stored, needed = record.stop - record.start, storage.length * storage.width
    if stored != needed:
        raise Refused(f"tensor {name}: its storage has {stored:,} bytes, not {needed:,}")
    if len(shape) > RANK_LIMIT:
        raise Refused(f"tensor {name}: {len(shape)} dimensions; at most {RANK_LIMIT} are supported")
    total = 1
    for size, stride in zip(reversed(shape), reversed(tensor.strides), strict=True):
        if size > 1 and stride != total and 0 not in shape:
            fix = "Save the state dict again with tensor.contiguous() for each tensor"
            raise Refused(f"tensor {name} is a view with strides {list(tensor.strides)}", fix)
        total *= size
    if tensor.offset + total > storage.length:
        raise Refused(f"tensor {name} of shape {list(shape)} ends behind its storage")
    start = record.start + tensor.offset * storage.width
    return [name, storage.dtype, list(shape), start, start + total * storage.width]


class Machine:
    """Pickle's stack machine, reduced to what torch.save writes for a state dict; no name is ever looked up or called."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> object:
        """The value that the pickle describes, of tables, tuples, texts, numbers and tensors."""
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                if position is None or position + 1 != len(data) or len(self.stack) != 1 or self.marks:
                    raise Refused("its pickle does not end where it should")
                return self.stack[0]
            self.step(opcode.name, argument)
        raise Refused("its pickle has no end")

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        push = self.stack.append
        if name in VALUES:
            push(argument)
        elif name in CONSTANTS:
            push(CONSTANTS[name])
        elif name in TUPLES:
            push(tuple(self.pop(TUPLES[name])))
        elif name in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                raise Refused("its pickle recalls something that it never kept")
            push(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.top()
        elif name == "MARK":
            self.marks.append(len(self.stack))
        elif name == "TUPLE":
            push(tuple(self.pop_mark()))
        elif name == "EMPTY_DICT":
            push({})
        elif name == "SETITEM":
            self.set_items(self.pop(2))
        elif name == "SETITEMS":
            self.set_items(self.pop_mark())
        elif name == "GLOBAL":
            push(known(argument))
        elif name == "BINPERSID":
            push(storage(*self.pop(1)))
        elif name == "REDUCE":
            push(call(*self.pop(2)))
        elif name == "BUILD":
            # An OrderedDict's own attributes: the versions of modules. They say nothing about tensors.
            (attributes,) = self.pop(1)
            if not isinstance(self.top(), Ordered) or not isinstance(attributes, dict):
                raise Refused("it sets the state of an object, which no state dict needs", RESAVE)
        elif name == "PROTO":
            if argument != 2:
                raise Refused(f"its pickle is of protocol {argument}, not of 2 as torch.save writes", RESAVE)
        else:
            raise Refused(f"its pickle uses {name}, which no state dict needs", RESAVE)

    def top(self) -> Any:
        """The last value, which stays."""
        (value,) = self.pop(1)
        self.stack.append(value)
        return value

    def pop(self, count: int) -> list[Any]:
        """The last values; those before a mark are out of reach."""
        if len(self.stack) - (self.marks[-1] if self.marks else 0) < count:
            raise Refused("its pickle takes more than it gave")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def pop_mark(self) -> list[Any]:
        """The values since the last mark."""
        if not self.marks:
            raise Refused("its pickle lacks a mark")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def set_items(self, flat: list[Any]) -> None:
        """Put keys and values into the table below them."""
        table = self.top()
        if not isinstance(table, dict) or len(flat) % 2:
            raise Refused("its pickle fills something that is no table")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if type(key) not in (str, int):
                raise Refused("a key of its tables is neither text nor number", RESAVE)
            if key in table:
                raise Refused(f"the key {key!r:.100} stands twice")
            table[key] = value


def known(name: str) -> Name:
    """A name that a state dict may use."""
    if name not in KNOWN:
        raise Refused(f"it asks for {name.replace(' ', '.', 1)!r:.200}, which no state dict needs; nothing was executed", RESAVE)
    return Name(name)


def text(value: object) -> str:
    """The value if it is text."""
    if type(value) is not str:
        raise Refused("its pickle has something else where a text belongs")
    return value


def natural(value: object) -> int:
    """The value if it is a whole number from 0 to 2^60."""
    if type(value) is not int or not 0 <= value < 2**60:
        raise Refused("its pickle has something else where a size belongs")
    return value


def naturals(value: object) -> tuple[int, ...]:
    """The value if it is a tuple of such numbers."""
    if type(value) is not tuple:
        raise Refused("its pickle has something else where sizes belong")
    return tuple(map(natural, value))


def storage(value: object) -> Storage:
    """The storage of a persistent id: ("storage", class, key, device, number of values)."""
    if type(value) is not tuple or len(value) != 5 or value[0] != "storage" or type(value[1]) is not Name:
        raise Refused("its pickle refers to something that is no storage", RESAVE)
    _, kind, key, _, count = value
    name = kind.removeprefix("torch ")
    if name not in STORAGES:
        raise Refused("its pickle refers to something that is no storage", RESAVE)
    return Storage(*STORAGES[name], text(key), natural(count))


def call(function: object, arguments: object) -> object:
    """What one of the known functions would give, worked out here."""
    if type(function) is not Name or type(arguments) is not tuple:
        raise Refused("its pickle calls something that is no function")
    if function == ORDERED_DICT and not arguments:
        return Ordered()
    if function == PARAMETER and len(arguments) == 3 and isinstance(arguments[0], Tensor) and type(arguments[1]) is bool:
        return arguments[0]
    if function == TENSOR and len(arguments) in (6, 7) and isinstance(arguments[0], Storage):
        if len(arguments) == 7 and arguments[6]:
            raise Refused("a tensor has bits of its own (conjugate or negative), which no weights have", RESAVE)
        shape, strides = naturals(arguments[2]), naturals(arguments[3])
        if len(shape) == len(strides) and type(arguments[4]) is bool and isinstance(arguments[5], dict):
            return Tensor(arguments[0], natural(arguments[1]), shape, strides)
    raise Refused(f"its pickle calls {function.replace(' ', '.', 1)} with arguments that do not fit")


def read_archive(file: BinaryIO, size: int) -> dict[str, Record]:
    """The records of a zip archive as torch.save writes it, by their name without the archive's own.

    One directory right before the end of the file, everything stored and not compressed, no record over another.
    """
    count, start, stop = read_end(file, size)
    data = read_at(file, start, stop - start)
    records: dict[str, Record] = {}
    roots, position = set(), 0
    for _ in range(count):
        name, flags, method, packed, length, offset, position = read_directory(data, position)
        if method or packed != length or flags & ~FLAGS:
            raise Refused(f"its record {name!r:.100} is compressed or encrypted", RESAVE)
        local = read_at(file, offset, 30)
        magic, name_size, extra_size = struct.unpack("<4s22xHH", local)
        if magic != b"PK\3\4" or read_at(file, offset + 30, name_size) != name.encode():
            raise Refused(f"its record {name!r:.100} is not where the directory says")
        begin = offset + 30 + name_size + extra_size
        root, _, inner = name.partition("/")
        if not inner or inner in records or begin + length > start:
            raise Refused(f"its record {name!r:.100} stands twice, has no folder or leaves the archive")
        roots.add(root)
        records[inner] = Record(begin, begin + length)
    if position != len(data) or len(roots) != 1:
        raise Refused("its directory has other records than it says, or several roots")
    spans = sorted(records.values())
    if any(first.stop > second.start for first, second in pairwise(spans)):
        raise Refused("two of its records overlap")
    return records


def read_end(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """(records, start, stop) of the directory, from the last bytes of the archive."""
    if size < 22:
        raise Refused(f"it has {size} bytes, too few for an archive")
    end = size - 22
    magic, disk, first, here, count, length, start, comment = struct.unpack("<4sHHHHIIH", read_at(file, end, 22))
    if magic != b"PK\5\6" or comment:
        raise Refused("the archive has no end: it is cut, or something follows it")
    if disk or first or here != count:
        raise Refused("the archive is one of several parts")
    if end >= 76 and read_at(file, end - 20, 4) == b"PK\6\7":
        disk, place, disks = struct.unpack("<4xIQI", read_at(file, end - 20, 20))
        end -= 76
        magic, rest, here, first, also, count, length, start = struct.unpack("<4sQ4xIIQQQQ", read_at(file, end, 56))
        if magic != b"PK\6\6" or rest != 44 or place != end or disk or disks != 1 or here or first or also != count:
            raise Refused("the end of the archive is damaged")
    if start + length != end or length > DIRECTORY_LIMIT or count * 46 > length:
        raise Refused("the directory of the archive is cut, too large or not at its end")
    return count, start, end


def read_directory(data: bytes, position: int) -> tuple[str, int, int, int, int, int, int]:
    """(name, flags, method, packed size, size, offset, position of the next) of one record in the directory."""
    if len(data) - position < 46:
        raise Refused("the directory of the archive is cut")
    fields = struct.unpack_from("<4s4xHH8xIIHHHH2xII", data, position)
    magic, flags, method, packed, length, name_size, extra_size, comment_size, disk, attributes, offset = fields
    name = data[position + 46 : position + 46 + name_size]
    extra = data[position + 46 + name_size : position + 46 + name_size + extra_size]
    if magic != b"PK\1\2" or len(extra) != extra_size or comment_size or disk or attributes & FOLDER or not name.isascii():
        raise Refused("the directory of the archive is damaged")
    wide = wide_fields(extra)
    values = []
    for value in (length, packed, offset):  # in this order, where 32 bits are too few
        values.append(wide.pop(0) if value == 0xFFFFFFFF and wide else value)
    return name.decode(), flags, method, values[1], values[0], values[2], position + 46 + name_size + extra_size


def wide_fields(extra: bytes) -> list[int]:
    """The 64-bit sizes in the extra bytes of a record."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        field, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1:
            return [value for (value,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
    return []


def small_record(file: BinaryIO, records: dict[str, Record], name: str) -> bytes | None:
    """Content of a record of a few bytes, None where there is none."""
    if name not in records:
        return None
    start, stop = records[name]
    return read_at(file, start, min(stop - start, 64))


def read_at(file: BinaryIO, start: int, count: int) -> bytes:
    """`count` bytes from `start` on."""
    file.seek(start)
    data = file.read(count)
    if len(data) != count:
        raise Refused("the archive points behind its end")
    return data


if __name__ == "__main__":
    main()
