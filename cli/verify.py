"""`radlads verify`: whether a folder is what its manifest says, and computes what it should on every backend."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from radlads.cli.options import arg, opt
from radlads.cli.render import Table, note

if TYPE_CHECKING:
    from radlads.folder import ModelFolder
    from radlads.tokenizer import Tokenizer
    from radlads.verify import Check
    from radlads.weights_tools.formats.format import Source


@dataclass(kw_only=True)
class VerifyOptions:
    """Which folder, and by what."""

    model: str = arg("Folder of the model.", metavar="MODEL", flag="--model")
    backend: Literal["all", "torch", "mlx"] = opt("all", "What computes: all backends that are installed, or one.")
    dtype: Literal["float32", "bfloat16", "float16"] = opt("float32", "Type of the weights in memory; it sets the limits.")
    files_only: bool = opt(False, "Check files, origin and tokenizer; compute nothing.", "--files-only")
    against: str | None = opt(None, "Teacher or unquantised model whose predictions are compared.", metavar="DIR")
    max_kl: float | None = opt(None, "Largest KL divergence from --against, in nats a token.", metavar="NATS")
    junit: str | None = opt(None, "Write the checks as JUnit XML.", metavar="FILE")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class VerifyResult:
    """The checks; `passed` is false as soon as one of them failed."""

    path: str
    passed: bool
    checks: list["Check"]

    @property
    def exit_status(self) -> int:
        """3 when a gate was not met."""
        return 0 if self.passed else 3

    def blocks(self) -> list[Table | str]:
        """The checks in a table, and the verdict."""
        rows = [
            (check.name, check.status, _number(check.value), _number(check.limit), check.detail)
            for check in self.checks
        ]  # fmt: skip
        failed = [check.name for check in self.checks if check.status == "failed"]
        verdict = f"NOT VERIFIED: {', '.join(failed)}." if failed else f"{self.path} is verified."
        return [Table(("check", "status", "value", "limit", ""), rows, right=("value", "limit")), verdict]


def verify(options: VerifyOptions) -> VerifyResult:
    """Run the checks and leave verify.json in a folder of ours; R101, R2xx where there is nothing to check."""
    from radlads.errors import RadladsError, fail
    from radlads.files import write_file
    from radlads.folder import MANIFEST
    from radlads.verify import (
        Check,
        check_files,
        check_model_code,
        check_provenance,
        check_tokenizer,
        is_writable,
        junit,
        write_verdict,
    )

    path = Path(options.model)
    if options.max_kl is not None and options.against is None:
        raise fail("R101", where="--max-kl", why="there is nothing to compare with", fix="Give --against DIR")
    ours = open_manifest(path)
    checks = [Check("files", "skipped", f"there is no {MANIFEST}") if ours is None else check_files(path, ours)]
    try:
        folder, weights = open_any(path)
        checks.append(Check("weights", "passed", weights))
        tokenizer = open_tokenizer(folder)
        checks.append(check_provenance(folder) if ours else Check("provenance", "skipped", f"there is no {MANIFEST}"))
        checks.append(check_tokenizer(folder, tokenizer))
        if ours and folder.spec.recurrent is not None:
            checks.append(check_model_code(folder))
    except RadladsError as error:
        # What breaks a folder of ours is a finding; what never was one is bad input.
        if ours is None or error.code[1] not in "23":
            raise
        checks.append(Check("tokenizer" if error.code == "R206" else "weights", "failed", str(error)))
    else:
        if not options.files_only:
            compute = quantised_checks if folder.quantised else computed_checks
            checks += compute(options, folder, tokenizer)
    if ours is not None and not options.files_only:
        if is_writable(path):
            write_verdict(path, checks)
        else:
            note(f"{path} cannot be written to, so the verdict is not kept")
    if options.junit is not None:
        write_file(options.junit, junit(str(path), checks))
    return VerifyResult(str(path), all(check.status != "failed" for check in checks), checks)


def open_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest as a table, None where there is none; R201, R204."""
    from radlads.errors import fail
    from radlads.files import read_json
    from radlads.folder import MANIFEST, check_folder
    from radlads.tensors import contained

    check_folder(path, config=False)  # of a folder of ours a missing config is a finding
    if not (path / MANIFEST).exists():
        return None
    manifest = read_json(contained(path, MANIFEST))
    if not isinstance(manifest, dict):
        raise fail("R204", where=path / MANIFEST, why="it is no manifest", fix="Make the folder again")
    return manifest


def open_any(path: Path) -> tuple["ModelFolder", str]:
    """The checked folder and a word about its weights. R2xx."""
    from radlads.folder import open_folder

    folder = open_folder(path)
    folder.check_finite()
    few = f", {len(folder.quantised)} of them quantised," if folder.quantised else ""
    return folder, f"{len(folder.weights)} tensors{few} fit the config and are finite"


