"""The model card: README.md with the Hub's YAML head, written from the manifest, the run's record and the last verification."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from radlads.errors import RadladsError, printable
from radlads.families.published import is_published
from radlads.files import read_json
from radlads.folder import ModelFolder
from radlads.provenance import UNKNOWN, license_of
from radlads.runs import RECORD

KINDS = {"init": "transfer of weights", "align": "attention alignment", "distill": "distillation", "lm": "language modelling"}
KINDS |= {"fuse": "an adapter made part of the weights", "convert": "conversion"}
PAPER = "https://arxiv.org/abs/2505.03005"
CITATION = """@misc{goldstein2025radlads,
  title         = {RADLADS: Rapid Attention Distillation to Linear Attention Decoders at Scale},
  author        = {Goldstein, Daniel and Alcaide, Eric and Lu, Janna and Cheah, Eugene},
  year          = {2025},
  eprint        = {2505.03005},
  archivePrefix = {arXiv}
}"""


def card(folder: ModelFolder, verdict: Mapping[str, Any] | None, *, license: str | None = None) -> str:
    """The card of a folder of ours; `license` overrules that of its card so far, or of the teacher."""
    manifest = folder.manifest or {}
    teacher = table(manifest.get("teacher"))
    run = find_run(folder.path)
    blocks = [
        head(folder, teacher, {"license": license} if license else license_of(folder.path, manifest)),
        f"# {inline(folder.name)}\n",
        summary(folder, teacher),
        section("Use", use(folder)),
        section("Results", results(run)),
        section("How it was made", history(manifest)),
        section("Where it comes from", origin(teacher)),
        section("Checks", checks(verdict)),
        section("Known weak spots", weak_spots(folder)),
        section("Citation", [f"The method is [RADLADS]({PAPER}).\n", f"```bibtex\n{CITATION}\n```\n"]),
    ]
    return "\n".join(block for block in blocks if block)


def head(folder: ModelFolder, teacher: Mapping[str, Any], terms: Mapping[str, str]) -> str:
    """The YAML between dashes that the Hub reads."""
    library = "mlx" if folder.quantised else "transformers"
    known: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    known |= {"license": UNKNOWN, **terms}
    if converted := converted_from(folder.manifest or {}):
        known["base_model"] = converted
    elif isinstance(teacher.get("repository"), str):
        known |= {"base_model": teacher["repository"], "base_model_relation": "finetune"}
    recurrent = folder.spec.recurrent
    known["tags"] = ["radlads", *(["rwkv", "linear-attention", "distillation", recurrent] if recurrent else [])]
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n"


def converted_from(manifest: Mapping[str, Any]) -> str | None:
    """The repository on the Hub of a model that others made and that was converted here."""
    sources = (table(event.get("source")).get("repository") for event in rows(manifest.get("history")))
    return next((name for name in sources if isinstance(name, str)), None)


def summary(folder: ModelFolder, teacher: Mapping[str, Any]) -> str:
    """What the model is, in a paragraph."""
    spec = folder.spec
    size = f"{spec.parameters():,} parameters"
    if spec.recurrent is None:
        return f"A {spec.family} language model with softmax attention and {size}, trained with radlads.\n"
    kept = ", ".join(map(str, spec.kept_layers))
    layers = f"all layers but {kept}, which keep softmax attention" if kept else "all layers"
    memory = f"The recurrent layers take {spec.state_bytes():,} bytes of state for a sequence of any length."
    name = inline(str(teacher.get("repository", teacher.get("name", f"A {spec.family} language model"))))
    return f"{name} with its softmax attention replaced by {spec.recurrent} in {layers}; {size}. {memory}\n"


def use(folder: ModelFolder) -> list[str]:
    """Commands for the libraries that load the folder."""
    own = "radlads chat PATH   # runs no code of the folder\n```\n"
    if is_published(folder.config):
        kind = inline(str(folder.config.get("model_type")))
        return [f"The layout is {kind}: stock transformers needs the model code of its authors in the folder.\n", f"```sh\n{own}"]
    shipped = "auto_map" in folder.config
    trust = ", trust_remote_code=True" if shipped else ""
    load = f'model = AutoModelForCausalLM.from_pretrained("PATH", revision="COMMIT"{trust})'
    generate = f"mlx_lm.generate --model PATH{' --trust-remote-code' if shipped else ''} --prompt 'Hello'"
    told = "The folder carries its own model files. They are code: read them, then pin the revision.\n"
    python = f"```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n{load}\n```\n"
    return [*([told] if shipped else []), *([] if folder.quantised else [python]), f"```sh\n{generate}\n{own}"]


def results(run: Mapping[str, Any] | None) -> list[str]:
    """Held-out loss of the teacher and of the student after each stage."""
    final, stages = table((run or {}).get("final")), rows((run or {}).get("stages"))
    if not final:
        return []
    lines: list[tuple[str, ...]] = [("teacher", "", number(final.get("teacher_ppl")), "", "")]
    for stage in stages:
        values = [number(stage.get(key)) for key in ("tokens", "ppl", "kl", "agreement")]
        lines.append((f"after stage {stage.get('stage')}", *values))
    return [
        "On held-out text of the recipe; KL in nats a token from the teacher, agreement on the most likely next token.\n",
        markdown(("", "tokens", "perplexity", "KL", "agreement"), lines),
    ]


def history(manifest: Mapping[str, Any]) -> list[str]:
    """The steps of the manifest's history."""
    lines = []
    for event in rows(manifest.get("history")):
        source = table(event.get("source"))
        hashes = [part.get("sha256") for part in rows(event.get("data"))] or [*table(source.get("sha256")).values()]
        data = ", ".join(str(digest)[:12] for digest in hashes[:8]) + (f" and {len(hashes) - 8} more" if len(hashes) > 8 else "")
        what = KINDS.get(str(event.get("kind")), str(event.get("kind")))
        if source:
            revision = f" at {source['revision']}" if source.get("revision") else ""
            what += f" of {source.get('repository', source.get('name'))}{revision} from {event.get('from')} to {event.get('to')}"
        lines.append((event.get("stage", ""), what, number(event.get("tokens")), event.get("recipe", ""), data))
    return [markdown(("stage", "what", "tokens", "recipe", "inputs (SHA-256)"), lines)] if lines else []


