"""Bad torch.save files, made by code without torch: name -> (bytes, words that the refusal must hold); sound ones too."""

import pickle
import struct
from collections.abc import Callable, Mapping
from io import BytesIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def archive(records: Mapping[str, bytes], root: str = "archive", method: int = ZIP_STORED) -> bytes:
    """A zip of the records under one root, in the order given."""
    buffer = BytesIO()
    with ZipFile(buffer, "w", method) as file:
        for name, data in records.items():
            file.writestr(ZipInfo(f"{root}/{name}" if root else name), data, method)
    return buffer.getvalue()


def saved(program: bytes, data: bytes = FLOATS, **more: bytes) -> bytes:
    """A file of torch.save whose data.pkl is `program`, with one storage "0"."""
    return archive({"data.pkl": program, "byteorder": b"little", "data/0": data, "version": b"3\n", **more})


def word(text: str) -> bytes:
    """The instruction that pushes a text."""
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def number(value: int) -> bytes:
    """The instruction that pushes a whole number."""
    return pickle.dumps(value, 2)[2:-1]


def numbers(values: tuple[int, ...]) -> bytes:
    """The instructions that push a tuple of whole numbers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def place(kind: str = "torch\nFloatStorage", key: bytes = word("0"), count: bytes = number(4), tag: str = "storage") -> bytes:
    """The instructions that push a storage."""
    return b"(" + word(tag) + b"c" + kind.encode() + b"\n" + key + word("cpu") + count + b"tQ"


def tensor(
    storage: bytes = place(), offset: bytes = number(0), shape: bytes = numbers((2, 2)), strides: bytes = numbers((2, 1))
) -> bytes:
    """The instructions that push a tensor."""
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + b"\x89" + hooks + b"tR"


def table(value: bytes = tensor(), name: bytes = word("a")) -> bytes:
    """A whole pickle: a table with one entry."""
    return b"\x80\x02}" + name + value + b"s."


def call(function: str, *arguments: bytes) -> bytes:
    """The instructions that call a function named "module\\nname"."""
    return b"c" + function.encode() + b"\n(" + b"".join(arguments) + b"tR"


def patched(data: bytes, *changes: Callable[[bytearray], object]) -> bytes:
    """A copy with some bytes changed."""
    copy = bytearray(data)
    for change in changes:
        change(copy)
    return bytes(copy)


GOOD = saved(table())
END = len(GOOD) - 22


def patch(offset: int, layout: str, value: int) -> Callable[[bytearray], object]:
    """A change of one number in the end record."""
    return lambda data: struct.pack_into(layout, data, END + offset, value)


def at_directory(layout: str, value: int, *fields: int) -> bytes:
    """GOOD with some numbers changed in the directory's first entry (data.pkl)."""
    copy, start = bytearray(GOOD), GOOD.index(b"PK\1\2")
    for field in fields:
        struct.pack_into(layout, copy, start + field, value)
    return bytes(copy)


def deep_tuples() -> bytes:
    """2^60 leaves by sixty instructions; only a reader that walks them notices."""
    return table(b"K\1" + b"q\0h\0\x86" * 60)


