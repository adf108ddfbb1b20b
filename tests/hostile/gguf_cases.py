"""Bad GGUF files, made by code: name -> (bytes, words that the refusal must hold); and sound ones for mutation."""

import struct
from collections.abc import Sequence

UINT8, INT8, UINT32, INT32, FLOAT, BOOL, STRING, ARRAY, UINT64 = 0, 1, 4, 5, 6, 7, 8, 9, 10
F32, F16, Q4_0, Q8_0, Q4_K = 0, 1, 2, 8, 12
ZEROS = b"\0" * 64


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string of the format; `length` may lie."""
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data) if length is None else length) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    """A key with its value."""
    return text(name) + u32(kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    """The value of a key of type ARRAY."""
    return u32(kind) + u64(count) + values


def tensor(
    name: str | bytes = "a", sizes: Sequence[int] = (16,), kind: int = F32, offset: int = 0, rank: int | None = None
) -> bytes:
    """A tensor's row; `sizes` in the file's order, fastest first."""
    rank = len(sizes) if rank is None else rank
    return text(name) + u32(rank) + b"".join(map(u64, sizes)) + u32(kind) + u64(offset)


ARCHITECTURE = key("general.architecture", STRING, text("llama"))


def file(
    keys: Sequence[bytes] = (ARCHITECTURE,), tensors: Sequence[bytes] = (tensor(),), data: bytes = ZEROS, *,
    version: int = 3, tensor_count: int | None = None, key_count: int | None = None, alignment: int = 32, magic: bytes = b"GGUF",
) -> bytes:  # fmt: skip
    """A whole file; the counts may lie."""
    counts = u64(len(tensors) if tensor_count is None else tensor_count) + u64(len(keys) if key_count is None else key_count)
    head = magic + u32(version) + counts + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


def with_key(name: str | bytes, kind: int, value: bytes) -> bytes:
    """A sound file but for one more key."""
    return file([ARCHITECTURE, key(name, kind, value)])


GOOD = file()
TWO = [tensor("a", offset=0), tensor("b", offset=64)]

# name -> (bytes, words the message must hold); each is refused with R202
BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "does not begin"),
    "three bytes": (b"GGU", "does not begin"),
    "magic alone": (b"GGUF", "ends behind"),
    "lower-case magic": (file(magic=b"gguf"), "GGUF"),
    "old magic GGML": (file(magic=b"lmgg"), "does not begin"),
    "version 0": (file(version=0), "version is 0"),
    "version 1": (file(version=1), "version is 1"),
    "version 99": (file(version=99), "version is 99"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + ZEROS, "big-endian"),
    "cut in the counts": (GOOD[:20], "ends behind"),
    "tensor count 2^63": (file(tensor_count=2**63), "cannot hold"),
    "tensor count 2^64-1": (file(tensor_count=2**64 - 1), "cannot hold"),
    "tensor count 60,000 in a small file": (file(tensor_count=60_000), "cannot hold"),
    "tensor count one too many": (file(tensor_count=2), ""),
    "tensor count one too few": (file(tensors=TWO, data=ZEROS * 2, tensor_count=1), "follow the last tensor"),
    "key count 2^63": (file(key_count=2**63), "cannot hold"),
    "key count 10 million": (file(key_count=10_000_000), "cannot hold"),
    "key count one too many": (file(key_count=2), ""),
    "key length 2^62": (file([text("general.architecture", 2**62) + u32(STRING) + text("llama")]), "at most"),
    "key length past the end": (file([text("k", 5000) + u32(UINT8) + b"\1"]), "ends behind"),
    "key empty": (with_key("", UINT8, b"\1"), "the key ''"),
    "key with NUL": (with_key("a\0b", UINT8, b"\1"), "printable"),
    "key with escape codes": (with_key("\x1b[2J", UINT8, b"\1"), "printable"),
    "key no UTF-8": (with_key(b"\xff\xfe", UINT8, b"\1"), "UTF-8"),
    "key of 64 KB": (with_key("k" * 65536, UINT8, b"\1"), "longer"),
    "key twice": (file([ARCHITECTURE, ARCHITECTURE]), "stands twice"),
    "value type 13": (with_key("k", 13, b"\0" * 8), "unknown type 13"),
    "value type 2^32-1": (with_key("k", 2**32 - 1, b"\0" * 8), "unknown type"),
    "value cut": (file([ARCHITECTURE, key("k", UINT64, b"")], [], b"", key_count=2)[:60], "ends behind"),
    "boolean 2": (with_key("k", BOOL, b"\2"), "neither 0 nor 1"),
    "boolean 255 in an array": (with_key("k", ARRAY, array(BOOL, 3, b"\0\1\xff")), "neither 0 nor 1"),
    "string of 2^62 bytes": (with_key("k", STRING, text("x", 2**62)), "at most"),
    "string of 2^64-1 bytes": (with_key("k", STRING, text("x", 2**64 - 1)), "at most"),
    "string past the end": (with_key("k", STRING, text("x", 10_000)), "ends behind"),
    "string no UTF-8": (with_key("k", STRING, text(b"\xc3\x28")), "UTF-8"),
    "string of half a surrogate": (with_key("k", STRING, text(b"\xed\xa0\x80")), "UTF-8"),
    "array of 2^63 numbers": (with_key("k", ARRAY, array(UINT8, 2**63, b"")), "may have"),
    "array of 2^61 numbers of 8 bytes": (with_key("k", ARRAY, array(UINT64, 2**61, b"")), "may have"),
    "array of 2^60 strings": (with_key("k", ARRAY, array(STRING, 2**60, b"")), "may have"),
    "array of a million numbers in a small file": (with_key("k", ARRAY, array(FLOAT, 1_000_000, b"")), "ends behind"),
    "array of a million strings in a small file": (with_key("k", ARRAY, array(STRING, 1_000_000, b"")), "more than the file"),
    "array of an unknown type": (with_key("k", ARRAY, array(77, 1, b"\0" * 8)), "unknown type 77"),
    "array in an array": (with_key("k", ARRAY, array(ARRAY, 1, array(UINT8, 1, b"\1"))), "array of arrays"),
    "arrays 5,000 deep": (with_key("k", ARRAY, array(ARRAY, 1, b"") * 5_000 + array(UINT8, 1, b"\1")), "array of arrays"),
    "three million empty strings": (with_key("k", ARRAY, array(STRING, 3_000_000, u64(0) * 3_000_000)), "may have"),
    "alignment 0": (with_key("general.alignment", UINT32, u32(0)), "alignment"),
    "alignment 1": (with_key("general.alignment", UINT32, u32(1)), "alignment"),
    "alignment 33": (with_key("general.alignment", UINT32, u32(33)), "alignment"),
    "alignment 2^30": (with_key("general.alignment", UINT32, u32(2**30)), "alignment"),
    "alignment as a text": (with_key("general.alignment", STRING, text("32")), "alignment"),
    "alignment as an int32": (with_key("general.alignment", INT32, u32(32)), "alignment"),
    "alignment as uint64": (with_key("general.alignment", UINT64, u64(32)), "alignment"),
    "part of a split model": (with_key("split.count", 2, struct.pack("<H", 3)), "llama-gguf-split"),
    "tensor without a name": (file(tensors=[tensor("")]), "tensor name"),
    "tensor name with a line feed": (file(tensors=[tensor("a\nb")]), "tensor name"),
    "tensor name with escape codes": (file(tensors=[tensor("\x1b]0;x\7")]), "tensor name"),
    "tensor name of 64 bytes": (file(tensors=[tensor("a" * 64)]), "tensor name"),
    "tensor name of 2^40 bytes": (file(tensors=[text("a", 2**40) + b"\0" * 40]), "at most"),
    "tensor name no UTF-8": (file(tensors=[tensor(b"\xff")]), "UTF-8"),
    "tensor twice": (file(tensors=[tensor("a"), tensor("a", offset=64)], data=ZEROS * 2), "stands twice"),
    "no dimensions": (file(tensors=[tensor(sizes=())]), "0 dimensions"),
    "5 dimensions": (file(tensors=[tensor(sizes=(1,) * 5)]), "5 dimensions"),
    "10^9 dimensions": (file(tensors=[tensor(rank=10**9)]), "dimensions"),
    "empty dimension": (file(tensors=[tensor(sizes=(0,))], data=b""), "empty or overflows"),
    "product overflows to 0": (file(tensors=[tensor(sizes=(2**32, 2**32))]), "empty or overflows"),
    "product overflows to the right size": (file(tensors=[tensor(sizes=(2**62 + 4, 4))]), "empty or overflows"),
    "size 2^64-1": (file(tensors=[tensor(sizes=(2**64 - 1,))]), "empty or overflows"),
    "type 200": (file(tensors=[tensor(kind=200)]), "unknown type 200"),
    "type removed from ggml": (file(tensors=[tensor(kind=4)]), "unknown type 4"),
    "type 2^31": (file(tensors=[tensor(kind=2**31)]), "unknown type"),
    "half a block": (file(tensors=[tensor(sizes=(48,), kind=Q4_0)]), "whole number of Q4_0 blocks"),
    "blocks across rows": (file(tensors=[tensor(sizes=(16, 2), kind=Q8_0)]), "whole number of Q8_0 blocks"),
    "half a super-block": (file(tensors=[tensor(sizes=(128,), kind=Q4_K)], data=b"\0" * 144), "whole number of Q4_K blocks"),
    "offset not aligned": (file(tensors=[tensor(offset=4)]), "next aligned place"),
    "offset past the end": (file(tensors=[tensor(offset=2**40)]), "next aligned place"),
    "offset 2^64-32": (file(tensors=[tensor(offset=2**64 - 32)]), "next aligned place"),
    "overlap": (file(tensors=[tensor("a"), tensor("b", offset=0)]), "next aligned place"),
    "partial overlap": (file(tensors=[tensor("a"), tensor("b", offset=32)], data=ZEROS * 2), "next aligned place"),
    "hole": (file(tensors=[tensor("a"), tensor("b", offset=128)], data=ZEROS * 3), "next aligned place"),
    "other order": (file(tensors=[tensor("b", offset=64), tensor("a", offset=0)], data=ZEROS * 2), "next aligned place"),
    "cut in the data": (GOOD[:-1], "the file is cut"),
    "no data": (file(data=b""), "the file is cut"),
    "cut in the tensor list": (GOOD[:80], "ends behind"),
    "trailing bytes": (file(data=ZEROS + b"x"), "follow the last tensor"),
    "ZIP appended": (file(data=ZEROS + b"PK\5\6" + b"\0" * 18), "follow the last tensor"),
    "safetensors file": (u64(60) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}      ' + b"\0" * 4, "does not begin"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html>\n<html><head></head></html>", "web page"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", "pickle"),
    "PyTorch archive": (b"PK\3\4\0\0\x08\x08\0\0archive/data.pkl", "pickle"),
}  # fmt: skip

SEEDS = [
    GOOD,
    file(version=2),
    file(tensors=TWO, data=ZEROS * 2),
    file([ARCHITECTURE, key("general.alignment", UINT32, u32(64))], alignment=64),
    file(
        [
            ARCHITECTURE,
            key("llama.block_count", UINT32, u32(2)),
            key("f", FLOAT, struct.pack("<f", 1e5)),
            key("b", BOOL, b"\1"),
            key("tokens", ARRAY, array(STRING, 3, text("a") + text("") + text("ü"))),
            key("types", ARRAY, array(INT32, 2, u32(1) + u32(6))),
        ],
        [tensor("w", (32, 2), Q8_0), tensor("v", (2, 2, 2), F16, offset=96), tensor("n", (3,), F32, offset=128)],
        b"\3" * 140,
    ),
]  # fmt: skip
