"""Atomic writers: complete or absent, under kills, full disks and bad targets; and the strict JSON reader."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from radlads import files
from radlads.errors import RadladsError
from radlads.files import check_space, new_file, new_folder, read_json, sha256, write_file

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    """What lies in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def test_write_file_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b.txt", "grün")
    write_file(tmp_path / "a" / "b.txt", b"\0\1")
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"\0\1"
    assert names(tmp_path / "a") == ["b.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "file", b"")
        with new_folder(tmp_path / "folder") as folder:
            write_file(folder / "inner", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "folder" / "inner").stat().st_mode & 0o777 == 0o666 & ~umask


def test_temporary_name_keeps_the_suffix(tmp_path: Path) -> None:
    with new_file(tmp_path / "x.safetensors"):
        (temp,) = names(tmp_path)
        assert temp.startswith(".x.safetensors.") and temp.endswith(".safetensors")
    assert names(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), OSError(errno.EIO, "input/output error")])
def test_failure_inside_leaves_the_old_content(error: BaseException, tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"old")
    with pytest.raises((type(error), RadladsError)), new_file(tmp_path / "file") as file:
        file.write(b"new")
        raise error
    with pytest.raises((type(error), RadladsError)), new_folder(tmp_path / "folder") as folder:
        write_file(folder / "inner", b"new")
        raise error
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_full_disk_is_r402_with_needed_and_free_bytes(tmp_path: Path) -> None:
    with pytest.raises(RadladsError, match=r"R402.*1,234 bytes are needed and [\d,]+ free"), new_file(tmp_path / "file", 1234):
        raise OSError(errno.ENOSPC, "no space left on device")
    assert names(tmp_path) == []
    with pytest.raises(RadladsError, match=r"R402.*[\d,]{20} bytes are needed and [\d,]+ free"):
        check_space(tmp_path / "not" / "yet", 10**18)
    check_space(tmp_path, 1)


def test_full_disk_at_sync_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RadladsError, match="R402"):
        write_file(tmp_path / "file", b"x")
    with pytest.raises(RadladsError, match="R402"), new_folder(tmp_path / "folder") as folder:
        (folder / "inner").write_bytes(b"x")
    assert names(tmp_path) == []


def test_limit_on_file_size_is_r402(tmp_path: Path) -> None:
    """A real ENOSPC or EFBIG from the kernel, not a simulated one."""
    code = f"""
import resource, signal
from radlads.files import write_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_file({str(tmp_path / "file")!r}, b"x" * 5000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "R402" in done.stderr and names(tmp_path) == []


@pytest.mark.parametrize("target", ["file/below", "folder"])
def test_unwritable_target_is_r401(target: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").write_bytes(b"x")
    with pytest.raises(RadladsError, match="R401"):
        write_file(tmp_path / target, b"y")
    assert names(tmp_path) == ["file", "folder"] and names(tmp_path / "folder") == ["inner"]


def test_existing_folder_is_refused_or_swapped(tmp_path: Path) -> None:
    final = tmp_path / "model"
    with new_folder(final) as folder:
        assert not final.exists()
        write_file(folder / "one", b"1")
    with pytest.raises(RadladsError, match=r"R401.*exists"), new_folder(final):
        pytest.fail("the block must not run")
    with new_folder(final, overwrite=True) as folder:
        write_file(folder / "two", b"2")
        assert names(final) == ["one"]
    assert names(final) == ["two"] and names(tmp_path) == ["model"]


def test_failed_overwrite_keeps_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_file(tmp_path / "model" / "one", b"1")
    with pytest.raises(ValueError), new_folder(tmp_path / "model", overwrite=True) as folder:
        write_file(folder / "two", b"2")
        raise ValueError
    assert names(tmp_path / "model") == ["one"] and names(tmp_path) == ["model"]


def test_old_folder_returns_when_the_new_one_cannot_take_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    write_file(tmp_path / "model" / "one", b"1")
    rename, calls = os.rename, iter([None, OSError(errno.EIO, "input/output error"), None])

    def failing(source: Path, target: Path) -> None:
        if error := next(calls):
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(RadladsError, match=r"R401.*input/output"), new_folder(tmp_path / "model", overwrite=True):
        pass
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["one"]


def test_file_systems_without_locks_are_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    leftover = files.partial_name(tmp_path / "x")
    leftover.write_bytes(b"")
    monkeypatch.setattr(files.fcntl, "flock", refuse)
    write_file(tmp_path / "x", b"1")
    assert leftover.exists() and (tmp_path / "x").read_bytes() == b"1"


def test_empty_folder_may_be_filled_but_a_file_or_link_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        write_file(folder / "x", b"")
    assert names(tmp_path / "empty") == ["x"]
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("empty")
    for name in ("file", "link"):
        with pytest.raises(RadladsError, match="R401"), new_folder(tmp_path / name, overwrite=True):
            pytest.fail("the block must not run")


def test_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(RadladsError, match="R401"), new_folder(tmp_path / "model"):
        write_file(tmp_path / "model" / "theirs", b"1")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["theirs"]


def test_leftovers_of_dead_writers_are_cleared_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    dead_file, dead_folder = files.partial_name(tmp_path / "a.txt"), files.partial_name(tmp_path / "a.txt")
    other = files.partial_name(tmp_path / "a.txt.b")
    for path in (dead_file, other):
        path.write_bytes(b"")
    dead_folder.mkdir()
    with new_file(tmp_path / "a.txt") as first:
        first.write(b"first")
        assert not dead_file.exists() and not dead_folder.exists() and other.exists()
        write_file(tmp_path / "a.txt", b"second")
    assert (tmp_path / "a.txt").read_bytes() == b"first"


def test_old_folder_comes_back_when_an_overwrite_died_between_its_renames(tmp_path: Path) -> None:
    old = files.partial_name(tmp_path / "model", "old")
    old.mkdir()
    (old / "one").write_bytes(b"1")
    with pytest.raises(ValueError), new_folder(tmp_path / "model", overwrite=True):
        raise ValueError
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["one"]


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.005, 0.011, 0.02])
def test_kill_leaves_each_file_old_or_new(delay: float, tmp_path: Path) -> None:
    code = f"""
