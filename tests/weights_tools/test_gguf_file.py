"""The GGUF header reader against files that gguf-py writes, and gguf-py's reading of them."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from radlads.errors import RadladsError
from radlads.weights_tools.formats.gguf_file import TYPES, read_gguf


def write(path: Path, tensors: dict[str, np.ndarray], types: dict[str, gguf.GGMLQuantizationType] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_int64("test.negative", -(2**40))
    writer.add_string("general.name", "Größe\n")
    writer.add_array("tokenizer.ggml.tokens", ["a", "", "Ġthe"])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, -3])
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_value_and_tensor_is_where_gguf_py_finds_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = [gguf.GGMLQuantizationType(code) for code in TYPES]
    tensors, types = {}, {}
    for kind in kinds:
        _, width = gguf.GGML_QUANT_SIZES[kind]
        tensors[f"blk.{kind.name}"] = rng.integers(0, 255, (3, 2 * width), np.uint8)
        types[f"blk.{kind.name}"] = kind
    path = write(tmp_path / "x.gguf", {**tensors, "v": np.arange(5, dtype=np.float32)}, types)
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert ours.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 3,
        "llama.rope.freq_base": 1e5,
        "tokenizer.ggml.add_bos_token": True,
        "test.negative": -(2**40),
        "general.name": "Größe\n",
        "tokenizer.ggml.tokens": ["a", "", "Ġthe"],
        "tokenizer.ggml.token_type": [1, 2, -3],
    }
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    data = path.read_bytes()
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert (entry.type, entry.shape[::-1]) == (tensor.tensor_type.name, tuple(map(int, tensor.shape)))
        assert data[entry.offset : entry.offset + entry.nbytes] == tensor.data.tobytes()
        assert (entry.offset, entry.nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_block_sizes_are_those_of_gguf_py() -> None:
    known = {kind.value: (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert TYPES.items() <= known.items()


def test_a_part_of_a_split_model_names_the_fix(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(RadladsError, match=r"R202.*one of 3 parts.*merge"):
        read_gguf(tmp_path / "x.gguf")
