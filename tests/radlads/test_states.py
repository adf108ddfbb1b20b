"""State files: exact on the backend that made them, close on the other, of a fixed size, refused when anything is wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from radlads.backends import open_engine
from radlads.errors import RadladsError
from radlads.folder import ModelFolder, open_folder
from radlads.session import Context, Point
from radlads.states import HEADER, load_state, model_fingerprint, save_state
from radlads.tensors import decode, encode, read_header, read_raw
from radlads.weights_tools.surgery import make_student
from tests.models import rewrite, tiny_teacher

BACKENDS = ("torch", "mlx")


@pytest.fixture(scope="module", params=["rwkv6", "rwkv7", "hxa079"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A hybrid with one softmax layer, so that every kind of state is there."""
    place = tmp_path_factory.mktemp("states")
    teacher = open_folder(tiny_teacher(place / "teacher", num_layers=3))
    make_student(teacher, place / "student", arch=request.param, keep_softmax=(1,), options={}, seed=3)
    rewrite(place / "student", stir)
    return open_folder(place / "student")


def stir(tensors: dict[str, tuple[str, np.ndarray]]) -> None:
    """Move every weight a little: a fresh student's gates and low-rank pairs are closed, and would hide a wrong state."""
    rng = np.random.default_rng(0)
    for name, (dtype, raw) in tensors.items():
        tensors[name] = (dtype, encode(decode(raw, dtype) + 0.05 * rng.standard_normal(raw.shape).astype(np.float32), dtype))


def reach(folder: ModelFolder, backend: str, ids: list[int]) -> tuple[object, Point]:
    engine = open_engine(folder, backend)
    return engine, Context(engine).reach(ids)[0]


def next_logits(engine: object, point: Point, ids: list[int]) -> np.ndarray:
    rows, state = [point.logits], point.state
    for token in ids:
        logits, state = engine.feed(state, [token])  # type: ignore[attr-defined]
        rows.append(logits)
    return np.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_goes_on_bit_for_bit_on_its_backend(student: ModelFolder, backend: str, tmp_path: Path) -> None:
    engine, point = reach(student, backend, list(range(5, 45)))
    save_state(tmp_path / "s", engine, point, model_fingerprint(student))  # type: ignore[arg-type]
    saved = load_state(tmp_path / "s", model_fingerprint(student))
    assert saved.position == 40 and saved.session is None and saved.follows == "text"
    after = list(range(60, 80))
    assert np.array_equal(next_logits(engine, saved.point(engine), after), next_logits(engine, point, after))  # type: ignore[arg-type]


@pytest.mark.parametrize(("backend", "tokens"), [("torch", 256), ("mlx", 16)])
def test_the_other_backend_goes_on_with_the_same_file(student: ModelFolder, backend: str, tokens: int, tmp_path: Path) -> None:
    engine, point = reach(student, backend, list(range(5, 45)))
    save_state(tmp_path / "s", engine, point, model_fingerprint(student))  # type: ignore[arg-type]
    other = open_engine(student, BACKENDS[1 - BACKENDS.index(backend)])
    after = [(7 * step) % 90 + 3 for step in range(tokens)]
    mine = next_logits(engine, point, after)
    theirs = next_logits(other, load_state(tmp_path / "s", model_fingerprint(student)).point(other), after)
    assert np.abs(mine - theirs).max() <= 1e-4


def pure_student(tmp_path: Path, seed: int = 3) -> ModelFolder:
    teacher = open_folder(tiny_teacher(tmp_path / f"teacher-{seed}"))
    make_student(teacher, tmp_path / f"student-{seed}", arch="rwkv7", options={}, seed=seed)
    return open_folder(tmp_path / f"student-{seed}")


def test_the_size_does_not_depend_on_the_length(tmp_path: Path) -> None:
    folder = pure_student(tmp_path)
    engine = open_engine(folder, "torch")
    sizes = set()
    for length in (1000, 9000):
        ids = [step % 90 + 3 for step in range(length)]
        sizes.add(save_state(tmp_path / "s", engine, Context(engine).reach(ids)[0], model_fingerprint(folder)))
    assert len(sizes) == 1


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, ModelFolder]:
    folder = pure_student(tmp_path)
    engine, point = reach(folder, "torch", [3, 4, 5])
    save_state(tmp_path / "s", engine, point, model_fingerprint(folder))  # type: ignore[arg-type]
    return tmp_path / "s", folder


def test_a_state_of_another_model_is_refused(file: tuple[Path, ModelFolder], tmp_path: Path) -> None:
    other = pure_student(tmp_path, seed=4)
    with pytest.raises(RadladsError, match="made with another model") as caught:
        load_state(file[0], model_fingerprint(other))
    assert caught.value.code == "R304"


def test_no_flipped_bit_goes_unseen(file: tuple[Path, ModelFolder]) -> None:
    path, folder = file
    whole, fingerprint = path.read_bytes(), model_fingerprint(folder)
    for position in np.random.default_rng(0).integers(0, len(whole), 60):
        spoilt = bytearray(whole)
        spoilt[position] ^= 1 << int(position % 8)
        path.write_bytes(spoilt)
        try:
            load_state(path, fingerprint)
        except RadladsError as error:
            assert error.code in ("R202", "R304")
        else:
            # Only what no reader reads may differ: the format's own free text and padding.
            path.write_bytes(whole)
            start = min(entry.start for entry in read_header(path).values())
            assert position < start


def test_a_newer_version_is_named(file: tuple[Path, ModelFolder]) -> None:
    path, folder = file
    about = json.loads(read_raw(read_header(path)[HEADER]).tobytes())
    assert about["schema"] == 1 and about["position"] == 3
    path.write_bytes(path.read_bytes().replace(b'"schema": 1', b'"schema": 2'))
    with pytest.raises(RadladsError, match=r"its version is 2, and this radlads reads version 1.*Update radlads"):
        load_state(path, model_fingerprint(folder))


def test_another_file_is_no_state(file: tuple[Path, ModelFolder]) -> None:
    with pytest.raises(RadladsError, match="it is no state file"):
        load_state(file[1].path / "model.safetensors", "x")
    with pytest.raises(RadladsError, match="R201"):
        load_state(file[0].parent / "nothing", "x")