def open_tokenizer(folder: "ModelFolder") -> "Tokenizer | None":
    """The folder's tokenizer, None where it has none; R206."""
    from radlads.tokenizer import Tokenizer

    there = (folder.path / "tokenizer.json").exists()
    return Tokenizer(folder.path, vocab_size=folder.spec.V) if there else None


def computed_checks(options: VerifyOptions, folder: "ModelFolder", tokenizer: "Tokenizer | None") -> list["Check"]:
    """What the backends compute, each loaded alone so that two copies of a large model need not fit."""
    from radlads.backends import available_backends, open_engine
    from radlads.errors import fail
    from radlads.folder import open_folder
    from radlads.verify import ORACLE_PARAMETERS, compute, engine_checks, loss_check, oracle_prefixes, sample_tokens

    other = None if options.against is None else open_folder(options.against)
    if other is not None and other.spec.V != folder.spec.V:
        why = f"it has {other.spec.V:,} tokens, the model {folder.spec.V:,}"
        raise fail("R101", where=f"--against {options.against}", why=why, fix="Give the model's teacher")
    names = available_backends() if options.backend == "all" else [options.backend]
    tokens = sample_tokens(folder, tokenizer)
    computed = {name: compute(open_engine(folder, name, options.dtype), tokens) for name in names}
    parameters = folder.spec.parameters()
    small = parameters <= ORACLE_PARAMETERS
    oracle = oracle_prefixes(folder, tokens) if small and names else None
    checks = engine_checks(computed, oracle, f"{parameters:,} parameters are too many for float64", options.dtype)
    if other is not None and names:
        ours, theirs = (stepwise_logits(model, names[0], options.dtype, tokens) for model in (folder, other))
        checks.append(loss_check(ours, theirs, tokens, options.max_kl))
    return checks


def quantised_checks(options: VerifyOptions, folder: "ModelFolder", tokenizer: "Tokenizer | None") -> list["Check"]:
    """What MLX computes of the words, against the oracle with the same words, and what quantisation costs: the predictions of the
    dequantised weights and of --against, both by the oracle."""
    from radlads.backends import available_backends, open_engine
    from radlads.verify import ORACLE_PARAMETERS, QUANTISED_KL, Check, compute, engine_checks, loss_check, sample_tokens
    from radlads.weights_tools.formats import open_source

    other = None if options.against is None else open_source(options.against)
    tokens = sample_tokens(folder, tokenizer)
    names = [name for name in available_backends() if name == "mlx" and options.backend in ("all", name)]
    computed = {name: compute(open_engine(folder, name, options.dtype), tokens) for name in names}
    parameters = folder.spec.parameters()
    oracle = oracle_of_words(folder, tokens) if parameters <= ORACLE_PARAMETERS else None
    checks = engine_checks(computed, oracle, f"{parameters:,} parameters are too many for float64", options.dtype)
    if other is None:
        return [*checks, Check("loss", "skipped", "give the unquantised model with --against DIR")]
    if parameters > ORACLE_PARAMETERS:
        return [*checks, Check("loss", "skipped", f"{parameters:,} parameters are too many for float64")]
    ours, theirs = (oracle_of(source, tokens) for source in (open_source(folder.path), other))
    limit = QUANTISED_KL if options.max_kl is None else options.max_kl
    return [*checks, loss_check(ours, theirs, tokens, limit)]


def oracle_of_words(folder: "ModelFolder", tokens: list[int]) -> Any:
    """The oracle's logits (P, V) after each prefix, of what the words of a quantised folder mean, with nothing rounded."""
    import numpy as np

    from radlads.oracle import oracle_logits
    from radlads.tensors import read_float32, read_raw
    from radlads.verify import prefix_lengths
    from radlads.weights_tools.formats.affine import dequantise

    weights = {}
    for name, entry in folder.weights.items():
        if few := folder.quantised.get(name):
            scales, biases = read_float32(few.scales), read_float32(few.biases)
            weights[name] = dequantise(read_raw(entry), scales, biases, "F32", few.bits).astype(np.float64)
        else:
            weights[name] = read_float32(entry).astype(np.float64)
    return oracle_logits(folder.spec, weights, np.array(tokens))[[length - 1 for length in prefix_lengths(tokens)]]


def oracle_of(source: "Source", tokens: list[int]) -> Any:
    """The oracle's logits (T, V) of a model in any format, dequantised where it is not in floats."""
    import numpy as np

    from radlads.oracle import oracle_logits
    from radlads.tensors import decode

    weights = {name: decode(lazy.whole(), lazy.dtype).astype(np.float64) for name, lazy in source.tensors.items()}
    return oracle_logits(source.spec, weights, np.array(tokens))


def stepwise_logits(folder: "ModelFolder", backend: str, dtype: str, tokens: list[int]) -> Any:
    """Logits (T, V) of a folder's model, token by token."""
    import numpy as np

    from radlads.backends import open_engine

    engine = open_engine(folder, backend, dtype)
    rows, state = [], engine.start()
    for token in tokens:
        logits, state = engine.feed(state, [token])
        rows.append(logits)
    return np.stack(rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
