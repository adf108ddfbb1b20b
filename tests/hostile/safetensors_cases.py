"""Bad safetensors files, made by code: name -> (bytes, words that the refusal must hold); and sound ones for mutation."""

import json
import random
import struct
from collections.abc import Iterator


def pack(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file from a header (object, text or bytes) and its data."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), data: bytes = b"\0" * 4, **more: object) -> bytes:
    """A file of one tensor `a`."""
    return pack({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}, data)


def two(first: tuple[int, int], second: tuple[int, int], size: int, shapes: tuple[int, int] = (1, 1)) -> bytes:
    """A file of two float tensors at the given spans."""
    spans = {"a": (first, shapes[0]), "b": (second, shapes[1])}
    return pack({name: {"dtype": "F32", "shape": [n], "data_offsets": span} for name, (span, n) in spans.items()}, b"\0" * size)


GOOD = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
ZERO = b"\0" * 4

# name -> (bytes, words the message must hold); each is refused with R202
BAD: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes"),
    "seven bytes": (b"\1" * 7, "7 bytes"),
    "length 0": (struct.pack("<Q", 0), "header length is 0"),
    "length 2^63": (pack(GOOD, ZERO, 2**63), "header length"),
    "length 2^64-1": (pack(GOOD, ZERO, 2**64 - 1), "header length"),
    "length 2^64-8 wraps to 0": (pack(GOOD, ZERO, 2**64 - 8), "header length"),
    "length 99 MB in a small file": (pack(GOOD, ZERO, 99_000_000), "cut"),
    "length one past the end": (pack(GOOD, b"", len(GOOD) + 1), "cut"),
    "length 100,000,001": (pack(GOOD, ZERO, 100_000_001), "header length"),
    "no JSON": (pack("{hello}"), ""),
    "half JSON": (pack(GOOD[:-1]), ""),
    "two JSON values": (pack(GOOD + "{}", ZERO), ""),
    "array on top": (pack("[1, 2]"), "begin with"),
    "string on top": (pack('"abc"'), "begin with"),
    "leading space": (pack(" " + GOOD, ZERO), "begin with"),
    "byte order mark": (pack("\ufeff" + GOOD, ZERO), "begin with"),
    "bad UTF-8": (pack(GOOD.encode().replace(b'"a"', b'"\xff"'), ZERO), "UTF-8"),
    "overlong UTF-8": (pack(GOOD.encode().replace(b'"a"', b'"\xc0\x80"'), ZERO), "UTF-8"),
    "UTF-16": (pack(GOOD.encode("utf-16-le"), ZERO), ""),
    "raw control character": (pack('{"a\n":' + GOOD[5:], ZERO), ""),
    "duplicate name": (pack("{" + GOOD[1:-1] + "," + GOOD[1:], ZERO), "twice"),
    "duplicate field": (pack(GOOD.replace('"shape":[1]', '"shape":[1],"shape":[1]'), ZERO), "twice"),
    "duplicate metadata": (pack('{"__metadata__":{},"__metadata__":{},' + GOOD[1:], ZERO), "twice"),
    "metadata number": (pack('{"__metadata__":{"a":1},' + GOOD[1:], ZERO), "__metadata__"),
    "metadata list": (pack('{"__metadata__":[],' + GOOD[1:], ZERO), "__metadata__"),
    "metadata half surrogate": (pack('{"__metadata__":{"a":"\\ud800"},' + GOOD[1:], ZERO), "surrogate"),
    "full overlap": (two((0, 4), (0, 4), 4), "overlaps"),
    "partial overlap": (two((0, 8), (4, 12), 12, (2, 2)), "overlaps"),
    "zero-size inside another": (two((0, 8), (4, 4), 8, (2, 0)), "overlaps"),
    "hole": (two((0, 4), (8, 12), 12), "hole"),
    "hole at the start": (one(offsets=(4, 8), data=b"\0" * 8), "hole"),
    "span past the end": (one(shape=[2], offsets=(0, 8)), "cut"),
    "cut in the data": (one(data=b"\0" * 3), "cut"),
    "no data": (one(data=b""), "cut"),
    "trailing byte": (one(data=b"\0" * 5), "follow the last"),
    "ZIP appended": (one(data=ZERO + b"PK\3\4" + b"\0" * 40), "follow the last"),
    "data without tensors": (pack("{}", b"abc"), "follow the last"),
    "shape too big": (one(shape=[2]), "takes 8 bytes"),
    "shape too small": (one(shape=[1], offsets=(0, 8), data=b"\0" * 8), "takes 4 bytes"),
    "begin after end": (one(offsets=(4, 0)), "begin and end"),
    "negative offset": (one(offsets=(-4, 0)), "natural"),
    "negative dimension": (one(shape=[-1]), "natural"),
    "minus zero": (pack(GOOD.replace("[0,4]", "[-0,4]"), ZERO), "natural"),
    "shape [-1] and offset 2^64-1": (one(shape=[-1], offsets=(0, 2**64 - 1)), "natural"),
    "offset 2^64": (one(offsets=(0, 2**64)), "natural"),
    "offset of 5000 digits": (pack(GOOD.replace("4]", "4" + "0" * 5000 + "]"), ZERO), "natural"),
    "product overflows to 0": (one(shape=[2**32, 2**32], offsets=(0, 0), data=b""), "overflows"),
    "product overflows to the right size": (one(shape=[2**62 + 4], offsets=(0, 16), data=b"\0" * 16), "overflows"),
    "product overflows beside a 0": (one(shape=[2**63, 4, 0], offsets=(0, 0), data=b""), "overflows"),
    "unknown dtype": (one(dtype="F31"), "unknown"),
    "lower-case dtype": (one(dtype="f32"), "unknown"),
    "dtype number": (one(dtype=32), "unknown"),
    "dtype with escape codes": (one(dtype="\x1b[2J"), "unknown"),
    "fp8 E4M3": (one(dtype="F8_E4M3", shape=[4]), "convert the model to BF16"),
    "fp8 E5M2": (one(dtype="F8_E5M2", shape=[4]), "convert the model to BF16"),
    "fp8 E8M0": (one(dtype="F8_E8M0", shape=[4]), "convert the model to BF16"),
    "fp4": (one(dtype="F4", shape=[8]), "convert the model to BF16"),
    "float shape": (one(shape=[1.0]), "whole numbers"),
    "exponent shape": (pack(GOOD.replace("[1]", "[1e0]"), ZERO), "whole numbers"),
    "string shape": (one(shape=["1"]), "whole numbers"),
    "shape true": (one(shape=[True]), "whole numbers"),
    "shape null": (one(shape=None), "whole numbers"),
    "shape nested": (one(shape=[[1]]), "whole numbers"),
    "float offsets": (one(offsets=[0.0, 4.0]), "whole numbers"),
    "shape NaN": (pack(GOOD.replace("[1]", "[NaN]"), ZERO), "NaN"),
    "one offset": (one(offsets=[4]), "begin and end"),
    "three offsets": (one(offsets=[0, 4, 8]), "begin and end"),
    "offsets a number": (one(offsets=4), "whole numbers"),
    "missing shape": (pack({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, ZERO), "are needed"),
    "missing dtype": (pack({"a": {"shape": [1], "data_offsets": [0, 4]}}, ZERO), "are needed"),
    "unknown field": (one(strides=[1]), "nothing else"),
    "tensor is a list": (pack({"a": ["F32", [1], [0, 4]]}, ZERO), "are needed"),
    "tensor is null": (pack({"a": None}), "are needed"),
    "100,000 brackets": (pack('{"a":' + "[" * 100_000), "too deep"),
    "100,000 brackets, closed": (pack('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "too deep"),
    "two million lists": (pack('{"a":[' + "[]," * 2_000_000 + "0]}"), "too many"),
    "65 dimensions": (one(shape=[1] * 65), "65 dimensions"),
    "9 dimensions": (one(shape=[1] * 9), "9 dimensions"),
    "empty name": (pack('{"":' + GOOD[5:], ZERO), "tensor name"),
    "name with NUL": (pack('{"a\\u0000":' + GOOD[5:], ZERO), "tensor name"),
    "name with line feed": (pack('{"a\\nb":' + GOOD[5:], ZERO), "tensor name"),
    "name with escape codes": (pack('{"\\u001b[31m":' + GOOD[5:], ZERO), "tensor name"),
    "name that turns text around": (pack('{"a\\u202eb":' + GOOD[5:], ZERO), "tensor name"),
    "name of half a surrogate": (pack('{"\\ud800":' + GOOD[5:], ZERO), "tensor name"),
    "name of 513 bytes": (pack('{"' + "a" * 513 + '":' + GOOD[5:], ZERO), "tensor name"),
    "name of 64 KB": (pack('{"' + "a" * 65536 + '":' + GOOD[5:], ZERO), "tensor name"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html>\n<html><head></head></html>", "web page"),
    "web page without doctype": (b"\n  <HTML lang=en><body>404</body></HTML>", "web page"),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", "pickle"),
    "PyTorch archive": (b"PK\3\4\0\0\x08\x08\0\0archive/data.pkl", "pickle"),
    "GGUF": (b"GGUF\3\0\0\0" + b"\0" * 40, "GGUF"),
}  # fmt: skip


SEEDS = [
    pack(GOOD, ZERO),
    two((0, 4), (4, 8), 8),
    two((0, 0), (0, 8), 8, (0, 2)),
    one("BF16", [2]),
    one("BOOL", [4]),
    pack('{"__metadata__":{"format":"pt"},' + GOOD[1:] + "  ", ZERO),
    pack(
        {
            "a": {"dtype": "F16", "shape": [2, 1], "data_offsets": [4, 8]},
            "b": {"dtype": "I64", "shape": [0], "data_offsets": [4, 4]},
            "c": {"dtype": "I32", "shape": [], "data_offsets": [0, 4]},
        },
        b"\1\2\3\4\5\6\7\x08",
    ),
]
NUMBERS = [b"0", b"-0", b"-1", b"1", b"2", b"4", b"8", b"1.0", b"1e1", b"18446744073709551615", b"9223372036854775808"]
WORDS = b'"F32" "F16" "F8_E4M3" "U8" "F64" "C64" "shape" "a" "b" null true NaN [] [0] [1] [0,4] [4,0] [ ] { } , : "'.split()
BYTES = [b" ", b"\n", b"\\u0000", b"\\ud800", b"\xff", b"\xc3\xa9"]


def mutate(rng: random.Random, header: bytearray) -> None:
    """Change one number, piece or byte of a header."""
    start, stop = sorted(rng.randrange(len(header) + 1) for _ in range(2))
    match rng.randrange(6):
        case 0:
            digits = [i for i, byte in enumerate(header) if 48 <= byte < 58] or [0]
            spot = rng.choice(digits)
            header[spot : spot + 1] = rng.choice(NUMBERS)
        case 1:
            header[start:start] = rng.choice([*NUMBERS, *WORDS, *BYTES])
        case 2:
            del header[start : start + rng.randint(1, 8)]
        case 3:
            header[start : start + 1] = bytes([rng.randrange(256)])
        case 4:
            header[start:start] = header[start:stop]
        case 5:
            header[start:stop] = header[start:stop].replace(b"4", rng.choice(NUMBERS))


def mutants(seed: int, count: int) -> Iterator[bytes]:
    """Small valid files with one to three changes of the header, and at times of the data or the header's length."""
    rng = random.Random(seed)
    for _ in range(count):
        base = rng.choice(SEEDS)
        (length,) = struct.unpack("<Q", base[:8])
        header, data = bytearray(base[8 : 8 + length]), base[8 + length :]
        for _ in range(rng.randint(0, 3)):
            mutate(rng, header)
        if rng.random() < 0.1:
            data = data[: rng.randint(0, len(data))] if rng.random() < 0.5 else data + b"\0" * rng.randint(1, 4)
        yield pack(bytes(header), data, max(0, len(header) + rng.choice([0] * 12 + [1, -1, 8])))
