"""The catalogue of bad inputs. For each: exit status 2, one line with the fault and a hint, no traceback, no output, the source
as it was, within seconds and 300 MB."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from radlads.cli.main import main
from radlads.errors import RadladsError
from radlads.weights_tools.formats import pth_file, pth_pickle
from radlads.weights_tools.formats.pth_file import read_pth
from tests.hostile import gguf_cases, pth_cases, safetensors_cases
from tests.hostile.set_cases import CONFIGS, DIMS, SETS, edit, sound
from tests.models import tiny_teacher

ROOT = Path(__file__).parents[2]
FILES = {"safetensors": safetensors_cases.BAD, "gguf": gguf_cases.BAD, "pth": pth_cases.BAD}

# Reads every bad file with 300 MB to spare, and prints [format, name, calls of functions, code, message, file unchanged] of each.
READ_ALL = """
import json, resource, sys
from pathlib import Path
from radlads.errors import RadladsError
from radlads.tensors import read_header
from radlads.weights_tools.formats.gguf_file import read_gguf
from radlads.weights_tools.formats import pth_file, pth_pickle
from tests.hostile.test_catalogue import FILES
from tests.work import calls
readers = {"safetensors": read_header, "gguf": read_gguf, "pth": pth_file.read_pth}
pth_file.ask_child = lambda path, file: pth_pickle.answer(file)  # a hundred processes take a minute to start
path = Path(sys.argv[1]) / "file"
statm = Path("/proc/self/statm")
here = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 2**40
resource.setrlimit(resource.RLIMIT_AS, (here + 300_000_000, here + 300_000_000))
for format, cases in FILES.items():
    for name, (data, _) in cases.items():
        path.write_bytes(data)
        code, message = None, "accepted"
        def read():
            global code, message
            try:
                readers[format](path)
            except RadladsError as error:
                code, message = error.code, str(error)
            except BaseException as error:
                message = repr(error)
        print(json.dumps([format, name, calls(read), code, message, path.read_bytes() == data]), flush=True)
"""


def test_the_catalogue_is_large_enough() -> None:
    assert sum(map(len, (*FILES.values(), SETS, CONFIGS))) >= 300


WORK = 10_000  # calls to refuse a file of any size, a hundredth of a second
IN_A_CHILD = ("big-endian", "pickle of 20 MB", "os.system", "tuples 60 deep, doubled each time", "shape past the end")


@pytest.mark.parametrize("case", IN_A_CHILD)
def test_child_process_gives_the_same_answer(case: str, tmp_path: Path) -> None:
    data, words = pth_cases.BAD[case]
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(RadladsError, match="R202") as caught:
        read_pth(tmp_path / "x.pth")
    expected = pth_pickle.answer(io.BytesIO(data))
    assert words in caught.value.why and caught.value.why == expected["error"].rstrip(".")


def test_child_process_is_held_to_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.pth").write_bytes(pth_cases.saved(b"\x80\x02" + b"K\1" * 3_000_000 + b"."))
    program = Path(pth_pickle.__file__).read_text()
    (tmp_path / "reader.py").write_text(program.replace("SECONDS_LIMIT = 20", "SECONDS_LIMIT = 1"))
    monkeypatch.setattr(pth_file, "READER", tmp_path / "reader.py")
    with pytest.raises(RadladsError, match=r"R202.*out of time or memory"):
        read_pth(tmp_path / "x.pth")
    (tmp_path / "reader.py").write_text(program.replace("MEMORY_LIMIT = 320", "MEMORY_LIMIT = 24"))
    with pytest.raises(RadladsError, match=r"R202.*(more than 25,165,824 bytes|out of time or memory)"):
        read_pth(tmp_path / "x.pth")


@pytest.mark.parametrize("deed", ["open('/etc/passwd')", "import socket", "os.system('true')", "os.listdir('/')", "eval('1')"])
def test_child_process_can_open_and_start_nothing(deed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path(pth_pickle.__file__).read_text()
    assert "    records = read_archive(" in program
    (tmp_path / "reader.py").write_text(
        program.replace("    records = read_archive(", f"    {deed}\n    records = read_archive(")
    )
    (tmp_path / "x.pth").write_bytes(pth_cases.GOOD)
    monkeypatch.setattr(pth_file, "READER", tmp_path / "reader.py")
    with pytest.raises(RadladsError, match=r"R202.*PermissionError"):
        read_pth(tmp_path / "x.pth")


def test_every_bad_file_is_refused_in_a_few_calls_and_300_megabytes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == sum(map(len, FILES.values()))
    faults = [
        row
        for row in rows
        if (row[3], row[5]) != ("R202", True)
        or row[2] > WORK
        or FILES[row[0]][row[1]][1] not in row[4]
        or "\n" in row[4]
        or "\x1b" in row[4]
        or len(row[4]) > 2500
    ]
    assert not faults, faults


def files_below(path: Path) -> dict[str, object]:
    """Content of every file of a folder; links, pipes and folders by their kind."""
    return {
        str(file.relative_to(path)): file.read_bytes() if file.is_file() else file.lstat().st_mode for file in path.rglob("*")
    }


def check_contract(tmp_path: Path, model: Path, code: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The promises for a bad model folder, by the command that would make a student of it."""
    before = files_below(tmp_path)
    status = main(["init", str(model), "--output-dir", str(tmp_path / "out")])
    out, err = capfd.readouterr()
    assert (status, out) == (2, ""), err
    assert re.match(f"error: {code} ", err) and words in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert err.rstrip().endswith((".", "?", "`")) and "\x1b" not in err
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("case", SETS)
def test_bad_set(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change, code, words = SETS[case]
    model = sound(tmp_path / "model")
    change(model)
    check_contract(tmp_path, model, code, words, capfd)


@pytest.mark.parametrize("case", CONFIGS)
def test_bad_config(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changes, code = CONFIGS[case]
    model = tiny_teacher(tmp_path / "model", **DIMS)
    edit(model, **changes)
    check_contract(tmp_path, model, code, "", capfd)


def test_the_sound_set_is_accepted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(sound(tmp_path / "model"))]) == 0