def origin(teacher: Mapping[str, Any]) -> list[str]:
    """The teacher's name, revision and file hashes."""
    if not teacher:
        return []
    where = inline(str(teacher.get("repository", teacher.get("name"))))
    told = f"Teacher: {where}, revision {inline(str(teacher.get('revision', 'not known')))}.\n"
    lines = [(inline(name), str(digest)) for name, digest in table(teacher.get("files")).items()]
    return [told, markdown(("file", "SHA-256"), lines)] if lines else [told]


def checks(verdict: Mapping[str, Any] | None) -> list[str]:
    """What `radlads verify` measured."""
    lines = [
        (check.get("name"), check.get("status"), number(check.get("value")), number(check.get("limit")))
        for check in rows((verdict or {}).get("checks"))
    ]
    told = "By `radlads verify`: errors are RMS(difference) / RMS(reference), the oracle computes in float64.\n"
    return [told, markdown(("check", "status", "value", "limit"), lines)] if lines else []


def weak_spots(folder: ModelFolder) -> list[str]:
    """What readers should know before they use it."""
    if folder.spec.recurrent is None:
        return []
    return [
        "- It recalls less from a long context than its teacher.\n"
        "- Languages and tasks that the distillation data do not hold may have suffered.\n"
        "- The recurrent state cannot be rolled back: speculative decoding and trimming of the cache do not work.\n"
    ]


def find_run(path: Path) -> dict[str, Any] | None:
    """run.json of the run in whose folder the model lies, None where there is none that can be read."""
    try:
        found = read_json(path.resolve().parent / RECORD)
    except RadladsError:
        return None
    return found if isinstance(found, dict) else None


def section(title: str, parts: Iterable[str]) -> str:
    """A heading and what stands below it; nothing where that is nothing."""
    text = "\n".join(parts)
    return f"## {title}\n\n{text}" if text else ""


def markdown(columns: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table; cells come from files and are made harmless."""
    rule = "|".join(" --- " for _ in columns)
    cells = [" | ".join(inline(str(cell)) for cell in line) for line in lines]
    return "\n".join([f"| {' | '.join(columns)} |", f"|{rule}|", *(f"| {line} |" for line in cells)]) + "\n"


def inline(text: str) -> str:
    """Text from a file that can be no markup and no link of the card."""
    return "".join(f"\\{c}" if c in "\\|<>[]`*" else c for c in printable(text, 200))


def number(value: object) -> str:
    """A number of the record for people; empty for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(value: object) -> dict[str, Any]:
    """The value if it is a table with texts for keys, else an empty one."""
    return value if isinstance(value, dict) else {}


def rows(value: object) -> list[dict[str, Any]]:
    """The tables in a list; what else it holds is left out."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
