"""Where a model comes from: the teacher's name on the Hub, its revision, licence and file hashes, as the manifest records them.

Only what can be known is written down: from the layout of the Hub's cache, what its downloader leaves in a folder, and the
head of the model card. Nothing is looked up.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from radlads.errors import RadladsError
from radlads.files import read_bytes, sha256
from radlads.folder import CONFIG, ModelFolder, inherited

CARD = "README.md"
CARD_LIMIT = 2**20
# What a card says where no licence is known.
UNKNOWN = "unknown"
REPOSITORY = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
LICENSE_KEYS = ("license", "license_name", "license_link")
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "COPYING")
# What the first lines of a licence file say -> its name on the Hub.
LICENSE_TEXTS = {"Apache License": "apache-2.0", "MIT License": "mit"}


def teacher_record(teacher: ModelFolder) -> dict[str, Any]:
    """Name, repository and revision where known, family, licence, and hashes of all files that a student takes over."""
    paths = {teacher.path / CONFIG, *(entry.path for entry in teacher.weights.values()), *inherited(teacher)}
    return {**described(teacher.path, teacher.spec.family, teacher.manifest), "files": hashed(paths)}


def named_teacher(folder: Path, family: str, taken: Iterable[Path]) -> dict[str, Any]:
    """The same of a folder that was named as the teacher's of a model that others made; `taken` are the files taken from it."""
    return {**described(folder, family, None), "files": hashed({folder / CONFIG, *taken})}


def stated_teacher(config: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher that the config of a published model names as its `base_model`; empty where it names none."""
    name = config.get("base_model")
    known = isinstance(name, str) and REPOSITORY.fullmatch(name)
    return {"name": str(name).rpartition("/")[2], "repository": name} if known else {}


def described(path: Path, family: str, manifest: dict[str, Any] | None) -> dict[str, Any]:
    """Name, repository, revision, family and licence of a teacher's folder, as far as it tells."""
    terms = license_of(path, manifest)
    return {"name": path.resolve().name, **hub_origin(path), "family": family, "license": terms}


def hashed(paths: Iterable[Path]) -> dict[str, str]:
    """{name: SHA-256} of files."""
    return {path.name: sha256(path) for path in sorted(paths)}


def hub_origin(path: Path) -> dict[str, str]:
    """{"repository", "revision"} of a folder that came from the Hub, as far as the folder tells; else empty."""
    path = path.absolute()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        repository = path.parent.parent.name.removeprefix("models--").replace("--", "/")
        return {"name": repository.rpartition("/")[2], "repository": repository, "revision": path.name}
    try:
        # `hf download --local-dir` leaves the commit of each file in the first line here.
        text = read_bytes(path / ".cache" / "huggingface" / "download" / f"{CONFIG}.metadata", 4096).decode()
    except (RadladsError, UnicodeDecodeError):
        return {}
    commit = text.split("\n")[0].strip()
    return {"revision": commit} if COMMIT.fullmatch(commit) else {}


def license_of(path: Path, manifest: dict[str, Any] | None) -> dict[str, str]:
    """The licence as the model card names it, or a licence file whose text is known, or what a manifest carried; else empty."""
    head = card_head(path / CARD)
    found = {key: value for key in LICENSE_KEYS if isinstance(value := head.get(key), str) and 0 < len(value) < 500}
    if found.get("license", UNKNOWN) != UNKNOWN:
        return found
    for name in LICENSE_FILES:
        try:
            start = read_bytes(path / name, CARD_LIMIT)[:400].decode(errors="replace")
        except RadladsError:
            continue
        return {"license": next((known for words, known in LICENSE_TEXTS.items() if words in start), "other")}
    return carried_license(manifest)


def carried_license(manifest: dict[str, Any] | None) -> dict[str, str]:
    """The licence that a manifest holds: the folder's own, or its teacher's."""
    for table in (manifest or {}, (manifest or {}).get("teacher")):
        found = table.get("license") if isinstance(table, dict) else None
        if isinstance(found, dict) and isinstance(found.get("license"), str):
            return {key: str(value) for key, value in found.items() if key in LICENSE_KEYS}
    return {}


def card_head(path: Path) -> dict[str, Any]:
    """The YAML at the head of a model card; empty where there is none that can be read."""
    try:
        text = read_bytes(path, CARD_LIMIT).decode()
        start, found, _ = text.replace("\r\n", "\n").partition("\n---\n")
        # BaseLoader makes texts, lists and tables only, and does not multiply what is merged.
        head = yaml.load(start.removeprefix("---"), yaml.BaseLoader) if found and start.startswith("---") else None
    except (RadladsError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        return {}
    return head if isinstance(head, dict) else {}
