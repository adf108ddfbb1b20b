"""Files of torch.save: upstream's, whose names are ours, and OpenMOSE's with `blocks.*` names. Nothing in them is executed."""

import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from radlads.errors import RadladsError, fail
from radlads.families import write_config
from radlads.families.published import spec_of
from radlads.files import read_json, to_json
from radlads.folder import CONFIG, CONFIG_DTYPES, MANIFEST, ModelFolder, config_path, inherited, placed, read_manifest
from radlads.tensors import Entry
from radlads.weights_tools.formats.format import Output, Reading, Source, StoredTensor, Writing, fit, manifest_of, pieces_of
from radlads.weights_tools.formats.pth_file import read_pth
from radlads.weights_tools.lazy import Lazy, stored
from radlads.weights_tools.output import Checks, OutputFile, Segment, fixed
from radlads.weights_tools.rules import SAME, Rule, to_ours, to_theirs
from radlads.weights_tools.standalone import ENTRIES

NAME = "pth"
LAYER, BLOCK = "model.layers.{i}.", "blocks.{i}."
OPENMOSE = [
    Rule("model.embed_tokens.{x}", "emb.{x}", SAME),
    Rule("model.norm.{x}", "ln_out.{x}", SAME),
    Rule("lm_head.{x}", "head.{x}", SAME),
    Rule(LAYER + "input_layernorm.{x}", BLOCK + "ln1.{x}", SAME),
    Rule(LAYER + "post_attention_layernorm.{x}", BLOCK + "ln2.{x}", SAME),
    *(Rule(f"{LAYER}mlp.{name}_proj.{{x}}", f"{BLOCK}ffn.{name}.{{x}}", SAME) for name in ("gate", "up", "down")),
    Rule(LAYER + "self_attn.q_norm.{x}", BLOCK + "att.ln_r.{x}", SAME, kept=True),
    Rule(LAYER + "self_attn.r_norm.{x}", BLOCK + "att.ln_r.{x}", SAME, kept=False),
    Rule(LAYER + "self_attn.k_norm.{x}", BLOCK + "att.ln_k.{x}", SAME),
    Rule(LAYER + "self_attn.{x}", BLOCK + "att.{x}", SAME),
]
# The class of a storage in PyTorch, by dtype.
STORAGES = {"F32": "FloatStorage", "BF16": "BFloat16Storage", "F16": "HalfStorage"}
ALIGNMENT = 64
ZIP64 = 2**32 - 1  # sizes and places from here on stand in the fields of zip64
TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "chat_template", "special_tokens", "added_tokens", "generation_config")


# ---- reading ----


def read(path: Path, reading: Reading) -> Source:
    """A .pth file with the config.json beside it, or the one that was named; R202 refused, R203, R204."""
    entries = read_pth(path)
    config, place = config_of(path, reading)
    named, layout = named_tensors(path, entries)
    try:
        found = spec_of(config, {name: tensor.shape for name, tensor in named.items()}, variant=reading.variant)
    except RadladsError as error:
        raise fail(error.code, where=placed(error.where, path, place), why=error.why, fix=error.fix) from None
    except (TypeError, ValueError) as error:
        raise fail("R204", where=place, why=str(error), fix="Get the file again from its source") from None
    folder = ModelFolder(path.parent, config, found.spec)
    beside = place.parent == path.parent
    return Source(
        path=path,
        format=NAME,
        layout=layout,
        spec=found.spec,
        tensors=fit(path, found.spec, {name: tensor for name, tensor in named.items() if name not in found.ignored}),
        stored=[StoredTensor(name, entry.dtype, entry.shape, path.name, entry.nbytes) for name, entry in entries.items()],
        inputs=(path,),
        config=config,
        files={file.name: file for file in inherited(folder) if file.name not in ENTRIES} if beside else companions(place.parent),
        manifest=read_manifest(path.parent, found.spec) if beside else None,
        notices=found.notices,
    )


