"""Transfer: the teacher's tensors bit for bit, and first values equal to formulas written down again here."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radlads.errors import RadladsError
from radlads.files import sha256
from radlads.folder import ModelFolder, open_folder
from radlads.spec import ModelSpec
from radlads.tensors import read_float32, read_raw
from radlads.weights_tools.surgery import make_student
from tests.models import rewrite, tiny_teacher

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("RADLADS_SHARED_DATA", ROOT.parent / "shared" / "data"))
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
}


def student_of(teacher: Path, out: Path, arch: str = "rwkv7", options: dict[str, Any] | None = None, **more: Any) -> ModelFolder:
    """The step-0 student of a teacher folder."""
    return make_student(open_folder(teacher), out, arch=arch, options=options or {}, **more)


def bf16(values: Any) -> np.ndarray:
    """Nearest bf16 numbers, computed by rounding the significand to 8 bits in float64."""
    values = np.asarray(values, np.float64)
    significand, exponent = np.frexp(values)
    return np.ldexp(np.round(significand * 256), exponent - 8)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("arch", ["rwkv6", "rwkv7"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_teacher_tensors_are_bit_identical(family: str, arch: str, dtype: str, tmp_path: Path) -> None:
    teacher = open_folder(tiny_teacher(tmp_path / "t", family, dtype=dtype, **SMALL))
    student = make_student(teacher, tmp_path / "s", arch=arch, options={}, keep_softmax=[1])
    for name, entry in teacher.weights.items():
        copied = student.weights[name]
        assert copied.dtype == entry.dtype and read_raw(copied).tobytes() == read_raw(entry).tobytes()
    new = set(student.weights) - set(teacher.weights)
    assert new and all(student.weights[name].dtype == dtype for name in new)
    assert not any(".layers.1." in name for name in new)
    assert student.spec.mixers == (arch, "softmax", arch) and student.stage == 0 and student.check_finite() == []


@pytest.mark.parametrize("keep", [(), (0,), (2,), (0, 1), (2, 0), (1, 1)])
def test_any_set_of_layers_stays_softmax(keep: tuple[int, ...], tmp_path: Path) -> None:
    student = student_of(tiny_teacher(tmp_path / "t", **SMALL), tmp_path / "s", keep_softmax=keep)
    assert student.spec.kept_layers == tuple(sorted(set(keep)))
    converted = {int(name.split(".")[2]) for name in student.weights if name.endswith("self_attn.w0")}
    assert converted == {0, 1, 2} - set(keep)
    assert student.manifest is not None and student.manifest["student"]["keep_softmax"] == sorted(set(keep))


def assert_semi_orthogonal(matrix: np.ndarray, scale: float) -> None:
    """W = gain * Q with orthonormal columns or rows; gain = scale * sqrt(rows / cols) for tall ones (torch's rule)."""
    rows, cols = matrix.shape
    gain = scale * math.sqrt(rows / cols) if rows > cols else scale
    gram = matrix.T @ matrix if rows >= cols else matrix @ matrix.T
    np.testing.assert_allclose(gram, gain**2 * np.eye(len(gram)), atol=gain**2 * 5e-3)


def test_first_values_of_rwkv7(tmp_path: Path) -> None:
    student = student_of(tiny_teacher(tmp_path / "t", **SMALL), tmp_path / "s", options={"variant": "B"})
    D, C, L = 32, 64, 3
    for layer in range(L):
        w = {
            name.rpartition("self_attn.")[2]: read_float32(entry).astype(np.float64)
            for name, entry in student.weights.items()
            if f".layers.{layer}.self_attn." in name
        }
        rho = layer / (L - 1)
        decay = np.array([-7 + 5 * (n / (C - 1)) ** (0.85 + math.sqrt(rho)) for n in range(C)])
        np.testing.assert_array_equal(w["w0"].reshape(-1), bf16(bf16(decay) + 0.5))
        assert w["w0"].shape == w["a0"].shape == w["v0"].shape == w["k_k"].shape == w["k_a"].shape == (1, 1, C)
        for name in ("w1", "a0", "a1", "v1", "g1", "r_k", "ln_x.bias"):
            assert not w[name].any()
        for name in ("w2", "a2", "g2", *(["v2"] if layer else [])):
            assert_semi_orthogonal(w[name], 0.1)
            np.testing.assert_array_equal(w[name], bf16(w[name]))
        assert (w["v0"] == (1.0 if layer else 0.0)).all()
        np.testing.assert_allclose(w["k_k"], 0.85, atol=2**-9)
        assert (w["k_a"] == 1).all() and (w["ln_x.weight"] == 1).all()
        assert w["w1"].shape == (D, 32) and w["w2"].shape == (32, C) and w["r_k"].shape == (4, 16)


def test_first_values_of_rwkv6(tmp_path: Path) -> None:
    student = student_of(tiny_teacher(tmp_path / "t", **SMALL), tmp_path / "s", "rwkv6")
    C, L = 64, 3
    for layer in range(L):
        w = {
            name.rpartition("self_attn.")[2]: read_float32(entry).astype(np.float64)
            for name, entry in student.weights.items()
            if f".layers.{layer}.self_attn." in name
        }
        decay = np.array([-6 + 5 * (n / (C - 1)) ** (0.7 + 1.3 * layer / (L - 1)) for n in range(C)])
        np.testing.assert_array_equal(w["time_decay"].reshape(-1), bf16(decay))
        assert (w["time_maa_x"] == 1).all()
        for name in (
            "time_maa_r",
            "time_maa_k",
            "time_maa_v",
            "time_maa_w",
            "time_maa_g",
            "time_maa_w1",
            "time_decay_w1",
            "gate.weight",
        ):
            assert not w[name].any()
        for name in ("time_maa_w2", "time_decay_w2"):
            values = w[name]
            bound = float(bf16(0.01))
            assert np.abs(values).max() <= bound and np.abs(values).max() > 0.0095
            assert abs(values.mean()) < 0.0005 and abs(values.std() - 0.01 / math.sqrt(3)) < 0.0005
            np.testing.assert_array_equal(values, bf16(values))


@pytest.mark.parametrize("arch", ["hxa079", "hxa07b"])
def test_first_values_of_hxa(arch: str, tmp_path: Path) -> None:
    student = student_of(tiny_teacher(tmp_path / "t", **SMALL), tmp_path / "s", arch)
    N, C, L = 16, 64, 3
    for layer in range(L):
        w = {
            name.rpartition("self_attn.")[2]: read_float32(entry).astype(np.float64)
            for name, entry in student.weights.items()
            if f".layers.{layer}.self_attn." in name
        }
        z = [((n % N) - (N - 1) / 2) / ((N - 1) / 2) for n in range(C)]
        z = np.array([y * abs(y) for y in z])
        lin = np.arange(C) / (C - 1)
        np.testing.assert_array_equal(w["w0"].reshape(-1), bf16(-5.5 + 6 * lin ** (1 + (layer / (L - 1)) ** 0.3) + 2.5 * z))
        np.testing.assert_array_equal(w["a0"].reshape(-1), bf16(-0.19 + 0.3 * z + 0.4 * (lin - 0.5)))
        second = [name for name in w if name in ("w2", "a2", "g2", "v2", "k2")]
        assert len(second) == (5 if arch == "hxa079" else 4)
        for name in second:
            assert_semi_orthogonal(w[name], 0.1)
            assert not w[name[0] + "1"].any()
        if arch == "hxa079":
            for name, value in (("v0", 0.73), ("k0", 0.73), ("r_k", -0.04)):
                assert (w[name] == bf16(np.array(value))).all()


def test_hxa_takes_over_under_other_names_and_scaled(tmp_path: Path) -> None:
    teacher = open_folder(tiny_teacher(tmp_path / "t", "qwen3", dtype="BF16", qkv_bias=True, output_bias=True, **SMALL))
    student = make_student(
        teacher, tmp_path / "s", arch="hxa079", keep_softmax=[1], options={}, transfer_scale=(1.0, 0.5, 0.3, 0.5)
    )
    names = {"receptance": ("q_proj", 1.0), "key": ("k_proj", 0.5), "value": ("v_proj", 0.3), "output": ("o_proj", 0.5)}
    for layer in (0, 2):
        place = f"model.layers.{layer}.self_attn."
        for ours, (theirs, factor) in names.items():
            for part in ("weight", "bias") if ours != "output" else ("weight",):
                wanted = bf16(read_float32(teacher.weights[f"{place}{theirs}.{part}"]) * np.float32(factor))
                np.testing.assert_array_equal(read_float32(student.weights[f"{place}{ours}.{part}"]), wanted)
        for ours, theirs in (("r_norm", "q_norm"), ("k_norm", "k_norm")):
            a, b = student.weights[f"{place}{ours}.weight"], teacher.weights[f"{place}{theirs}.weight"]
            assert read_raw(a).tobytes() == read_raw(b).tobytes()
    name = "model.layers.1.self_attn.v_proj.weight"
    assert read_raw(student.weights[name]).tobytes() == read_raw(teacher.weights[name]).tobytes()
    assert student.manifest is not None and student.manifest["student"]["transfer_scale"] == [1.0, 0.5, 0.3, 0.5]
    with pytest.raises(RadladsError, match=r"R101.*four numbers"):
        make_student(teacher, tmp_path / "u", arch="hxa079", options={}, transfer_scale=(1.0, 0.5))


def test_projections_may_begin_at_random(tmp_path: Path) -> None:
    teacher = open_folder(tiny_teacher(tmp_path / "t", "qwen2", dtype="BF16", qkv_bias=True))
    student = make_student(teacher, tmp_path / "s", arch="rwkv7", keep_softmax=[1], options={}, reinit=True)
    assert student.manifest is not None and student.manifest["student"]["reinit"] is True
    for name, entry in teacher.weights.items():
        same = read_raw(student.weights[name]).tobytes() == read_raw(entry).tobytes()
        assert same == (not name.startswith("model.layers.0.self_attn.")), name
    for letter in "qkvo":
        values = read_float32(student.weights[f"model.layers.0.self_attn.{letter}_proj.weight"])
        bound = values.shape[1] ** -0.5
        assert 0.9 * bound < np.abs(values).max() <= bound * 1.01 and abs(values.mean()) < bound / 10
    assert not read_float32(student.weights["model.layers.0.self_attn.q_proj.bias"]).any()


@pytest.mark.parametrize(("arch", "wanted"), [("hxa079", (256, 128, 96, 96, 256)), ("rwkv7", (128, 128, 96, 0, 480))])
def test_published_ranks_of_qwen3_8b(arch: str, wanted: tuple[int, ...]) -> None:
    ranks = ModelSpec("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, qk_norm=True).as_student(arch).ranks
    assert (ranks.decay, ranks.iclr, ranks.value_residual, ranks.key_residual, ranks.gate) == wanted


def test_seed_decides_random_tensors_and_nothing_else(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "t", **SMALL)
    first, same, other = (student_of(teacher, tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert sha256(first.path / "model.safetensors") == sha256(same.path / "model.safetensors")
    differing = {
        name for name, entry in first.weights.items() if read_raw(entry).tobytes() != read_raw(other.weights[name]).tobytes()
    }
    assert {name.rpartition(".")[2] for name in differing} == {"w2", "a2", "v2", "g2"}
    kept = student_of(teacher, tmp_path / "d", seed=1, keep_softmax=[0])
    name = "model.layers.1.self_attn.w2"
    assert read_raw(kept.weights[name]).tobytes() == read_raw(first.weights[name]).tobytes()


@pytest.mark.parametrize("untie", [False, True])
def test_head_of_a_tied_teacher(untie: bool, tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "t", tie_embeddings=True, dtype="BF16", **SMALL)
    student = student_of(teacher, tmp_path / "s", untie=untie)
    assert student.spec.tie_embeddings is not untie and ("lm_head.weight" in student.weights) is untie
    assert student.config["tie_word_embeddings"] is not untie
    if untie:
        head, embedding = (read_raw(student.weights[name]) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        assert head.tobytes() == embedding.tobytes()


def test_mixed_dtypes_of_the_teacher_are_kept(tmp_path: Path) -> None:
    path = tiny_teacher(tmp_path / "t", dtype="BF16", **SMALL)
    rewrite(path, lambda stored: stored.update({"model.norm.weight": ("F32", np.linspace(0.5, 1.5, 32, dtype=np.float32))}))
    student = student_of(path, tmp_path / "s")
    assert student.dtype == "BF16" and student.weights["model.norm.weight"].dtype == "F32"
    assert student.weights["model.layers.0.self_attn.w0"].dtype == "BF16"
    np.testing.assert_array_equal(read_float32(student.weights["model.norm.weight"]), np.linspace(0.5, 1.5, 32, dtype=np.float32))


def test_manifest_tells_the_teacher_and_the_choice(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "t", **SMALL)
    student = student_of(
        teacher,
        tmp_path / "s",
        options={"gate": "full"},
        seed=9,
        extra_files={"model.py": b"x"},
        config_extra={"model_file": "model.py"},
    )
    assert student.manifest is not None
    assert student.manifest["teacher"] == {
        "name": "t",
        "family": "qwen3",
        "license": {},
        "files": {path.name: sha256(path) for path in teacher.iterdir()},
    }
    assert student.manifest["student"] == {"arch": "rwkv7", "keep_softmax": [], "options": {"gate": "full"}, "seed": 9}
    assert student.config["model_file"] == "model.py" and (student.path / "model.py").read_bytes() == b"x"
    assert student.spec.mixer.gate == "full"


@pytest.mark.parametrize(
    ("choice", "code"),
    [
        ({"arch": "mamba"}, "R101"),
        ({"keep_softmax": [3]}, "R101"),
        ({"keep_softmax": [-1]}, "R101"),
        ({"keep_softmax": [0, 1, 2]}, "R101"),
        ({"options": {"gaet": "full"}}, "R101"),
        ({"options": {"gate": "half"}}, "R101"),
        ({"options": {"variant": "D"}}, "R101"),
        ({"options": {"token_shift": True}}, "R101"),
        ({"arch": "hxa079", "options": {"gate": "full"}}, "R101"),
    ],
)  # fmt: skip
def test_impossible_choices_write_nothing(choice: dict[str, Any], code: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "t", **SMALL)
    with pytest.raises(RadladsError, match=code):
        student_of(teacher, tmp_path / "s", **choice)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_student_is_no_teacher(tmp_path: Path) -> None:
    student = student_of(tiny_teacher(tmp_path / "t", **SMALL), tmp_path / "s")
    with pytest.raises(RadladsError, match=r"R103.*already"):
        student_of(student.path, tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_teacher_with_nan_is_refused(tmp_path: Path) -> None:
    path = tiny_teacher(tmp_path / "t", **SMALL)
    rewrite(path, lambda stored: stored["model.norm.weight"][1].fill(np.nan))
    with pytest.raises(RadladsError, match=r"R207.*model\.norm\.weight"):
        student_of(path, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_real_teacher(tmp_path: Path) -> None:
    path = DATA / "stories260K" / "hf"
    if not path.is_dir():
        pytest.skip(f"the shared data is absent ({path}); set RADLADS_SHARED_DATA")
    teacher = open_folder(path)
    assert (teacher.dtype, teacher.spec.L, teacher.spec.N, teacher.spec.tie_embeddings) == ("F32", 5, 8, True)
    student = make_student(teacher, tmp_path / "s", arch="rwkv7", options={}, keep_softmax=[4])
    for name, entry in teacher.weights.items():
        assert read_raw(student.weights[name]).tobytes() == read_raw(entry).tobytes()
    assert (student.path / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
    assert json.loads((student.path / "config.json").read_text())["eos_token_id"] == 2


# Peak of the memory that belongs to the process alone; mapped files are the kernel's to drop.
WATCHED_TRANSFER = """
import sys, threading, time
from pathlib import Path
from radlads.folder import open_folder
from radlads.weights_tools.surgery import make_student

def own_bytes():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

def watch():
    while not done.is_set():
        peaks.append(own_bytes())
        time.sleep(0.001)

teacher, done, peaks = open_folder(sys.argv[1]), threading.Event(), [0]
start, thread = own_bytes(), threading.Thread(target=watch)
thread.start()
make_student(teacher, Path(sys.argv[2]), arch="rwkv7", options={})
done.set()
thread.join()
print((max(peaks) - start) / 2**20)
"""


def test_memory_of_a_transfer_stays_below_the_model(tmp_path: Path) -> None:
    """90 MB of weights pass through a few blocks of 16 MB and the largest new tensor."""
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc")
    teacher = tiny_teacher(
        tmp_path / "t", hidden_size=512, intermediate_size=4096, num_layers=3, num_heads=8, num_kv_heads=8, head_dim=64
    )
    command = [sys.executable, "-c", WATCHED_TRANSFER, str(teacher), str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (teacher / "model.safetensors").stat().st_size > 85e6
    assert float(done.stdout) < 40
