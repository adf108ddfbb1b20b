"""Model folders: what opens, what is refused and how, and that saving is all or nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radlads import folder as folder_module
from radlads.errors import RadladsError
from radlads.files import sha256
from radlads.folder import MANIFEST, ModelFolder, open_folder, save_folder
from radlads.tensors import Entry, Raw, decode, read_raw
from tests.hostile.set_cases import CONFIGS, edit
from tests.models import rewrite, tiny_teacher
from tests.work import calls

ROOT = Path(__file__).parents[2]
DIMS = {"hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4}


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """A very small Qwen3 folder."""
    return tiny_teacher(tmp_path / "teacher", **DIMS)


def raw_tensors(folder: ModelFolder) -> Iterator[tuple[str, str, Raw]]:
    """The tensors of a folder as `save_folder` takes them."""
    for name, entry in folder.weights.items():
        yield name, entry.dtype, read_raw(entry)


def copy(source: ModelFolder, final: Path, **changes: Any) -> ModelFolder:
    """Save a folder's own tensors under another name."""
    given = {
        "spec": source.spec,
        "tensors": raw_tensors(source),
        "source": source,
        "dtype": source.dtype,
        "manifest": {},
        **changes,
    }
    return save_folder(final, **given)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_saved_folder_opens_as_it_was(family: str, tied: bool, dtype: str, tmp_path: Path) -> None:
    source = open_folder(tiny_teacher(tmp_path / "a", family, dtype=dtype, tie_embeddings=tied, **DIMS))
    saved = copy(source, tmp_path / "b")
    assert saved.spec == source.spec and saved.dtype == dtype and saved.stage is None
    assert list(saved.weights) == list(source.spec.tensors())
    for name, entry in source.weights.items():
        assert read_raw(saved.weights[name]).tobytes() == read_raw(entry).tobytes()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (saved.path / name).read_bytes() == (source.path / name).read_bytes()
    assert saved.config["eos_token_id"] == 0 and saved.config["bos_token_id"] is None
    assert saved.config["dtype"] == {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype]


def test_manifest_lists_every_file_with_its_hash(teacher: Path, tmp_path: Path) -> None:
    saved = copy(open_folder(teacher), tmp_path / "b", manifest={"history": [{"kind": "x"}]}, extra_files={"LICENSE": b"mine"})
    assert saved.manifest is not None and saved.manifest["history"] == [{"kind": "x"}]
    files = {path.name: sha256(path) for path in saved.path.iterdir() if path.name != MANIFEST}
    assert saved.manifest["files"] == files and "LICENSE" in files
    again = copy(saved, tmp_path / "c")
    assert again.manifest is not None and again.manifest["history"] == [{"kind": "x"}]


def test_files_that_go_on_to_the_next_folder(teacher: Path, tmp_path: Path) -> None:
    for name in ("LICENSE", "README.md", "modeling_evil.py", "pytorch_model.bin", ".hidden", "other.safetensors.index.json"):
        (teacher / name).write_bytes(b"theirs")
    (teacher / "onnx").mkdir()
    first = copy(open_folder(teacher), tmp_path / "b", extra_files={"model_mlx.py": b"ours", "tokenizer_config.json": b"{}"})
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    expected = {"LICENSE", "model_mlx.py", "config.json", "model.safetensors", MANIFEST, *tokenizer}
    assert {path.name for path in first.path.iterdir()} == expected
    assert (first.path / "tokenizer_config.json").read_bytes() == b"{}"
    second = copy(first, tmp_path / "c", extra_files={"README.md": b"card"})
    third = copy(second, tmp_path / "d")
    assert {path.name for path in third.path.iterdir()} == expected | {"README.md"}