def named_tensors(path: Path, entries: Mapping[str, Entry]) -> tuple[dict[str, Lazy], str]:
    """(the tensors of a file under our names, whose names they have there). R203."""
    blocks = any(name.startswith("blocks.") for name in entries)
    named = ours(path, entries) if blocks else {name: stored(entry) for name, entry in entries.items()}
    weights = {name: tensor for name, tensor in named.items() if not name.endswith(".rotary_emb.inv_freq")}
    return weights, "OpenMOSE's names" if blocks else "upstream's names"


def companions(teacher: Path) -> dict[str, Path]:
    """The tokenizer of the teacher whose config was named; no other file of it is the student's."""
    return {path.name: path for path in sorted(teacher.iterdir()) if path.is_file() and path.name.startswith(TOKENIZER_FILES)}


def config_of(path: Path, reading: Reading) -> tuple[dict[str, Any], Path]:
    """(config, where it lies); R204 where there is none: a .pth has no head size, epsilon or rotary base."""
    if reading.config is None and not (path.parent / CONFIG).exists():
        why = "head size, norm epsilon and rotary base cannot be read from tensors, and no config.json lies beside it"
        raise fail("R204", where=path, why=why, fix="Pass --config with the teacher's folder or its config.json")
    place = config_path(path.parent, reading.config)
    config = read_json(place)
    if not isinstance(config, dict):
        raise fail("R204", where=place, why="it holds no table of settings", fix="Use the config.json of a model folder")
    return config, place


def ours(path: Path, entries: Mapping[str, Entry]) -> dict[str, Lazy]:
    """The tensors of OpenMOSE's file under our names; a layer with `att.q_proj` is softmax. R203."""
    query = ".att.q_proj.weight"
    kept = {int(name.split(".")[1]) for name in entries if name.endswith(query) and name.split(".")[1].isdecimal()}
    try:
        return to_ours(OPENMOSE, {name: stored(entry) for name, entry in entries.items()}, kept)
    except KeyError as error:
        raise fail("R203", where=path, why=f"{error.args[0]} is unknown", fix="Use a model of the RADLADS or hxa kind") from None


# ---- writing ----


def plan(source: Source, writing: Writing, key: str) -> Output:
    """A folder with model.pth, config.json and the tokenizer, or the one file; hxa students get OpenMOSE's names."""
    tensors = source.in_dtype(writing.dtype)
    if (source.spec.recurrent or "").startswith("hxa"):
        tensors = to_theirs(OPENMOSE, tensors, source.spec.kept_layers)
    dtype = CONFIG_DTYPES[writing.dtype or source.dtype]
    file = archive("model.pth", f"radlads-{key[:16]}", tensors)

    def small_files(hashes: Mapping[str, str]) -> dict[str, bytes | Path]:
        config = {**write_config(source.spec), **source.token_ids, "dtype": dtype}
        small: dict[str, bytes | Path] = {**source.files, CONFIG: to_json(config).encode()}
        small[MANIFEST] = manifest_of(source, {"to": NAME, "dtype": dtype}, key, hashes, small)
        return small

    alone = "the file holds weights alone: reading it takes --config with this model's config.json (a folder has it beside them)"
    return Output([file], small_files, notices=(alone,) if writing.single else ())


def archive(name: str, root: str, tensors: Mapping[str, Lazy]) -> OutputFile:
    """The zip archive that torch.save would write: a pickle that says what lies where, then one record per tensor."""
    pickled = pickle_of(tensors)
    records: list[tuple[str, int, Any]] = [("data.pkl", len(pickled), lambda checks: [pickled])]
    records.append(("byteorder", 6, lambda checks: [b"little"]))
    records += [(f"data/{number}", tensor.nbytes, pieces_of(tensor)) for number, tensor in enumerate(tensors.values())]
    records.append(("version", 2, lambda checks: [b"3\n"]))
    segments: list[Segment] = []
    places: list[tuple[str, int, int]] = []
    position = 0
    for record, size, pieces in records:
        full = f"{root}/{record}"
        start = local_header(full, size, position)
        end = descriptor_size(size)
        segments += [
            fixed(f"{record} header", start),
            Segment(record, size, pieces),
            Segment(f"{record} end", end, partial(descriptor, record, size)),
        ]
        places.append((full, size, position))
        position += len(start) + size + end
    last = directory(places, {}, position)
    segments.append(Segment("directory", len(last), lambda checks: [directory(places, checks, position)]))
    return OutputFile(name, segments, checks=True)