from radlads.files import write_file
print(flush=True)
for i in range(100000):
    write_file({str(tmp_path / "file")!r}, bytes([i % 250]) * 300_000)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 20
        while not (tmp_path / "file").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    data = (tmp_path / "file").read_bytes()
    assert len(data) == 300_000 and len(set(data)) == 1
    write_file(tmp_path / "file", b"after")
    assert names(tmp_path) == ["file"]


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()
    with pytest.raises(RadladsError, match="R201"):
        sha256(tmp_path)


GOOD_JSON: dict[str, Any] = {
    '{"a": [1, 2.5, "x", null, true]}': {"a": [1, 2.5, "x", None, True]},
    "[" * 60 + "]" * 60: None,
    '"\\u00fc"': "ü",
}


@pytest.mark.parametrize("text", GOOD_JSON)
def test_good_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    value = read_json(tmp_path / "x.json")
    assert GOOD_JSON[text] is None or value == GOOD_JSON[text]


BAD_JSON = {
    "empty": b"",
    "cut": b'{"a": 1',
    "key twice": b'{"a": 1, "a": 1}',
    "key twice deep down": b'[{"b": {"a": 1, "a": 2}}]',
    "NaN": b'{"a": NaN}',
    "infinity": b"[-Infinity]",
    "comment": b"{} // no",
    "trailing comma": b"[1,]",
    "bad UTF-8": b'"\xff"',
    "byte order mark": b"\xef\xbb\xbf{}",
    "NUL": b"{}\0",
    "65 levels": b"[" * 66 + b"]" * 66,
    "100,000 levels": b"[" * 100_000 + b"]" * 100_000,
    "number of 10,000 digits": b"1" * 10_000,
    "a million lists": b"[" + b"[]," * 1_000_000 + b"0]",
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_one_error(case: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(BAD_JSON[case])
    with pytest.raises(RadladsError) as caught:
        read_json(tmp_path / "x.json", code="R204")
    assert caught.value.code == "R204" and "x.json" in caught.value.where and len(str(caught.value)) < 1000


def test_json_of_unbounded_size_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(50 * 2**30)  # sparse
    with pytest.raises(RadladsError, match=r"R201.*larger than"):
        read_json(tmp_path / "x.json")