# name -> (bytes, words the message must hold); each is refused with R202 and nothing is executed
BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "no zip"),
    "bare pickle": (pickle.dumps({"a": 1}, 2), "before 1.6"),
    "tar": (b"pickle\0\0" + b"\0" * 504, "no zip"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html>\n<html><head></head></html>", "web page"),
    "GGUF": (b"GGUF\3\0\0\0" + b"\0" * 40, "GGUF"),
    "zip without its end": (GOOD[:-22], "no end"),
    "zip cut by one byte": (GOOD[:-1], "no end"),
    "bytes behind the zip": (GOOD + b"x", "no end"),
    "bytes before the zip": (b"PK\3\4" + GOOD, ""),
    "zip comment": (patched(GOOD, patch(20, "<H", 4)) + b"abcd", "no end"),
    "two zips": (GOOD + GOOD, ""),
    "directory offset 2^32-1": (patched(GOOD, patch(16, "<I", 2**32 - 1)), "directory"),
    "directory size 0": (patched(GOOD, patch(12, "<I", 0)), "directory"),
    "65,535 records promised": (patched(GOOD, patch(10, "<H", 65535), patch(8, "<H", 65535)), "directory"),
    "one record fewer promised": (patched(GOOD, patch(10, "<H", 3), patch(8, "<H", 3)), "other records"),
    "record offset past the end": (at_directory("<I", 2**31, 42), "behind its end"),
    "record offset into another": (at_directory("<I", 5, 42), "not where"),
    "record size past the end": (at_directory("<I", 2**30, 20, 24), "leaves the archive"),
    "packed and unpacked size differ": (at_directory("<I", 7, 24), "compressed"),
    "encrypted": (at_directory("<H", 1, 8), "encrypted"),
    "strongly encrypted": (at_directory("<H", 0x40, 8), "encrypted"),
    "record that is a folder": (at_directory("<I", 0x10, 38), "damaged"),
    "record on another disk": (at_directory("<H", 1, 34), "damaged"),
    "archive in several parts": (patched(GOOD, patch(4, "<H", 1)), "several parts"),
    "format version 99": (archive({"data.pkl": table(), "data/0": FLOATS, "version": b"99\n"}), "format version"),
    "no format version": (archive({"data.pkl": table(), "data/0": FLOATS}), "format version"),
    "compressed": (archive({"data.pkl": table(), "data/0": FLOATS}, method=ZIP_DEFLATED), "compressed"),
    "compression bomb": (archive({"data.pkl": table(), "data/0": b"\0" * 10_000_000}, method=ZIP_DEFLATED), "compressed"),
    "no records": (b"PK\3\4" + archive({})[:0] + b"PK\5\6" + b"\0" * 18, ""),
    "no data.pkl": (archive({"data/0": FLOATS, "version": b"3\n"}), "no data.pkl"),
    "record outside a folder": (archive({"data.pkl": table(), "data/0": FLOATS}, root=""), ""),
    "two roots": (archive({"a/data.pkl": table(), "b/data/0": FLOATS}, root=""), "several roots"),
    "record twice": (archive({"data.pkl": table(), "data/0": FLOATS, "data/1": FLOATS}).replace(b"data/1", b"data/0"), "twice"),
    "big-endian": (archive({"data.pkl": table(), "byteorder": b"big", "data/0": FLOATS}), "byte order"),
    "TorchScript": (saved(table(), **{"code/__torch__.py": b"import os"}), "TorchScript"),
    "storage missing": (archive({"data.pkl": table(), "version": b"3\n"}), "lacks its storage"),
    "storage too small": (saved(table(), FLOATS[:-1]), "15 bytes, not 16"),
    "storage too large": (saved(table(), FLOATS + b"\0" * 4), "20 bytes, not 16"),
    "pickle of 20 MB": (saved(b"\x80\x02" + b"N0" * 10_000_000 + b"."), "at most"),
    "pickle empty": (saved(b""), ""),
    "pickle cut": (saved(table()[:-20]), ""),
    "pickle without STOP": (saved(table()[:-1]), ""),
    "bytes behind STOP": (saved(table() + b"x"), "does not end"),
    "protocol 77": (saved(b"\x80\x4d" + table()[2:]), "protocol 77"),
    "protocol 4": (saved(b"\x80\x04" + table()[2:]), "protocol 4"),
    "unknown instruction": (saved(b"\x80\x02\xff."), ""),
    "nothing on the stack": (saved(b"\x80\x02."), "does not end"),
    "takes more than it gave": (saved(b"\x80\x02s."), "more than it gave"),
    "reaches below a mark": (saved(b"\x80\x02}(\x85."), "more than it gave"),
    "mark missing": (saved(b"\x80\x02t."), "lacks a mark"),
    "memo never filled": (saved(b"\x80\x02h\5."), "never kept"),
    "text of 2^32-1 bytes": (saved(b"\x80\x02X\xff\xff\xff\xffabc."), ""),
    "text no UTF-8": (saved(b"\x80\x02X\1\0\0\0\xff."), ""),
    "fills no table": (saved(b"\x80\x02)" + word("a") + tensor() + b"s."), "no table"),
    "fills a tensor": (saved(b"\x80\x02" + tensor() + word("a") + word("b") + b"s."), "no table"),
    "key is a tuple": (saved(table(name=b")")), "neither text nor number"),
    "key is a table": (saved(table(name=b"}")), "neither text nor number"),
    "key twice": (saved(b"\x80\x02}" + (word("a") + tensor() + b"s") * 2 + b"."), "stands twice"),
    "odd number of items": (saved(b"\x80\x02}(" + word("a") + b"u."), ""),
    "table in itself": (saved(b"\x80\x02}q\0" + word("a") + b"h\0s."), "no tensor"),
    "tuples 60 deep, doubled each time": (saved(deep_tuples()), "no tensor"),
    "os.system": (saved(table(call("os\nsystem", word("touch executed")))), "os.system"),
    "builtins.eval": (saved(table(call("builtins\neval", word("1")))), "builtins.eval"),
    "exec by STACK_GLOBAL": (saved(table(word("builtins") + word("exec") + b"\x93" + word("1") + b"\x85R")), "STACK_GLOBAL"),
    "getattr on an allowed name": (saved(table(call("builtins\ngetattr", b"ctorch\nFloatStorage\n", word("x")))), "getattr"),
    "torch.load": (saved(table(call("torch\nload", word("/etc/passwd")))), "torch.load"),
    "torch.hub": (saved(table(call("torch.hub\nload", word("x")))), "torch.hub"),
    "numpy scalar": (saved(table(call("numpy.core.multiarray\nscalar"))), "numpy"),
    "OrderedDict with arguments": (saved(table(call("collections\nOrderedDict", number(1)))), "do not fit"),
    "calls a text": (saved(table(word("os.system") + word("x") + b"\x85R")), "no function"),
    "calls a storage class": (saved(table(call("torch\nFloatStorage", number(10**12)))), "do not fit"),
    "INST": (saved(b"\x80\x02(" + word("x") + b"ios\nsystem\n."), "INST"),
    "OBJ": (saved(b"\x80\x02(cos\nsystem\n" + word("x") + b"o."), "os.system"),
    "NEWOBJ": (saved(b"\x80\x02ccollections\nOrderedDict\n)\x81."), "NEWOBJ"),
    "EXT1": (saved(b"\x80\x02\x82\1."), "EXT1"),
    "BUILD on a tensor": (saved(table(tensor() + b"}b")), "state of an object"),
    "BUILD on a plain table": (saved(table()[:-1] + b"}b."), "state of an object"),
    "BUILD with a text": (saved(b"\x80\x02}" + word("x") + b"b."), "state of an object"),
    "PERSID text": (saved(b"\x80\x02Pstorage\n."), "PERSID"),
    "buffer out of band": (saved(b"\x80\x05\x97."), "protocol 5"),
    "whole number of 2^31 bytes": (saved(b"\x80\x02\x8b\xff\xff\xff\x7f."), ""),
    "decimal of a million digits": (saved(b"\x80\x02L" + b"9" * 1_000_000 + b"L\n."), ""),
    "no storage": (saved(table(tensor(place(tag="module")))), "no storage"),
    "storage of another class": (saved(table(tensor(place("collections\nOrderedDict")))), "no storage"),
    "storage key a number": (saved(table(tensor(place(key=number(0))))), "text belongs"),
    "storage key a path": (saved(table(tensor(place(key=word("../../byteorder"))))), "lacks its storage"),
    "storage of -1 values": (saved(table(tensor(place(count=number(-1))))), "size belongs"),
    "storage of 2^62 values": (saved(table(tensor(place(count=number(2**62))))), "size belongs"),
    "storage size true": (saved(table(tensor(place(count=b"\x88")))), "size belongs"),
    "unknown storage class": (saved(table(tensor(place("torch\nQUInt8Storage")))), "QUInt8Storage"),
    "tensor of a text": (saved(table(tensor(word("0")))), "do not fit"),
    "gradient flag is a number": (saved(table(tensor()).replace(b"\x89", b"K\0")), "do not fit"),
    "hooks are a text": (saved(table(tensor()).replace(b"ccollections\nOrderedDict\n)R", word("x"))), "do not fit"),
    "negative offset": (saved(table(tensor(offset=number(-1)))), "size belongs"),
    "offset past the end": (saved(table(tensor(offset=number(1)))), "ends behind its storage"),
    "shape past the end": (saved(table(tensor(shape=numbers((3, 2))))), "ends behind its storage"),
    "shape of 2^59 values": (saved(table(tensor(shape=numbers((2**59,)), strides=numbers((1,))))), "ends behind its storage"),
    "negative size": (saved(table(tensor(shape=numbers((-2, -2))))), "size belongs"),
    "sizes and strides of other lengths": (saved(table(tensor(strides=numbers((1,))))), "do not fit"),
    "transposed": (saved(table(tensor(strides=numbers((1, 2))))), "strides [1, 2]"),
    "expanded": (saved(table(tensor(strides=numbers((0, 1))))), "strides [0, 1]"),
    "9 dimensions": (saved(table(tensor(shape=numbers((1,) * 9), strides=numbers((1,) * 9)))), "9 dimensions"),
    "empty name": (saved(table(name=word(""))), "tensor name"),
    "name with escape codes": (saved(table(name=word("\x1b[2J"))), "tensor name"),
    "name of 64 KB": (saved(table(name=word("a" * 65536))), "tensor name"),
    "entry is a number": (saved(table(number(3))), "no tensor"),
    "list on top": (saved(b"\x80\x02]."), "EMPTY_LIST"),
    "text on top": (saved(b"\x80\x02" + word("x") + b"."), "no state dict"),
}  # fmt: skip

FLAT = tensor(shape=numbers((4,)), strides=numbers((1,)))
HALF = tensor(place("torch\nBFloat16Storage", word("1")))
SEEDS = [
    GOOD,
    saved(b"\x80\x02}q\0(" + word("a") + FLAT + word("b") + HALF + b"u.", **{"data/1": b"\1\2" * 4}),
    saved(b"\x80\x02ccollections\nOrderedDict\n)R" + word("model") + table()[2:-1] + b"s}" + word("_metadata") + b"}sb."),
]