def local_header(name: str, size: int, position: int) -> bytes:
    """The header before a record, padded so that its data is aligned; size and check follow the data."""
    encoded = name.encode()
    zip64 = struct.pack("<HHQQ", 1, 16, 0, 0) if size >= ZIP64 else b""
    padding = -(position + 30 + len(encoded) + len(zip64) + 4) % ALIGNMENT
    extra = zip64 + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    lengths = (0xFFFFFFFF,) * 2 if zip64 else (0, 0)
    version = 45 if zip64 else 20
    fields = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", version, 0x808, 0, 0, 0, 0, *lengths, len(encoded), len(extra))
    return fields + encoded + extra


def descriptor_size(size: int) -> int:
    """Bytes of the descriptor behind a record."""
    return 24 if size >= ZIP64 else 16


def descriptor(record: str, size: int, checks: Checks) -> Iterable[bytes]:
    """Check and size behind a record."""
    layout = "<4sIQQ" if size >= ZIP64 else "<4sIII"
    return [struct.pack(layout, b"PK\7\x08", checks[record], size, size)]


def directory(places: list[tuple[str, int, int]], checks: Checks, position: int) -> bytes:
    """The archive's list of records at its end; without checks it has its size but not its content."""
    rows = b"".join(directory_row(name, size, start, checks) for name, size, start in places)
    count = len(places)
    far = position + len(rows)
    end = b""
    if far >= ZIP64 or count >= 0xFFFF:
        end += struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(rows), position)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, far, 1)
    short, start = min(count, 0xFFFF), min(position, 0xFFFFFFFF)
    end += struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, short, short, min(len(rows), 0xFFFFFFFF), start, 0)
    return rows + end


def directory_row(name: str, size: int, start: int, checks: Checks) -> bytes:
    """A record in the directory."""
    encoded = name.encode()
    wide = [number for number in (size, size, start) if number >= ZIP64]
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    sizes = (min(size, 0xFFFFFFFF),) * 2
    check = checks.get(name.partition("/")[2], 0)
    fields = (45 if wide else 20, 45 if wide else 20, 0x808, 0, 0, 0, check, *sizes, len(encoded), len(extra))
    return struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *fields, 0, 0, 0, 0, min(start, 0xFFFFFFFF)) + encoded + extra


def pickle_of(tensors: Mapping[str, Lazy]) -> bytes:
    """Protocol 2: a table from names to tensors, each a call of PyTorch's own function with a storage of its own."""
    out = bytearray(b"\x80\x02}(")
    for number, (name, tensor) in enumerate(tensors.items()):
        count = tensor.nbytes // (4 if tensor.dtype == "F32" else 2)
        out += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        out += text("storage") + f"ctorch\n{STORAGES[tensor.dtype]}\n".encode() + text(str(number)) + text("cpu") + whole(count)
        out += b"tQ" + whole(0) + numbers(tensor.shape) + numbers(strides(tensor.shape))
        out += b"\x89ccollections\nOrderedDict\n)RtR"
    return bytes(out + b"u.")


def text(string: str) -> bytes:
    """A text in a pickle."""
    encoded = string.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def whole(number: int) -> bytes:
    """A whole number in a pickle."""
    if number < 2**31:
        return b"J" + struct.pack("<i", number)
    data = number.to_bytes(9, "little")
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values: Iterable[int]) -> bytes:
    """A tuple of whole numbers in a pickle."""
    return b"(" + b"".join(map(whole, values)) + b"t"


def strides(shape: tuple[int, ...]) -> Iterator[int]:
    """Steps from one index to the next along each axis."""
    for axis in range(len(shape)):
        step = 1
        for size in shape[axis + 1 :]:
            step *= size
        yield step
