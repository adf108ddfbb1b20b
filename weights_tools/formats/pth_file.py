"""The reader of torch.save files (.pth, .pt, .bin): entries to be mapped by their place, from a child process that executes
nothing and is held to little memory and time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from radlads.errors import fail
from radlads.files import open_regular
from radlads.tensors import DTYPES, RANK_LIMIT, TENSOR_LIMIT, Entry, check_impostor, check_name
from radlads.weights_tools.formats.pth_pickle import RESAVE

READER = Path(__file__).with_name("pth_pickle.py")
SECONDS = 60  # by the clock, where the child's own limit of processor time does not bite
ZIP = b"PK\x03\x04"


def read_pth(path: Path | str) -> dict[str, Entry]:
    """Tensors of a state dict that torch.save wrote, by name in its order; R201 unreadable, R202 refused.

    Entries may share bytes, as tied tensors do. Nothing in the file is executed, whatever its pickle says.
    """
    path = Path(path)
    with open_regular(path) as file:
        start = file.read(32)
        if not start.startswith(ZIP):
            raise refuse(path, *legacy(path, start))
        answer = ask_child(path, file)
    if "tensors" not in answer:
        raise refuse(path, answer["error"], answer["fix"] or RESAVE)
    return {entry.name: entry for entry in checked(path, answer["tensors"])}


def ask_child(path: Path, file: Any) -> dict[str, Any]:
    """What the child process says about the open file, which is its standard input: it never sees a path."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(READER)], stdin=file, capture_output=True, timeout=SECONDS, cwd="/"
        )  # fmt: skip
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer
    except subprocess.TimeoutExpired:
        raise refuse(path, f"reading it takes more than {SECONDS} seconds", RESAVE) from None
    except ValueError:
        raise refuse(path, "its reader ran out of time or memory", RESAVE) from None


def legacy(path: Path, start: bytes) -> tuple[str, str]:
    """(why, fix) for a file that is no zip archive."""
    if start.startswith(b"\x80"):
        return "it is a bare pickle, as PyTorch before 1.6 wrote, and is not loaded", RESAVE
    check_impostor(path, start)
    return "it is no zip archive, as torch.save writes since PyTorch 1.6", RESAVE


def checked(path: Path, rows: list[Any]) -> list[Entry]:
    """The child's rows as entries; its word is not taken for names, dtypes and sizes."""
    if len(rows) > TENSOR_LIMIT:
        raise refuse(path, f"it has {len(rows):,} tensors; at most {TENSOR_LIMIT:,} are read", RESAVE)
    size, found = path.stat().st_size, []
    for name, dtype, shape, start, stop in rows:
        try:
            check_name(name)
        except ValueError as error:
            raise refuse(path, str(error), RESAVE) from None
        if dtype not in DTYPES or len(shape) > RANK_LIMIT or not 0 <= start <= stop <= size:
            raise refuse(path, f"tensor {name} does not lie in the file", RESAVE)
        found.append(Entry(name, dtype, tuple(shape), path, start, stop))
    return found


def refuse(path: Path, why: str, fix: str) -> Exception:
    """The R202 error."""
    return fail("R202", where=path, why=why, fix=fix)
