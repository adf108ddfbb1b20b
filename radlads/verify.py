"""The checks of `radlads verify`: files against the manifest, where the model comes from, and what its engines compute.

Engines are judged by the float64 oracle and by each other. Limits are on the relative error, RMS(difference) / RMS(reference).
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from radlads import __version__
from radlads.engine import Engine
from radlads.errors import RadladsError
from radlads.families.published import is_published
from radlads.files import sha256, write_file
from radlads.folder import MANIFEST, VERDICT, ModelFolder
from radlads.oracle import oracle_logits
from radlads.provenance import CARD, carried_license
from radlads.tensors import is_plain_name, listed, read_float32
from radlads.tokenizer import Tokenizer

Array = npt.NDArray[np.floating[Any]]
Status = Literal["passed", "failed", "skipped"]

# Written after the manifest, or by hand.
UNLISTED = (MANIFEST, VERDICT, CARD)
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
ORACLE_PARAMETERS = 300_000_000  # in float64 that is 2.4 GB
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
QUANTISED_KL = 0.1  # nats a token that quantisation may cost
TOKENS = 48
PREFIXES = (1, 2, 17)  # and all tokens
TEXT = (
    "The old lighthouse keeper wrote 3 letters that winter: one to his daughter, one to the harbour office, and one that he "
    "never sent. When spring came, the ice went out with a noise like thunder, and the first ship brought news from the city."
)


@dataclass(frozen=True)
class Check:
    """One finding; `value` and `limit` where something was measured."""

    name: str
    status: Status
    detail: str
    value: float | None = None
    limit: float | None = None


def judged(name: str, faults: Sequence[str], passed: str) -> Check:
    """A check that fails with its faults, or passes with a word about what was seen."""
    return Check(name, "failed", listed(list(faults))) if faults else Check(name, "passed", passed)


def measured(name: str, value: float, limit: float, detail: str) -> Check:
    """A check of a number against its limit; NaN fails."""
    return Check(name, "passed" if value <= limit else "failed", detail, value, limit)


def check_files(path: Path, manifest: Mapping[str, Any]) -> Check:
    """Every file that the manifest lists is there with its hash, and no other file is."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        return Check("files", "failed", f"{MANIFEST} lists no files")
    faults = []
    for name, digest in files.items():
        if not is_plain_name(name) or (path / name).is_symlink():
            faults.append(f"{name} is no plain file of the folder")
        elif name not in UNLISTED:
            try:
                faults += [f"{name} has changed"] if sha256(path / name) != digest else []
            except RadladsError as error:
                faults.append(f"{name}: {error.why}")
    extra = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    faults += [f"{name} is not in {MANIFEST}" for name in extra if name not in files and name not in UNLISTED]
    return judged("files", faults, f"{len(files)} files have the hashes of {MANIFEST}")


def check_provenance(folder: ModelFolder) -> Check:
    """A student's manifest says of which teacher it is, by which steps, and under which licence."""
    manifest = folder.manifest or {}
    history, teacher = manifest.get("history"), manifest.get("teacher")
    events = [event for event in history if isinstance(event, dict)] if isinstance(history, list) else []
    stages = [event["stage"] for event in events if isinstance(event.get("stage"), int)]
    faults = [] if events else ["there is no history"]
    if stages != sorted(stages) or (stages and stages[-1] != manifest.get("stage")):
        faults.append(f"the stages of the history are {stages}, and the model is of stage {manifest.get('stage')}")
    # A published student was made elsewhere: what it was converted from is all that can be known.
    converted = any(event.get("kind") == "convert" and event.get("source") for event in events)
    known = isinstance(teacher, dict) and isinstance(teacher.get("name"), str) and bool(teacher.get("files"))
    if folder.spec.recurrent is not None and not known and not converted:
        faults.append("the teacher and its files are not recorded")
    if not isinstance(teacher, dict):
        return judged("provenance", faults, f"{counted(events)}, no teacher on record")
    origin = teacher.get("repository", teacher.get("name"))
    terms = carried_license(dict(manifest)).get("license", "licence unknown")
    seen = f"{counted(events)} from {origin} at {teacher.get('revision', 'no known revision')}, {terms}"
    return judged("provenance", faults, seen)


def counted(events: Sequence[object]) -> str:
    """ "1 step", "3 steps"."""
    return f"{len(events)} step{'' if len(events) == 1 else 's'}"


