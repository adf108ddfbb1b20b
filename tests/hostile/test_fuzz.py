"""The fuzzer's kept inputs are replayed, the fuzzer finds what it should, and other readers agree with our checkers."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile import fuzz
from tests.hostile.checkers import CHECKERS, Checker
from tests.hostile.mutate import mutated

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", CHECKERS)
def test_kept_inputs_are_no_findings(name: str) -> None:
    inputs = [*CHECKERS[name].seeds, *fuzz.load(name)]
    assert len(inputs) > len(CHECKERS[name].seeds)
    verdicts = [CHECKERS[name].check(data) for data in inputs]
    assert any(verdicts) and not all(verdicts)


def test_kept_inputs_stay_small() -> None:
    assert sum(path.stat().st_size for path in fuzz.FOUND.iterdir()) < 5_000_000
    assert not list(fuzz.FOUND.glob("*finding*"))


@pytest.mark.parametrize("name", ["safetensors", "gguf", "pth"])
def test_a_thousand_new_mutants_are_no_findings(name: str) -> None:
    checker, rng = CHECKERS[name], random.Random(name)
    corpus = [*checker.seeds, *fuzz.load(name)]
    for _ in range(1000):
        checker.check(checker.repair(rng, mutated(rng, rng.choice(corpus), corpus, checker.words)))


def planted(data: bytes) -> bool:
    """A checker with a fault that blind chance does not reach: four bytes, each compared on a line of its own."""
    if data[:1] == b"B":
        if data[1:2] == b"U":
            if data[2:3] == b"G":
                if data[3:4] == b"!":
                    raise IndexError("planted")
    return False


def test_the_fuzzer_finds_a_planted_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(planted, [b"seed"], [b"x"], (__file__,))
    monkeypatch.setitem(fuzz.CHECKERS, "planted", checker)
    assert not all(fuzz.fuzz("planted", 0.3, seed, tmp_path) for seed in range(40))
    assert {path.read_bytes()[:4] for path in tmp_path.glob("planted-finding-*.bin")} == {b"BUG!"}


def test_sessions_side_by_side_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(data: bytes) -> bool:
        if data == b"one":
            return True
        if data == b"two":
            return False
        raise ValueError("neither")

    monkeypatch.setitem(fuzz.CHECKERS, "side", Checker(check, [b"one"], [], (__file__,)))
    folders = [tmp_path / name for name in ("first", "second", "all")]
    for folder in folders:
        folder.mkdir()
        fuzz.note("side", 100, 7, [b"one", b"two"] if folder.name == "second" else [b"one"], folder)
    assert fuzz.merge(folders[:2], folders[2])
    assert fuzz.recorded(folders[2]) == {"side": {"executions": 300, "cpu_seconds": 21, "inputs": 2, "steps": 6}}
    assert set(fuzz.load("side", folders[2])) == {b"one", b"two"}
    (folders[0] / "side-finding-0.bin").write_bytes(b"three")
    assert not fuzz.merge(folders[:2], folders[2])
    assert (folders[2] / "side-finding-0.bin").read_bytes() == b"three"


def test_what_we_accept_other_readers_read_identically() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.hostile.compare", "--count", "3400"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["format"] for result in results] == ["safetensors", "gguf", "pth"], done.stderr[-2000:]
    assert done.returncode == 0 and not any(result["findings"] for result in results), results
    assert all(result["accepted"] >= 20 for result in results), results
