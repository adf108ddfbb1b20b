"""State files: where a model stands after some tokens, to go on from later, on either backend.

A safetensors file: the arrays of the state and the logits for the next token, float32, and `header`, JSON in bytes. Of a
fixed size for recurrent layers; a session also keeps its token ids and texts.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from radlads.engine import Engine
from radlads.errors import RadladsError, fail
from radlads.files import parse_json
from radlads.folder import ModelFolder
from radlads.session import Point
from radlads.tensors import Entry, read_header, read_raw, write_weights

SCHEMA = 1
HEADER, LOGITS, TOKENS = "header", "logits", "token_ids"
STORED = {"float32": "F32", "int32": "I32", "int64": "I64", "uint8": "U8"}
FOLLOWS = ("text", "question", "answer")
HEADER_LIMIT = 64 << 20
MADE_BY = "Give a file made by `radlads cache`, --save-state or /save"  # the fix where a file is no state
# Bytes of each tensor that the fingerprint reads, at its start, middle and end: models that differ at all differ there.
SAMPLED = 4096

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class SavedState:
    """What a state file holds: the model after `position` tokens, and what a session adds (None for a bare state).

    `follows` says what the tokens end in: "text", the "question" of a chat, not yet ended, or its "answer".
    """

    position: int
    logits: npt.NDArray[np.float32]
    arrays: Arrays
    follows: str
    session: dict[str, Any] | None = None
    token_ids: tuple[int, ...] = ()

    def point(self, engine: Engine) -> Point:
        """The state on `engine`. R304 when it does not fit the model."""
        return Point(self.position, self.logits, engine.from_arrays({**self.arrays, "position": np.array(self.position)}))


def model_fingerprint(folder: ModelFolder) -> str:
    """A hash of what the weights are: every tensor's name, type and shape, samples of its bytes, and the adapter."""
    found = hashlib.sha256(json.dumps(folder.spec.to_dict(), sort_keys=True).encode())
    for name, entry in sorted(folder.weights.items()):
        found.update(f"{name} {entry.dtype} {entry.shape}".encode())
        raw = read_raw(entry).reshape(-1).view(np.uint8)
        for start in (0, max(0, len(raw) // 2 - SAMPLED // 2), max(0, len(raw) - SAMPLED)):
            found.update(raw[start : start + SAMPLED].tobytes())
    if folder.adapter is not None:
        found.update(folder.adapter.fingerprint().encode())
    return found.hexdigest()


def save_state(
    path: str | Path,
    engine: Engine,
    point: Point,
    fingerprint: str,
    *,
    follows: str = "text",
    session: Mapping[str, Any] | None = None,
    token_ids: Sequence[int] = (),
) -> int:
    """Write a state file atomically, replacing one of that name; returns its bytes. R401 or R402 when it cannot be written.

    `session` and `token_ids`, of a conversation, are kept as they are; `follows` as in SavedState.
    """
    arrays = {name: value for name, value in engine.state_arrays(point.state).items() if name != "position"}
    arrays[LOGITS] = np.asarray(point.logits, np.float32)
    if session is not None:
        arrays[TOKENS] = np.array(token_ids, np.int32)
    about = {"schema": SCHEMA, "kind": "state" if session is None else "session", "position": point.state.position}
    about |= {"model": fingerprint, "backend": engine.name, "follows": follows}
    about |= {"session": None if session is None else dict(session)}
    about["sha256"] = content_hash(about, arrays)
    arrays[HEADER] = np.frombuffer(json.dumps(about, sort_keys=True).encode(), np.uint8)
    plan = {name: (STORED[array.dtype.name], array.shape) for name, array in arrays.items()}
    write_weights(path, ((name, plan[name][0], array) for name, array in arrays.items()), plan, {"format": "radlads-state"})
    return Path(path).stat().st_size


def load_state(path: str | Path, fingerprint: str) -> SavedState:
    """Read and check a state file for the model of that fingerprint.

    Raises R201 for a file that cannot be read, R304, with the reason, for one that is no state, of another model, of a newer
    version or with a bit out of place.
    """
    try:
        entries = read_header(Path(path))
    except RadladsError as error:
        if error.code != "R202":
            raise
        raise unusable(path, f"it is no state file, or a damaged one: {error.why}", MADE_BY) from None
    about = read_about(Path(path), entries)
    if about.get("schema") != SCHEMA:
        newer = isinstance(about.get("schema"), int) and about["schema"] > SCHEMA
        why = f"its version is {str(about.get('schema'))[:20]}, and this radlads reads version {SCHEMA}"
        raise unusable(path, why, "Update radlads" if newer else "Make the state again")
    # In memory of our own: the file may be replaced while the model runs.
    arrays: Arrays = {name: np.array(read_raw(entry)) for name, entry in entries.items() if name != HEADER}
    if about.pop("sha256", None) != content_hash(about, arrays):
        raise unusable(path, "it is damaged: its content does not match its hash", "Restore it from a copy, or make it again")
    if about.get("model") != fingerprint:
        raise unusable(path, "it was made with another model", "Use it with the model that made it")
    position, logits, tokens = about.get("position"), arrays.pop(LOGITS, None), arrays.pop(TOKENS, np.zeros(0, np.int32))
    if not isinstance(position, int) or position < 1 or logits is None or logits.dtype != np.float32 or tokens.ndim != 1:
        raise unusable(path, "it lacks its position or its logits", "Make the state again")
    session, follows = about.get("session"), about.get("follows")
    if follows not in FOLLOWS:
        raise unusable(path, f"it follows {str(follows)[:20]!r}, which is unknown", "Make the state again")
    held = session if isinstance(session, dict) else None
    return SavedState(position, logits, arrays, follows, held, tuple(map(int, tokens)))


def read_about(path: Path, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """The header of a state file. R304 when the file is something else."""
    entry = entries.get(HEADER)
    try:
        if entry is None or entry.dtype != "U8" or entry.nbytes > HEADER_LIMIT:
            raise ValueError
        about = parse_json(read_raw(entry).tobytes())
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise unusable(path, "it is no state file", MADE_BY) from None
    return about


def is_state(path: str | Path) -> bool:
    """Whether this is a state file, to be looked at as one: it may still be damaged."""
    try:
        return Path(path).is_file() and HEADER in read_header(Path(path))
    except RadladsError:
        return False


def content_hash(about: Mapping[str, Any], arrays: Arrays) -> str:
    """SHA-256 of a header without its hash, and of every array with its name, type and shape."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.dtype.str} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def unusable(path: str | Path, why: str, fix: str) -> RadladsError:
    """R304 at a state file."""
    return fail("R304", where=path, why=why, fix=fix)