@pytest.mark.parametrize("name", ["../x", "a/b", "config.json", MANIFEST, "model.safetensors", ""])
def test_extra_files_are_plain_and_replace_no_core_file(name: str, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        copy(open_folder(teacher), tmp_path / "b", extra_files={name: b""})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher"]


def test_large_models_are_sharded(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "SHARD_BYTES", 4000)
    source = open_folder(teacher)
    saved = copy(source, tmp_path / "b")
    shards = sorted(path.name for path in saved.path.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert list(saved.weights) == list(source.weights)
    for name, entry in source.weights.items():
        assert read_raw(saved.weights[name]).tobytes() == read_raw(entry).tobytes()
    total = json.loads((saved.path / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(entry.nbytes for entry in source.weights.values())
    monkeypatch.setattr(folder_module, "SHARD_BYTES", 10**9)
    single = copy(saved, tmp_path / "c")
    assert not (single.path / "model.safetensors.index.json").exists()
    assert sha256(single.path / "model.safetensors") == sha256(copy(source, tmp_path / "d").path / "model.safetensors")


def test_dtypes_names_the_exceptions(teacher: Path, tmp_path: Path) -> None:
    source = open_folder(teacher)
    norms = {name: "F32" for name in source.weights if "norm" in name}

    def mixed() -> Iterator[tuple[str, str, Raw]]:
        for name, _, raw in raw_tensors(source):
            yield (name, "F32", raw) if name in norms else (name, "F16", raw.astype(np.float16))

    saved = copy(source, tmp_path / "b", tensors=mixed(), dtype="F16", dtypes=norms)
    assert saved.dtype == "F16" and {saved.weights[name].dtype for name in norms} == {"F32"}


@pytest.mark.parametrize("change", ["fewer", "more", "other order", "other shape"])
def test_wrong_tensors_write_nothing(change: str, teacher: Path, tmp_path: Path) -> None:
    source = open_folder(teacher)
    tensors = list(raw_tensors(source))
    if change == "fewer":
        tensors.pop()
    elif change == "more":
        tensors.append(tensors[0])
    elif change == "other order":
        tensors[0], tensors[1] = tensors[1], tensors[0]
    else:
        tensors[0] = (tensors[0][0], "F32", np.zeros((1, 1), np.float32))
    with pytest.raises(ValueError):
        copy(source, tmp_path / "b", tensors=iter(tensors))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_output_may_not_touch_the_input(teacher: Path, tmp_path: Path) -> None:
    source = open_folder(teacher)
    before = {path.name: sha256(path) for path in teacher.iterdir()}
    (tmp_path / "link").symlink_to("teacher")
    (tmp_path / MANIFEST).write_text("{}")  # else the folder that holds the input would be spared as no model
    for target in (teacher, teacher / "inside", tmp_path, tmp_path / "x" / ".." / "teacher", tmp_path / "link" / "inside"):
        with pytest.raises(RadladsError, match="R401"):
            copy(source, target, overwrite=True)
    assert {path.name: sha256(path) for path in teacher.iterdir()} == before


def test_overwriting_replaces_model_folders_only(teacher: Path, tmp_path: Path) -> None:
    source = open_folder(teacher)
    first = copy(source, tmp_path / "b", extra_files={"old": b""})
    with pytest.raises(RadladsError, match=r"R401.*exists"):
        copy(source, first.path)
    assert not (copy(source, first.path, overwrite=True).path / "old").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(RadladsError, match=r"R401.*not replaced"):
        copy(source, tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").exists()


def test_no_space_is_told_before_anything_is_written(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RadladsError, match=r"R402.*[\d,]+ bytes are needed and 1,000 free"):
        copy(open_folder(teacher), tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_source_that_changes_while_it_is_read_is_noticed(teacher: Path, tmp_path: Path) -> None:
    source = open_folder(teacher)

    def touching() -> Iterator[tuple[str, str, Raw]]:
        yield from raw_tensors(source)
        os.utime(teacher / "model.safetensors", ns=(1, 1))

    with pytest.raises(RadladsError, match=r"R201.*changed"):
        copy(source, tmp_path / "b", tensors=touching())
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.008, 0.015, 0.03])
def test_kill_leaves_a_complete_folder_or_none(delay: float, teacher: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.radlads.test_folder import copy, open_folder
source = open_folder({str(teacher)!r})
print(flush=True)
copy(source, Path({str(tmp_path / "out" / "b")!r}))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    final = tmp_path / "out" / "b"
    if final.exists():
        killed = open_folder(final)
        assert killed.manifest is not None
        assert killed.manifest["files"] == {path.name: sha256(path) for path in final.iterdir() if path.name != MANIFEST}
        shutil.rmtree(final)
    copy(open_folder(teacher), final)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]


def test_faults_of_the_tensors_are_named_at_once(teacher: Path) -> None:
    def spoil(stored: dict[str, tuple[str, Raw]]) -> None:
        del stored["model.norm.weight"]
        stored["extra.weight"] = ("F32", np.zeros(1, np.float32))
        stored["model.layers.1.mlp.up_proj.weight"] = ("F32", np.zeros((8, 12), np.float32))
        stored["lm_head.weight"] = ("I32", np.zeros((300, 8), np.int32))

    rewrite(teacher, spoil)
    with pytest.raises(RadladsError) as caught:
        open_folder(teacher)
    assert caught.value.code == "R203"
    for words in (
        "4 faults",
        "model.norm.weight is missing",
        "extra.weight is unknown",
        "up_proj.weight is [8, 12], the config needs [12, 8]",
        "is I32",
    ):
        assert words in caught.value.why


def test_half_precision_kinds_are_not_mixed(teacher: Path) -> None:
    def mix(stored: dict[str, tuple[str, Raw]]) -> None:
        stored["model.norm.weight"] = ("BF16", np.zeros(8, np.uint16))
        stored["lm_head.weight"] = ("F16", np.zeros((300, 8), np.float16))

    rewrite(teacher, mix)
    with pytest.raises(RadladsError, match=r"R203.*F16 and BF16 are mixed"):
        open_folder(teacher)


def test_stored_head_of_a_tied_model_must_equal_the_embedding(tmp_path: Path) -> None:
    path = tiny_teacher(tmp_path / "a", tie_embeddings=True, **DIMS)
    rewrite(path, lambda stored: stored.update({"lm_head.weight": stored["model.embed_tokens.weight"]}))
    assert "lm_head.weight" not in open_folder(path).weights

    def differ(stored: dict[str, tuple[str, Raw]]) -> None:
        stored["lm_head.weight"][1][299, 7] += 1

    rewrite(path, differ)
    with pytest.raises(RadladsError, match=r"R203.*ties lm_head"):
        open_folder(path)


def test_head_in_another_dtype_is_compared_by_value(tmp_path: Path) -> None:
    path = tiny_teacher(tmp_path / "a", tie_embeddings=True, dtype="BF16", **DIMS)
    rewrite(
        path, lambda stored: stored.update({"lm_head.weight": ("F32", decode(stored["model.embed_tokens.weight"][1], "BF16"))})
    )
    assert "lm_head.weight" not in open_folder(path).weights
    rewrite(path, lambda stored: stored.update({"lm_head.weight": ("F32", np.zeros((300, 8), np.float32))}))
    with pytest.raises(RadladsError, match=r"R203.*ties lm_head"):
        open_folder(path)


def test_rotary_buffers_are_ignored(teacher: Path) -> None:
    rewrite(
        teacher, lambda stored: stored.update({"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", np.ones(2, np.float32))})
    )
    assert not any("rotary" in name for name in open_folder(teacher).weights)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_values_that_are_not_finite_are_refused(value: float, dtype: str, tmp_path: Path) -> None:
    path = tiny_teacher(tmp_path / "a", dtype=dtype, **DIMS)
    assert open_folder(path).check_finite() == []
    patterns = {"F32": np.float32(value), "F16": np.float16(value), "BF16": np.float32(value).view(np.uint32) >> 16}

    def spoil(stored: dict[str, tuple[str, Raw]]) -> None:
        stored["lm_head.weight"][1][7, 3] = patterns[dtype]

    rewrite(path, spoil)
    folder = open_folder(path)
    with pytest.raises(RadladsError, match=r"R207.*lm_head\.weight"):
        folder.check_finite()
    assert folder.check_finite(allow=True) == ["lm_head.weight"]


def test_unread_tensors_may_hold_anything(teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_folder(teacher)
    spec = source.spec.as_student("rwkv7")

    def filled() -> Iterator[tuple[str, str, Raw]]:
        for name, row in spec.tensors().items():
            yield name, "F32", np.full(row.shape, 1.0 if row.read else np.nan, np.float32)

    student = copy(source, tmp_path / "s", spec=spec, tensors=filled(), manifest={"stage": 0})
    bad = student.check_finite()
    assert "model.layers.0.self_attn.v0" in bad and "model.layers.1.self_attn.v0" not in bad
    assert "v0" in caplog.text


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config_is_one_error_naming_the_folder(case: str, teacher: Path) -> None:
    changes, code = CONFIGS[case]
    edit(teacher, **changes)

    def refused() -> None:
        with pytest.raises(RadladsError, match=code) as caught:
            open_folder(teacher)
        assert str(teacher) in str(caught.value) and "\n" not in str(caught.value)

    assert calls(refused) < 300_000


@pytest.mark.parametrize(
    "text", ["", "[]", "null", '"x"', "{", '{"model_type": "qwen3", "model_type": "llama"}', "[" * 5000, "\x00", '{"a": NaN}']
)
def test_config_that_is_no_table_is_r204(text: str, teacher: Path) -> None:
    (teacher / "config.json").write_text(text)
    with pytest.raises(RadladsError, match="R204"):
        open_folder(teacher)


def test_code_named_in_a_config_is_not_run(teacher: Path) -> None:
    edit(teacher, auto_map={"AutoConfig": "evil.Config"}, model_file="evil.py")
    (teacher / "evil.py").write_text("raise SystemExit('ran')")
    assert open_folder(teacher).spec.family == "qwen3"


SPEC_FAULTS: dict[str, Any] = {
    "layers": "two",
    "mixers": ["softmax", "magic"],
    "mixer": {"gate": "half"},
    "ranks": {"decay": "x"},
    "unknown": 1,
    "num_layers": 10**9,
    "hidden_size": None,
}


@pytest.mark.parametrize("key", SPEC_FAULTS)
def test_bad_student_spec_is_one_error(key: str, teacher: Path, tmp_path: Path) -> None:
    source = open_folder(teacher)
    spec = source.spec.as_student("rwkv6")
    student = copy(source, tmp_path / "s", spec=spec, tensors=zeros(spec), manifest={"stage": 1})
    assert student.stage == 1
    spoiled = {**spec.to_dict(), key: SPEC_FAULTS[key]}
    edit(student.path, radlads=spoiled)
    with pytest.raises(RadladsError, match=r"R20[34]"):
        open_folder(student.path)


def zeros(spec: Any) -> Iterator[tuple[str, str, Raw]]:
    """Zero tensors for a spec."""
    for name, row in spec.tensors().items():
        yield name, "F32", np.zeros(row.shape, np.float32)


@pytest.mark.parametrize(
    "manifest",
    [{}, {"schema": 2, "stage": 1}, *({"stage": stage} for stage in (4, -1, "1", 1.0, True, None, [1]))],
    ids=str,
)
def test_bad_manifest_is_r204(manifest: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    source = open_folder(teacher)
    spec = source.spec.as_student("rwkv7")
    student = copy(source, tmp_path / "s", spec=spec, tensors=zeros(spec), manifest={"stage": 2})
    (student.path / MANIFEST).write_text(json.dumps({"schema": 1, **manifest}))
    with pytest.raises(RadladsError, match="R204"):
        open_folder(student.path)


def test_folder_that_is_none(teacher: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", teacher / "config.json"):
        with pytest.raises(RadladsError, match="R201"):
            open_folder(path)
    (teacher / "config.json").unlink()
    with pytest.raises(RadladsError, match=r"R201.*config\.json"):
        open_folder(teacher)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "radlads.json"])
def test_links_out_of_the_folder_are_not_followed(name: str, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (teacher / name).unlink(missing_ok=True)
    (teacher / name).symlink_to("../secret")
    with pytest.raises(RadladsError, match=r"R201.*leaves the model folder"):
        copy(open_folder(teacher), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_weights_are_left_alone_when_not_asked_for(teacher: Path) -> None:
    (teacher / "model.safetensors").write_bytes(b"")
    folder = open_folder(teacher, weights=False)
    assert folder.weights == {} and folder.spec.hidden_size == 8


def test_majority_of_bytes_decides_the_dtype(teacher: Path) -> None:
    folder = open_folder(teacher)
    big, small = (Entry(name, dtype, (n,), teacher, 0, n) for name, dtype, n in (("a", "BF16", 20), ("b", "F32", 10)))
    assert replace(folder, weights={"a": big, "b": small}).dtype == "BF16"
