"""Outputs are complete or absent, a killed run is continued with the same bytes, and memory does not grow with the tensor."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from radlads.errors import RadladsError
from radlads.tensors import layout, read_header
from radlads.weights_tools import output
from radlads.weights_tools.output import Finished, OutputFile, Segment, fixed, resume, write_output
from tests.models import tiny_teacher

ROOT = Path(__file__).parents[2]


def files(log: list[str], stop_at: str = "") -> list[OutputFile]:
    """Two files of four segments; `log` gets the label of each segment that is made, and `stop_at` is never finished."""

    def segment(label: str, size: int) -> Segment:
        def pieces(checks: dict[str, int]):
            log.append(label)
            for start in range(0, size, 1000):
                if label == stop_at and start:
                    raise KeyboardInterrupt
                yield bytes([len(label) % 256]) * min(1000, size - start)

        return Segment(label, size, pieces)

    def end(checks: dict[str, int]):
        yield json.dumps(checks).encode().ljust(200)

    names = ("a", "b")
    return [
        OutputFile(
            f"{name}.bin",
            [fixed(f"{name}0", b"head"), segment(f"{name}1", 2500), segment(f"{name}2", 3100), Segment(f"{name}3", 200, end)],
            checks=True,
        )
        for name in names
    ]


def run(final: Path, plan: list[OutputFile], key: str = "k", **more: object) -> None:
    """Write the plan."""
    write_output(final, plan, key=key, small_files=lambda hashes: {"hashes.json": json.dumps(dict(hashes)).encode()}, **more)


@pytest.mark.parametrize("stop_at", ["a1", "a2", "b1", "b2"])
def test_interrupted_work_goes_on_where_it_stopped_with_the_same_bytes(stop_at: str, tmp_path: Path, monkeypatch) -> None:
    run(tmp_path / "whole", files([]))
    monkeypatch.setattr(output, "SYNC_BYTES", 1)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", files([], stop_at))
    assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [".out.convert.partial"]
    journal = tmp_path / ".out.convert.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"file": "a.bin", "segm')  # a line cut by the kill
    log: list[str] = []
    seen: list[tuple[int, int]] = []
    run(tmp_path / "out", files(log), report=lambda done, total: seen.append((done, total)))
    assert log[0] == stop_at and seen[-1] == (2 * 6 - 1 + 11597, 11608)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    assert not list(tmp_path.glob(".*")) and "journal.jsonl" not in os.listdir(tmp_path / "out")


def test_other_work_a_shorter_file_or_a_damaged_journal_begin_anew(tmp_path: Path) -> None:
    def interrupted() -> Path:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "out", files([], "b2"))
        return tmp_path / ".out.convert.partial"

    partial = interrupted()
    assert resume(partial, "k") == {"a.bin": Finished(4, 5804, resume(partial, "k")["a.bin"].checks)}
    assert resume(partial, "other") == {} and os.listdir(partial) == ["journal.jsonl"]
    (interrupted() / "a.bin").write_bytes(b"short")
    assert resume(partial, "k") == {}
    (interrupted() / "journal.jsonl").write_text('{"key": "k"}\n[1]\n')
    assert resume(partial, "k") == {}


def test_errors_leave_nothing_and_a_second_writer_is_refused(tmp_path: Path) -> None:
    short = [OutputFile("a.bin", [Segment("a", 10, lambda checks: [b"x"])])]
    with pytest.raises(ValueError, match="1 bytes came where 10 were planned"):
        run(tmp_path / "out", short)
    huge = [OutputFile("a.bin", [Segment("a", 2**62, lambda checks: [b"x"])])]
    with pytest.raises(RadladsError, match="R402"):
        run(tmp_path / "out", huge)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.convert.partial").mkdir()
    with output.locked(tmp_path / ".out.convert.partial"), pytest.raises(RadladsError, match=r"R401.*another conversion"):
        run(tmp_path / "out", files([]))


def test_killed_command_is_continued(tmp_path: Path) -> None:
    source = tiny_teacher(tmp_path / "teacher", vocab_size=20_000, hidden_size=256)
    command = [sys.executable, "-m", "radlads", "convert", str(source), "--quiet", "--output-dir"]
    killed = 0
    for attempt in range(40):
        child = subprocess.Popen([*command, str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.DEVNULL, env=dict(os.environ))
        deadline = time.monotonic() + 60
        while child.poll() is None and not (tmp_path / ".out.convert.partial" / "journal.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if attempt == 0:
            time.sleep(0.02)
            child.send_signal(signal.SIGKILL)
            killed += child.wait() == -signal.SIGKILL
            assert not (tmp_path / "out").exists() or not killed
            continue
        assert child.wait() == 0
        break
    assert killed == 1 and not list(tmp_path.glob(".*"))
    subprocess.run([*command, str(tmp_path / "again")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    for path in (tmp_path / "again").iterdir():
        if path.name != "radlads.json":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_memory_stays_small_whatever_the_size_of_a_tensor(tmp_path: Path) -> None:
    source = tiny_teacher(tmp_path / "teacher", hidden_size=64, vocab_size=300)
    # A sparse embedding of 2.4 GB: the file takes no room, and no model needs to be that wide.
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 9_375_000}))
    entries = read_header(source / "model.safetensors")
    plan = {name: (entry.dtype, (9_375_000, 64) if entry.shape[0] == 300 else entry.shape) for name, entry in entries.items()}
    plan.pop("lm_head.weight")
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 9_375_000, "tie_word_embeddings": True}))
    header, _, size = layout(plan, {})
    with open(source / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    assert size > 2.4e9
    program = f"""
import resource
from itertools import islice
from radlads.weights_tools.formats import FORMATS, open_source
from radlads.weights_tools.formats.format import Writing
import radlads.weights_tools.convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_source({str(source)!r})
for file in FORMATS["mlx"].plan(source, Writing(dtype="BF16", bits=4, group_size=32), "key").files:
    for segment in file.segments:
        if not segment.label.endswith((".scales", ".biases")):
            assert all(len(memoryview(piece)) for piece in islice(segment.pieces({{}}), 12))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    scale = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * scale < 10**9
