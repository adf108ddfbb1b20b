"""The strict safetensors reader against hand-made bad files and against the reference library, and the streaming writer."""

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from radlads import tensors
from radlads.errors import RadladsError
from radlads.tensors import decode, encode, open_weights, read_float32, read_header, read_raw, write_weights
from tests.hostile.safetensors_cases import BAD, GOOD, ZERO, mutants, one, pack
from tests.work import calls


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, words = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(RadladsError) as caught:
        open_weights(tmp_path)
    assert caught.value.code == "R202"
    assert words in caught.value.why
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 2500
    assert path.read_bytes() == data


@pytest.mark.parametrize("case", [case for case, (data, _) in BAD.items() if len(data) < 100_000])
def test_mutants_of_bad_files_raise_nothing_else(case: str, tmp_path: Path) -> None:
    path, rng = tmp_path / "x.safetensors", random.Random(case)
    for _ in range(20):
        data = bytearray(BAD[case][0])
        for _ in range(rng.randint(1, 3)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_header(path)
        except RadladsError as error:
            assert error.code == "R202"


@pytest.mark.parametrize(
    ("data", "shape"),
    [
        (one(), (1,)),
        (one(shape=[]), ()),
        (one(shape=[1] * 8), (1,) * 8),
        (one(shape=[0, 5], offsets=(0, 0), data=b""), (0, 5)),
        (pack('{"__metadata__":null,' + GOOD[1:], ZERO), (1,)),
        (pack(GOOD + "   ", ZERO), (1,)),
        (pack('{"a": {"data_offsets" : [0, 4], "dtype": "F32", "shape": [1]}}', ZERO), (1,)),
    ],
)  # fmt: skip
def test_odd_but_valid_files_are_read(data: bytes, shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    entry = read_header(tmp_path / "x.safetensors")["a"]
    assert entry.shape == shape and read_raw(entry).shape == shape and entry.nbytes == 4 * np.prod(shape)


def test_names_are_data_and_never_paths(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(pack('{"../../etc/passwd":' + GOOD[5:], ZERO))
    entry = read_header(tmp_path / "x.safetensors")["../../etc/passwd"]
    assert entry.path == tmp_path / "x.safetensors" and read_raw(entry).tolist() == [0.0]


def test_header_length_limit_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length, code in ((100_000_000, None), (100_000_001, "R202")):
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", length) + GOOD.encode())
            file.write(b" " * (length - len(GOOD)) + ZERO)
        if code is None:
            assert list(read_header(path)) == ["a"]
        else:
            with pytest.raises(RadladsError, match=code):
                read_header(path)


def test_200_000_empty_tensors_are_read_and_work_grows_with_their_number(tmp_path: Path) -> None:
    path, work = tmp_path / "x.safetensors", {}
    for count in (2_000, 4_000, 200_000):
        path.write_bytes(pack({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(count)}))
        if count < 10_000:
            work[count] = calls(lambda: read_header(path))
    assert work[4_000] <= 2 * work[2_000] and work[2_000] <= 50 * 2_000, work
    assert len(read_header(path)) == 200_000


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing", "device"])
def test_no_regular_file_is_r201(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(RadladsError, match="R201"):
        read_header(Path("/dev/null") if kind == "device" else path)


def reference(data: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the reference library reads, None if it refuses."""
    try:
        return {name: (item["dtype"], item["shape"], bytes(item["data"])) for name, item in safetensors.deserialize(data)}
    except safetensors.SafetensorError:
        return None


def test_reader_agrees_with_the_reference_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    accepted = stricter = 0
    for data in mutants(seed=7, count=10_000):
        path.write_bytes(data)
        theirs = reference(data)
        try:
            entries = read_header(path)
        except RadladsError as error:
            assert error.code == "R202"
            stricter += theirs is not None
            continue
        assert theirs is not None, f"accepted what the reference refuses: {data!r}"
        ours = {name: (entry.dtype, list(entry.shape), read_raw(entry).tobytes()) for name, entry in entries.items()}
        assert ours == theirs, data
        accepted += 1
    assert accepted > 300 and stricter > 20, (accepted, stricter)  # otherwise the mutants no longer test both sides


PATTERNS = {
    "F32": np.array(
        [0, 0x80000000, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x3F800000], np.uint32
    ),
    "F16": np.arange(65536, dtype=np.uint16),
    "BF16": np.arange(65536, dtype=np.uint16),
}


@pytest.mark.parametrize("dtype", PATTERNS)
def test_every_bit_survives_write_and_read(dtype: str, tmp_path: Path) -> None:
    stored = PATTERNS[dtype].view(tensors.DTYPES[dtype])
    write_weights(tmp_path / "model.safetensors", [("a", dtype, stored)], {"a": (dtype, stored.shape)})
    raw = read_raw(open_weights(tmp_path)["a"])
    assert raw.tobytes() == PATTERNS[dtype].tobytes()
    assert reference((tmp_path / "model.safetensors").read_bytes()) == {
        "a": (dtype, list(stored.shape), PATTERNS[dtype].tobytes())
    }


def test_decoding_and_encoding_bf16_match_torch() -> None:
    torch = pytest.importorskip("torch")
    every = np.arange(65536, dtype=np.uint16)
    values = decode(every, "BF16")
    np.testing.assert_array_equal(values.view(np.uint32), every.astype(np.uint32) << 16)
    finite = ~np.isnan(values)
    assert (encode(values, "BF16")[finite] == every[finite]).all()
    assert np.isnan(decode(encode(values, "BF16"), "BF16")[~finite]).all()
    rng = np.random.default_rng(0)
    random_bits = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    random_bits = random_bits[~np.isnan(random_bits)]
    halfway = (every.astype(np.uint32) << 16 | 0x8000).view(np.float32)
    for sample in (random_bits, halfway[~np.isnan(halfway)]):
        theirs = torch.from_numpy(sample.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(encode(sample, "BF16"), theirs)


def test_encoding_keeps_every_nan_and_the_shape() -> None:
    nans = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32).reshape(5, 1)
    for dtype in ("F32", "F16", "BF16"):
        raw = encode(nans, dtype)
        assert raw.shape == (5, 1) and np.isnan(decode(raw, dtype)).all()
    assert encode(np.float32(1.0).reshape(()), "BF16").shape == ()


def test_whole_numbers_are_not_weights(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(one("I32"))
    with pytest.raises(RadladsError, match=r"R202.*I32"):
        read_float32(read_header(tmp_path / "x.safetensors")["a"])


def test_file_cut_after_opening_is_an_error_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(one())
    entry = read_header(tmp_path / "x.safetensors")["a"]
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(RadladsError, match="R201"):
        read_raw(entry)


def test_writer_aligns_wide_tensors_and_the_reference_reads_it(tmp_path: Path) -> None:
    plan = {"half": ("BF16", (3,)), "wide": ("F32", (2, 2)), "byte": ("U8", (1,)), "none": ("F32", (0,))}
    arrays = {
        "half": np.array([1, 2, 3], np.uint16),
        "wide": np.eye(2, dtype=np.float32),
        "byte": np.array([9], np.uint8),
        "none": np.zeros(0, np.float32),
    }
    path = tmp_path / "x.safetensors"
    write_weights(path, ((name, plan[name][0], arrays[name]) for name in plan), plan, {"format": "pt", "note": "ß"})
    entries = read_header(path)
    assert all(entry.start % np.dtype(tensors.DTYPES[entry.dtype]).itemsize == 0 for entry in entries.values())
    assert reference(path.read_bytes()) == {name: (plan[name][0], list(plan[name][1]), arrays[name].tobytes()) for name in plan}
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt", "note": "ß"}


@pytest.mark.parametrize(
    "stream",
    [
        [],
        [("a", "F32", np.zeros(2, np.float32))],
        [("b", "F32", np.zeros(2, np.float32)), ("a", "F32", np.zeros(2, np.float32))],
        [("a", "F32", np.zeros(3, np.float32)), ("b", "F32", np.zeros(2, np.float32))],
        [("a", "F32", np.zeros(2, np.float64)), ("b", "F32", np.zeros(2, np.float32))],
        [("a", "BF16", np.zeros(2, np.uint16)), ("b", "F32", np.zeros(2, np.float32))],
        [("a", "F32", np.zeros(2, np.float32)), ("b", "F32", np.zeros(2, np.float32)), ("c", "F32", np.zeros(2, np.float32))],
    ],
)  # fmt: skip
def test_writer_refuses_other_tensors_than_planned_and_leaves_nothing(stream: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_weights(tmp_path / "x.safetensors", stream, {"a": ("F32", (2,)), "b": ("F32", (2,))})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "plan", [{"": ("F32", (1,))}, {"a\n": ("F32", (1,))}, {"a": ("F32", (1,) * 9)}, {"a" * 513: ("F32", (1,))}]
)
def test_writer_refuses_what_the_reader_would(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_weights(tmp_path / "x.safetensors", [], plan)
    assert list(tmp_path.iterdir()) == []


def test_large_tensors_are_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK", 64)
    array = np.arange(1001, dtype=np.float32).reshape(7, 143)
    write_weights(tmp_path / "x.safetensors", [("a", "F32", array)], {"a": ("F32", array.shape)})
    assert [block.size for block in tensors.blocks(array)] == [16] * 62 + [9]
    np.testing.assert_array_equal(read_float32(read_header(tmp_path / "x.safetensors")["a"]), array)


def shard(folder: Path, name: str, *names: str) -> None:
    """Write a shard of one-element tensors."""
    plan = {tensor: ("F32", (1,)) for tensor in names}
    write_weights(folder / name, [(tensor, "F32", np.ones(1, np.float32)) for tensor in names], plan)


def index(folder: Path, places: object, **metadata: object) -> None:
    """Write an index file."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": places}))


def shard_set(folder: Path) -> dict[str, str]:
    """A sound set of two shards with three tensors."""
    shard(folder, "model-1.safetensors", "a", "b")
    shard(folder, "model-2.safetensors", "c")
    return {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}


def test_shards_are_read_in_the_order_of_the_index(tmp_path: Path) -> None:
    places = shard_set(tmp_path)
    index(tmp_path, {name: places[name] for name in "cab"}, total_size=12)
    entries = open_weights(tmp_path)
    assert list(entries) == ["c", "a", "b"] and entries["c"].path.name == "model-2.safetensors"


@pytest.mark.parametrize("size", [11, 13])
def test_wrong_total_size_is_a_warning(size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index(tmp_path, shard_set(tmp_path), total_size=size)
    assert len(open_weights(tmp_path)) == 3
    assert f"total_size is {size}" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        *("../model-1.safetensors", "/etc/model.safetensors", "x/../model-1.safetensors", "a/b.safetensors", "C:\\m.safetensors"),
        *("", ".", "..", "model-1.bin", "m\0.safetensors", "~\n.safetensors", 5, None, ["model-1.safetensors"]),
    ],
)
def test_shard_names_are_plain_file_names(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    places = shard_set(folder)
    shard(tmp_path, "model-1.safetensors", "a", "b")
    index(folder, {**places, "b": name})
    with pytest.raises(RadladsError, match="R203"):
        open_weights(folder)


def test_all_missing_shards_are_named_at_once(tmp_path: Path) -> None:
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"})
    shard(tmp_path, "model-2.safetensors", "b")
    with pytest.raises(RadladsError, match=r"R201.*2 of 3 shards missing: model-1\.safetensors; model-3\.safetensors"):
        open_weights(tmp_path)


def test_stray_shard_is_refused(tmp_path: Path) -> None:
    index(tmp_path, shard_set(tmp_path))
    shard(tmp_path, "model-3.safetensors", "d")
    with pytest.raises(RadladsError, match=r"R203.*model-3.safetensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"d": "model-2.safetensors"}, "d"), ({"a": "model-2.safetensors"}, "a"), ({"c": None}, "c")],
    ids=["in the index only", "in another shard", "in the shard only"],
)  # fmt: skip
def test_index_and_shards_must_agree(change: dict[str, str | None], words: str, tmp_path: Path) -> None:
    places = {**shard_set(tmp_path), **change}
    if places["c"] is None:
        shard(tmp_path, "model-2.safetensors", "c", "d")
        places["d"] = "model-2.safetensors"
    index(tmp_path, {name: place for name, place in places.items() if place})
    with pytest.raises(RadladsError, match=f"R203.*disagree about 1 tensors: {words}"):
        open_weights(tmp_path)


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index(tmp_path, shard_set(tmp_path))
    shard(tmp_path, "model-2.safetensors", "b", "c")
    with pytest.raises(RadladsError, match=r"R203.*tensor b lies in model-1.safetensors and in model-2.safetensors"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map":[]}', '{"weight_map":{}}', '{"weight_map":{"a":"b","a":"b"}}', "\x80", "[" * 9999]
)
def test_bad_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, "latin-1")
    with pytest.raises(RadladsError, match="R203"):
        open_weights(tmp_path)


def test_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shard(tmp_path, "model.safetensors", "a")
    (folder / "model.safetensors").symlink_to("../model.safetensors")
    with pytest.raises(RadladsError, match=r"R201.*leaves the model folder"):
        open_weights(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(RadladsError, match="R201"):
        open_weights(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0123"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    shard(blobs, "abcdef", "a")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abcdef")
    assert list(open_weights(snapshot)) == ["a"]
    shard(tmp_path, "outside", "a")
    (blobs / "abcdef").unlink()
    (blobs / "abcdef").symlink_to("../../outside")
    with pytest.raises(RadladsError, match="R201"):
        open_weights(snapshot)


def test_folder_without_weights_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(RadladsError, match=r"R201.*no model\.safetensors"):
        open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RadladsError, match=r"R201.*pytorch_model\.bin, and.*`radlads convert .*-hf`"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pack("{}"))
    with pytest.raises(RadladsError, match=r"R203.*no tensors"):
        open_weights(tmp_path)
