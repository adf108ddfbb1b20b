"""Every format that can hold a model gives it back to the bit, whatever the bits are; what cannot be held is refused."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from radlads.errors import RadladsError
from radlads.files import sha256
from radlads.folder import open_folder
from radlads.tensors import encode, read_header, read_raw
from radlads.weights_tools.convert import convert
from radlads.weights_tools.formats import FORMATS, gguf_rules, gguf_tokenizer, gguf_writer, open_source, pth, recognise
from radlads.weights_tools.formats.format import Reading, Writing
from radlads.weights_tools.formats.ggml import DECODERS
from radlads.weights_tools.output import as_bytes
from radlads.weights_tools.rules import to_theirs
from radlads.weights_tools.surgery import make_student
from tests.models import rewrite, tiny_teacher

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
# Students that every format can hold, and teachers of each family.
KINDS: dict[str, dict[str, Any]] = {
    "rwkv6": {"family": "qwen2", "arch": "rwkv6", "num_heads": 2, "num_kv_heads": 1},
    "rwkv6-tied": {"family": "llama", "arch": "rwkv6", "num_heads": 2, "num_kv_heads": 1, "tie_embeddings": True},
    "rwkv7": {"family": "qwen3", "arch": "rwkv7", "keep_softmax": (1,)},
    "hxa079": {"family": "qwen3", "arch": "hxa079", "keep_softmax": (1,)},
    "llama": {"family": "llama"},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2", "tie_embeddings": True},
    "qwen3": {"family": "qwen3"},
}
HOLDS = {name: sorted(set(FORMATS) - ({"gguf"} if name in ("rwkv7", "hxa079") else set())) for name in KINDS}


def make(path: Path, kind: str, dtype: str) -> Path:
    """A model folder whose tensors are random bits: NaN of every payload, infinities, subnormals, both zeros."""
    options = dict(KINDS[kind])
    arch, keep = options.pop("arch", None), options.pop("keep_softmax", ())
    teacher = tiny_teacher(path / "teacher", dtype=dtype, **options)
    if arch is None:
        return scrambled(teacher)
    make_student(open_folder(teacher), path / "student", arch=arch, options={}, keep_softmax=keep)
    return scrambled(path / "student")


def scrambled(path: Path) -> Path:
    """The folder with random bits in every tensor; the first values of each are the special ones."""
    rng = np.random.default_rng(7)

    def change(stored: dict[str, Any]) -> None:
        for dtype, raw in stored.values():
            words = raw.view(f"<u{raw.itemsize}").reshape(-1)
            words[:] = rng.integers(0, 2 ** (8 * raw.itemsize), words.shape, dtype=words.dtype)
            top = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}[dtype]
            special = [0, 1, top, top + 1, top | top >> 1, 2 ** (8 * raw.itemsize - 1), 2 ** (8 * raw.itemsize) - 1]
            words[: len(special)] = np.array(special[: len(words)], words.dtype)

    rewrite(path, change)
    return path


def same(left: Path, right: Path) -> None:
    """Raises unless two folders hold the same tensors to the bit and the same companions."""
    ours, theirs = read_header(left / "model.safetensors"), read_header(right / "model.safetensors")
    assert set(ours) == set(theirs)
    for name, entry in ours.items():
        other = theirs[name]
        assert (entry.dtype, entry.shape) == (other.dtype, other.shape), name
        assert read_raw(entry).tobytes() == read_raw(other).tobytes(), name
    for file in FILES:
        assert (left / file).read_bytes() == (right / file).read_bytes(), file
    assert open_folder(left).spec == open_folder(right).spec


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("kind", "target"), [(kind, target) for kind in KINDS for target in HOLDS[kind]])
def test_round_trip_is_exact(kind: str, target: str, dtype: str, tmp_path: Path) -> None:
    source = make(tmp_path, kind, dtype)
    before = {path.name: sha256(path) for path in source.iterdir()}
    said: list[str] = []
    there = convert(source, tmp_path / "there", target, allow_nonfinite=True, say=said.append)
    assert there.written and any("NaN" in line for line in said)
    convert(tmp_path / "there", tmp_path / "back", "hf", allow_nonfinite=True, say=said.append)
    same(source, tmp_path / "back")
    assert {path.name: sha256(path) for path in source.iterdir()} == before
    again = convert(source, there.path, target, allow_nonfinite=True, say=said.append)
    assert not list(tmp_path.glob(".*")) and not again.written
    stage = open_folder(source).stage
    assert open_folder(tmp_path / "back").stage == stage


def test_dtype_rounds_to_nearest_and_the_way_back_from_a_wider_one_is_exact(tmp_path: Path) -> None:
    source = tiny_teacher(tmp_path / "a", dtype="F32")
    convert(source, tmp_path / "b", "hf", writing=Writing(dtype="BF16"))
    wide = {name: np.array(read_raw(entry)) for name, entry in open_folder(source).weights.items()}
    for name, entry in open_folder(tmp_path / "b").weights.items():
        raw = read_raw(entry).astype(np.uint32) << 16
        error = np.abs(raw.view(np.float32).astype(np.float64) - wide[name])
        assert entry.dtype == "BF16" and (error <= np.abs(wide[name].astype(np.float64)) * 2.0**-8).all()
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    convert(tmp_path / "b", tmp_path / "c", "hf", writing=Writing(dtype="F32"))
    convert(tmp_path / "c", tmp_path / "d", "hf", writing=Writing(dtype="BF16"))
    same(tmp_path / "b", tmp_path / "d")


def test_gguf_of_a_student_has_the_names_shapes_and_types_of_llama_cpp(tmp_path: Path) -> None:
    source = make(tmp_path, "rwkv6", "BF16")
    convert(source, tmp_path / "student.gguf", "gguf", allow_nonfinite=True, say=lambda text: None)
    reader = gguf.GGUFReader(tmp_path / "student.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    arch = gguf.MODEL_ARCH.RWKV6QWEN2
    known = {gguf.TENSOR_NAMES[tensor].format(bid=layer) for tensor in gguf.MODEL_TENSORS[arch] for layer in range(2)}
    assert {name.rpartition(".")[0] for name in found} <= known and len(found) == 3 + 2 * 20
    shapes = {name: list(map(int, tensor.shape)) for name, tensor in found.items()}
    assert shapes["blk.1.time_mix_w1.weight"] == [64, 160] and shapes["blk.1.time_mix_w2.weight"] == [32, 64, 5]
    assert shapes["blk.1.time_mix_lerp_fused.weight"] == [64, 1, 1, 5] and shapes["blk.1.time_mix_decay_w1.weight"] == [64, 32]
    assert found["blk.0.time_mix_w2.weight"].tensor_type.name == found["output_norm.weight"].tensor_type.name == "F32"
    assert found["blk.0.ffn_up.weight"].tensor_type.name == "BF16"
    # The slots, stated once more: theirs are w, k, v, r, g, ours r, k, v, w, g.
    weights = open_folder(source).weights
    w1 = np.array(read_raw(weights["model.layers.1.self_attn.time_maa_w1"]))
    theirs = found["blk.1.time_mix_w1.weight"].data.reshape(5, 32, 64).view(np.uint32) >> 16
    for slot, ours in enumerate([3, 1, 2, 0, 4]):
        np.testing.assert_array_equal(theirs[slot], w1[:, 32 * ours : 32 * ours + 32].T)
    fused = found["blk.1.time_mix_lerp_fused.weight"].data.reshape(5, 64).view(np.uint32) >> 16
    np.testing.assert_array_equal(fused[3], read_raw(weights["model.layers.1.self_attn.time_maa_r"]).reshape(-1))
    values = {name: field.contents() for name, field in reader.fields.items() if name.startswith("rwkv6qwen2.")}
    assert values["rwkv6qwen2.wkv.head_size"] == 32 and values["rwkv6qwen2.attention.head_count"] == 0
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 300 and reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"arch": "rwkv7"}, "only RAD-RWKV6"),
        ({"arch": "rwkv6", "options": {"gate": "lowrank"}}, "the gate is lowrank"),
        ({"arch": "rwkv6", "options": {"rope": True}}, "no RoPE"),
        ({"arch": "rwkv6", "options": {"token_shift": False}}, "token shift"),
        ({"arch": "rwkv6", "keep_softmax": (1,)}, "layers 1 are softmax"),
    ],
)
def test_gguf_refuses_with_the_reason(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    teacher = open_folder(tiny_teacher(tmp_path / "teacher", "qwen2", num_heads=2, num_kv_heads=1))
    make_student(teacher, tmp_path / "student", **{"options": {}, **options})
    with pytest.raises(RadladsError, match=reason) as caught:
        convert(tmp_path / "student", tmp_path / "out", "gguf")
    assert caught.value.code == "R205" and sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


@pytest.mark.parametrize("name", [*DECODERS, "IQ4_NL"])
def test_quantised_teacher_comes_in_as_gguf_py_reads_it(name: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType[name]
    path, rng, block = tmp_path / "teacher.gguf", np.random.default_rng(1), gguf.GGML_QUANT_SIZES[kind]
    dims = {"D": 256, "F": 512, "V": 300}
    shapes = {"token_embd": "VD", "blk.0.attn_q": "DD", "blk.0.attn_k": "DD", "blk.0.attn_v": "DD", "blk.0.attn_output": "DD"}
    shapes |= {"blk.0.ffn_gate": "FD", "blk.0.ffn_up": "FD", "blk.0.ffn_down": "DF"}
    writer, plain = gguf.GGUFWriter(path, "llama"), {}
    writer.add_block_count(1), writer.add_embedding_length(256), writer.add_feed_forward_length(512)
    writer.add_head_count(4), writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_freq_base(54321.0)
    for tensor, letters in shapes.items():
        rows, columns = (dims[letter] for letter in letters)
        data = rng.integers(0, 60, (rows, columns // block[0] * block[1]), dtype=np.uint8)
        plain[tensor] = gguf.quants.dequantize(data, kind)
        writer.add_tensor(f"{tensor}.weight", data, raw_dtype=kind)
    for tensor in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{tensor}.weight", np.ones(256, np.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    if name == "IQ4_NL":
        with pytest.raises(RadladsError, match="has the type IQ4_NL; known: F32"):
            open_source(path)
        return
    source = open_source(path)
    assert source.spec.rope_theta == 54321.0 and source.spec.rms_norm_eps == 1e-5 and source.spec.tie_embeddings
    embedding = source.tensors["model.embed_tokens.weight"].whole()
    np.testing.assert_array_equal(embedding.view(np.uint32), plain["token_embd"].view(np.uint32))
    # llama.cpp's converter interleaves the two halves of each head of q and k.
    turned = plain["blk.0.attn_q"].reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
    query = source.tensors["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(query.whole(), turned)
    np.testing.assert_array_equal(query.read(10, 100), turned[10:100])


def test_nonfinite_weights_are_refused_by_name_but_not_where_no_model_reads_them(tmp_path: Path) -> None:
    make_student(open_folder(tiny_teacher(tmp_path / "teacher")), tmp_path / "student", arch="rwkv7", options={})
    name = "model.layers.0.self_attn.v1"
    rewrite(tmp_path / "student", lambda stored: stored[name][1].fill(np.nan))
    said: list[str] = []
    convert(tmp_path / "student", tmp_path / "kept", "hf", say=said.append)
    assert said == [f"{name} holds NaN or infinity; no model reads it"]
    rewrite(tmp_path / "student", lambda stored: stored["model.layers.1.mlp.up_proj.weight"][1].fill(np.inf))
    with pytest.raises(RadladsError, match=r"model.layers.1.mlp.up_proj.weight holds NaN.*--allow-nonfinite") as caught:
        convert(tmp_path / "student", tmp_path / "refused", "hf", say=said.append)
    assert caught.value.code == "R207" and not [path for path in tmp_path.iterdir() if "refused" in path.name]


def test_tensors_of_one_value_are_told(tmp_path: Path) -> None:
    source, said = tiny_teacher(tmp_path / "teacher", dtype="BF16"), []
    dead = {"model.layers.0.self_attn.o_proj.weight": 0.0, "lm_head.weight": 0.5, "model.layers.1.input_layernorm.weight": 0.0}

    def change(stored: dict[str, Any]) -> None:
        for name, value in dead.items():
            stored[name][1].fill(encode(np.array([value], np.float32), "BF16")[0])
        stored["model.layers.1.self_attn.o_proj.weight"][1][:-1] = 0  # all but the last row

    rewrite(source, change)
    convert(source, tmp_path / "out", "mlx", writing=Writing(bits=8, group_size=32), say=said.append)
    told = [line for line in said if "throughout" in line]
    assert sorted(told) == sorted(f"{name} holds one value throughout: {value:g}" for name, value in dead.items())


def named(path: Path, data: bytes) -> Path:
    """A file of another kind than its name says."""
    path.write_bytes(data)
    return path


def two_files(path: Path) -> Path:
    """A folder with two files that could be the model."""
    path.mkdir()
    for name in ("a.gguf", "b.pth"):
        (path / name).touch()
    return path


def test_what_is_no_model_and_outputs_that_would_hurt_are_refused(tmp_path: Path) -> None:
    source = tiny_teacher(tmp_path / "teacher")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").mkdir()
    cases: list[tuple[str, Any]] = [
        ("R201.*neither a GGUF file", lambda: recognise(tmp_path / "text")),
        ("R201.*config.json", lambda: open_source(tmp_path / "empty")),
        ("R202.*Git LFS pointer", lambda: open_source(named(tmp_path / "lfs.gguf", b"version https://git-lfs.github.com/spec/v1"))),
        ("R202.*web page", lambda: open_source(named(tmp_path / "page.pth", b"<!DOCTYPE html>"))),
        ("R202.*web page", lambda: open_source(named(tmp_path / "page", b"<html>"))),
        ("R202.*PyTorch before 1.6", lambda: open_source(named(tmp_path / "old.bin", b"\x80\x02\x8a\nl\xfc\x9cF"))),
        ("R202.*does not begin", lambda: open_source(named(tmp_path / "none.gguf", b""))),
        ("R201.*Give the folder", lambda: open_source(source / "model.safetensors")),
        ("R201.*2 weights files", lambda: recognise(two_files(tmp_path / "two"))),
        ("R401.*lies in the input", lambda: convert(source, source / "inside", "hf")),
        ("R401.*the folder exists", lambda: convert(source, shutil.copytree(source, tmp_path / "old"), "hf")),
        ("R401.*it holds no radlads.json", lambda: convert(source, tmp_path / "two", "hf", overwrite=True)),
        ("R101.*Pass --to gguf", lambda: convert(source, tmp_path / "x.gguf", "hf")),
        ("R101.*Pass --to pth", lambda: convert(source, tmp_path / "x.pth", "gguf")),
        ("R101.*Quantise with --to mlx", lambda: convert(source, tmp_path / "x", "hf", writing=Writing(bits=4))),
        ("R101.*7 bits", lambda: convert(source, tmp_path / "x", "mlx", writing=Writing(bits=7))),
    ]
    for pattern, action in cases:
        with pytest.raises(RadladsError, match=pattern):
            action()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["a.gguf", "b.pth"]
    convert(source, tmp_path / "q", "mlx", writing=Writing(bits=4, group_size=32))
    with pytest.raises(RadladsError, match=r"R101.*quantised already"):
        convert(tmp_path / "q", tmp_path / "qq", "mlx", writing=Writing(bits=8))
    assert Reading().variant is None and not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["rwkv7", "hxa079", "qwen2"])
def test_pth_is_what_torch_loads_without_pickles(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path, kind, "BF16")
    convert(source, tmp_path / "model.pth", "pth", allow_nonfinite=True, say=lambda text: None)
    for mapped in (False, True):
        state = torch.load(tmp_path / "model.pth", weights_only=True, mmap=mapped)
        weights = open_folder(source).weights
        assert len(state) == len(weights)
        names = {name: name for name in weights}
        if kind == "hxa079":
            assert "blocks.0.att.receptance.weight" in state and "blocks.1.att.q_proj.weight" in state and "emb.weight" in state
            assert "blocks.0.att.ln_r.weight" in state and "blocks.1.att.ln_r.weight" in state
            names = {name: openmose(name) for name in weights}
        for name, entry in weights.items():
            tensor = state[names[name]]
            assert tensor.shape == entry.shape and tensor.is_contiguous()
            assert tensor.view(torch.int16).numpy().tobytes() == read_raw(entry).tobytes(), name
    with pytest.raises(RadladsError, match=r"R204.*Pass --config"):
        open_source(tmp_path / "model.pth")
    reading = Reading(str(source))
    back = convert(tmp_path / "model.pth", tmp_path / "back", "hf", reading=reading, allow_nonfinite=True, say=lambda text: None)
    assert back.source.spec == open_folder(source).spec
    for name, entry in open_folder(tmp_path / "back").weights.items():
        assert read_raw(entry).tobytes() == read_raw(open_folder(source).weights[name]).tobytes()


def openmose(name: str) -> str:
    """A name of ours as the published map has it, written down again."""
    pairs = [("model.layers.", "blocks."), ("self_attn.", "att."), ("mlp.", "ffn."), ("gate_proj", "gate"), ("up_proj", "up")]
    pairs += [("down_proj", "down"), ("input_layernorm", "ln1"), ("post_attention_layernorm", "ln2"), ("r_norm", "ln_r")]
    pairs += [("q_norm", "ln_r"), ("k_norm", "ln_k"), ("model.norm", "ln_out"), ("model.embed_tokens", "emb")]
    pairs += [("lm_head", "head")]
    for ours, theirs in pairs:
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("large", [7, 5000])
def test_archive_of_more_than_four_gigabytes_has_the_fields_of_zip64(large: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pth, "ZIP64", large)  # as if every larger size and place did not fit into 32 bits
    source = make(tmp_path, "qwen3", "F32")
    convert(source, tmp_path / "model.pth", "pth", allow_nonfinite=True, say=lambda text: None)
    with zipfile.ZipFile(tmp_path / "model.pth") as archive:
        assert archive.testzip() is None and len(archive.namelist()) == 3 + len(open_folder(source).weights)
    reading = Reading(str(source))
    convert(tmp_path / "model.pth", tmp_path / "back", "hf", reading=reading, allow_nonfinite=True, say=lambda text: None)
    for name, entry in open_folder(tmp_path / "back").weights.items():
        assert read_raw(entry).tobytes() == read_raw(open_folder(source).weights[name]).tobytes()


def write_gguf(path: Path, folder: Path, changes: dict[str, Any], ours: bool = False) -> None:
    """A GGUF file of a folder's model with changed metadata (None leaves a key out), with our own keys or as others write it."""
    source = open_source(folder)
    meta = gguf_writer.metadata(source, source.tensors, source.dtype)
    meta |= gguf_tokenizer.metadata_of(source.files, source.token_ids, source.spec.V, source.path)
    meta = {name: value for name, value in meta.items() if ours or not name.startswith(("radlads.", "tokenizer.huggingface"))}
    meta = {name: value for name, value in {**meta, **changes}.items() if value is not None}
    theirs = to_theirs(gguf_rules.rules_of(source.spec), source.tensors)
    parts = [gguf_writer.header(meta, theirs)]
    parts += [bytes(as_bytes(piece)) if not isinstance(piece, bytes) else piece
              for segment in gguf_writer.data(theirs) for piece in segment.pieces({})]  # fmt: skip
    path.write_bytes(b"".join(parts))