def check_model_code(folder: ModelFolder) -> Check:
    """A student's config names the files of its own by which stock transformers and mlx-lm load it."""
    config, faults = folder.config, []
    if is_published(config):
        return Check("model code", "skipped", "a published layout goes with the model code of its authors")
    classes = config.get("auto_map")
    named = {"model_file": [config.get("model_file")], "auto_map": [*classes.values()] if isinstance(classes, dict) else [None]}
    for key, values in named.items():
        modules = [value if key == "model_file" else str(value).partition(".")[0] + ".py" for value in values]
        missing = [name for name in modules if not isinstance(name, str) or not (folder.path / Path(name).name).is_file()]
        if not values[0] or missing:
            faults.append(f"{key} of config.json leads to no file of the folder")
    return judged("model code", faults, "stock transformers and mlx-lm find the folder's own files")


def check_tokenizer(folder: ModelFolder, tokenizer: Tokenizer | None) -> Check:
    """The tokenizer's files are the teacher's, byte for byte, and it takes a text apart and puts it together again."""
    if tokenizer is None:
        return Check("tokenizer", "skipped", "the folder has no tokenizer.json")
    teacher = (folder.manifest or {}).get("teacher")
    known = teacher.get("files") if isinstance(teacher, dict) else None
    theirs = known if isinstance(known, dict) else {}
    shared = [name for name in TOKENIZER_FILES if name in theirs]
    faults = []
    for name in shared:
        there = (folder.path / name).is_file()
        if not there or sha256(folder.path / name) != theirs[name]:
            faults.append(f"{name} is {'not the teacher’s' if there else 'missing'}")
    if tokenizer.decode(tokenizer.encode(TEXT)).strip() != TEXT:
        faults.append("a text does not come back from its tokens")
    return judged("tokenizer", faults, f"{len(shared)} files are the teacher's" if shared else "a text comes back")


def sample_tokens(folder: ModelFolder, tokenizer: Tokenizer | None) -> list[int]:
    """The tokens on which engines are compared: of a text, or drawn where there is no tokenizer."""
    tokens = tokenizer.encode(TEXT)[:TOKENS] if tokenizer is not None else []
    drawn = np.random.default_rng(0).integers(0, folder.spec.V, TOKENS)
    return tokens if len(tokens) > PREFIXES[-1] + 1 else [int(token) for token in drawn]


def prefix_lengths(tokens: Sequence[int]) -> list[int]:
    """How many tokens are fed where logits are compared."""
    return [*PREFIXES, len(tokens)]


def oracle_prefixes(folder: ModelFolder, tokens: Sequence[int]) -> Array:
    """The oracle's logits (P, V) in float64 after each prefix."""
    weights = {name: read_float32(entry).astype(np.float64) for name, entry in folder.weights.items()}
    return oracle_logits(folder.spec, weights, np.array(tokens))[[length - 1 for length in prefix_lengths(tokens)]]


@dataclass(frozen=True)
class Computed:
    """What an engine computed: logits (P, V) after each prefix, and the errors of two other ways to the same end."""

    logits: Array
    stepwise: float
    split: float


def compute(engine: Engine, tokens: Sequence[int]) -> Computed:
    """Feed the prefixes whole, all tokens one by one, and all tokens in two pieces at several places."""
    logits = np.stack([engine.feed(engine.start(), tokens[:length])[0] for length in prefix_lengths(tokens)])
    whole, whole_state = engine.feed(engine.start(), tokens)
    expected = engine.state_arrays(whole_state)
    state = engine.start()
    for token in tokens:
        last, state = engine.feed(state, [token])
    stepwise = max(relative(last, whole), states_apart(engine.state_arrays(state), expected))
    split = 0.0
    for cut in (1, len(tokens) // 3, len(tokens) - 1):
        _, state = engine.feed(engine.start(), tokens[:cut])
        last, state = engine.feed(state, tokens[cut:])
        split = max(split, relative(last, whole), states_apart(engine.state_arrays(state), expected))
    return Computed(logits, stepwise, split)


def states_apart(found: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """The largest relative error of a state's arrays; infinite where they are not the same arrays."""
    if found.keys() != expected.keys():
        return float("inf")
    return max((relative(found[name], expected[name]) for name in expected), default=0.0)


def relative(found: Array, reference: Array) -> float:
    """RMS(found - reference) / RMS(reference); infinite for other shapes, NaN where either has one."""
    if found.shape != reference.shape:
        return float("inf")
    wide = reference.astype(np.float64)
    scale = float(np.sqrt(np.mean(wide**2))) if wide.size else 0.0
    error = float(np.sqrt(np.mean((found.astype(np.float64) - wide) ** 2))) if wide.size else 0.0
    return error / scale if scale else error


def engine_checks(computed: Mapping[str, Computed], oracle: Array | None, why_not: str, dtype: str) -> list[Check]:
    """The checks of all backends that computed the same tokens."""
    if not computed:
        return [Check("computed", "failed", "nothing: no backend that can do it is installed, or was chosen")]
    limit, checks = LIMITS[dtype], []
    for name, found in computed.items():
        if oracle is None:
            checks.append(Check(f"{name} against oracle", "skipped", why_not))
        else:
            value = max(relative(*pair) for pair in zip(found.logits, oracle, strict=True))
            checks.append(measured(f"{name} against oracle", value, limit, f"logits in {dtype} and in float64"))
        checks.append(measured(f"{name} chunked against recurrent", found.stepwise, limit, "a text whole and token by token"))
        checks.append(measured(f"{name} split prefill", found.split, limit, "a text whole and in two pieces"))
    names = list(computed)
    if len(names) == 2:
        value = max(relative(*pair) for pair in zip(computed[names[0]].logits, computed[names[1]].logits, strict=True))
        checks.append(measured(f"{names[0]} against {names[1]}", value, limit, "logits of the two backends"))
    else:
        checks.append(Check("torch against mlx", "skipped", f"only {' and '.join(names)} was used"))
    return checks


def loss_check(found: Array, reference: Array, tokens: Sequence[int], max_kl: float | None) -> Check:
    """How far the predictions (T, V) are from another model's on a text: KL in nats, agreement, perplexities."""
    ours, theirs = log_softmax(found), log_softmax(reference)
    kl = float((np.exp(theirs) * (theirs - ours)).sum(-1).mean())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    after = np.array(tokens[1:])[:, None]
    perplexities = [float(np.exp(-np.take_along_axis(logs[:-1], after, 1).mean())) for logs in (ours, theirs)]
    detail = f"KL {kl:.4g}, {agreement:.1%} same next token, perplexity {perplexities[0]:.4g} against {perplexities[1]:.4g}"
    if max_kl is None:
        return Check("loss", "passed" if np.isfinite(kl) else "failed", f"{detail}; no limit was set", kl)
    return measured("loss", kl, max_kl, detail)


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def junit(path: str, checks: Sequence[Check]) -> bytes:
    """The checks as a JUnit XML report."""
    counts = {status: str(sum(check.status == status for check in checks)) for status in ("failed", "skipped")}
    head = {"name": f"radlads verify {path}", "tests": str(len(checks)), "errors": "0"}
    suite = ElementTree.Element("testsuite", {**head, "failures": counts["failed"], "skipped": counts["skipped"]})
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "radlads.verify", "name": check.name})
        if check.status != "passed":
            kind = {"failed": "failure", "skipped": "skipped"}[check.status]
            ElementTree.SubElement(case, kind, {"message": described(check)})
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, "utf-8", xml_declaration=True) + b"\n"


def described(check: Check) -> str:
    """The finding in words, with its number."""
    number = "" if check.value is None else f"{check.value:.2g}"
    number += "" if check.limit is None else f" (limit {check.limit:g})"
    return f"{number}: {check.detail}" if number else check.detail


def write_verdict(path: Path, checks: Sequence[Check]) -> None:
    """Leave `verify.json` in the folder: the checks, and of which manifest they are true."""
    verdict = {
        "schema": 1,
        "radlads": __version__,
        "passed": all(check.status != "failed" for check in checks),
        "manifest": sha256(path / MANIFEST),
        "checks": [asdict(check) for check in checks],
    }
    finite = json.loads(json.dumps(verdict), parse_constant=lambda _: None)
    write_file(path / VERDICT, json.dumps(finite, indent=2) + "\n")


def is_writable(path: Path) -> bool:
    """True if a file can be put into the folder."""
    return os.access(path, os.W_OK)