@pytest.mark.parametrize("kind", ["rwkv6", "llama"])
def test_a_gguf_file_of_others_is_the_same_model_and_what_it_leaves_open_is_told(kind: str, tmp_path: Path) -> None:
    source = make(tmp_path, kind, "BF16")
    arch = "rwkv6qwen2" if kind == "rwkv6" else "llama"
    left_out = {f"{arch}.attention.layer_norm_rms_epsilon": None, f"{arch}.rope.freq_base": None}
    write_gguf(tmp_path / "theirs.gguf", source, left_out)
    found, wanted = open_source(tmp_path / "theirs.gguf"), open_source(source)
    freely = {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "max_positions": found.spec.max_positions}
    assert found.spec == replace(wanted.spec, **freely)
    told = "; ".join(found.notices)
    assert "norm epsilon 1e-06" in told and ("rotary base 10000" in told) == (kind == "llama") == ("clamped at -5" not in told)
    for name, tensor in wanted.tensors.items():
        assert found.tensors[name].whole().tobytes() == tensor.whole().tobytes(), name
    write_gguf(tmp_path / "whole.gguf", source, {})
    assert not any("epsilon" in line or "rotary" in line for line in open_source(tmp_path / "whole.gguf").notices)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("radlads.file.../escaped.txt", "x"),
        ("radlads.file.modeling.py", "raise SystemExit"),
        ("radlads.file.config.json", "{}"),
        ("radlads.config", '{"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}'),
        ("radlads.dtypes", '{"model.norm.weight": "F64", "model.embed_tokens.weight": 5}'),
        ("tokenizer.ggml.bos_token_id", "one"),
        ("radlads.manifest", '{"schema": 1, "stage": null, "history": 5}'),
        ("radlads.manifest", "[1"),
        ("llama.embedding_length", "wide"),
        ("llama.attention.head_count", 0),
        ("llama.rope.freq_base", "x"),
        ("llama.block_count", 2**31),
        ("tokenizer.ggml.tokens", 7),
        ("tokenizer.ggml.merges", ["abc"]),
        ("tokenizer.ggml.pre", "unheard-of"),
        ("general.architecture", "gpt2"),
    ],
)
def test_metadata_of_a_hostile_file_is_refused_in_one_line_or_without_effect(key: str, value: Any, tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher", "llama")
    write_gguf(tmp_path / "hostile.gguf", teacher, {key: value}, ours=not key.startswith(("llama.", "tokenizer.")))
    before = sorted(path.name for path in tmp_path.rglob("*"))
    try:
        convert(tmp_path / "hostile.gguf", tmp_path / "out", "hf", say=lambda text: None)
    except RadladsError as error:
        assert error.code[:2] == "R2" and sorted(path.name for path in tmp_path.rglob("*")) == before
        return
    assert not (tmp_path / "escaped.txt").exists() and not list((tmp_path / "out").glob("*.py"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config and config["hidden_size"] == 64
    open_folder(tmp_path / "out")
