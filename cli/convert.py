"""`radlads convert`: a model from any format to any other, in bounded memory."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from radlads.cli.options import arg, opt
from radlads.cli.render import Table, note, progress, size
from radlads.errors import fail


@dataclass(kw_only=True)
class ConvertOptions:
    """What to convert, and into what."""

    source: str = arg("Model: folder (safetensors, MLX), .pth or .gguf; or an adapter's folder.", metavar="SRC", flag="--model")
    to: Literal["hf", "mlx", "pth", "gguf"] = opt("hf", "Format to write.", "--to")
    layout: Literal["rwkv6qwen2", "rwkv7qwen2", "rwkv7qwen3", "rwkv079qwen3"] | None = opt(
        None, "Layout of a published model, for --to hf: other programs read it."
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = opt(None, "Type of the weights, instead of their own.")
    quantize: bool = opt(False, "Quantise for MLX (affine).", "--quantize", "-q")
    q_bits: int | None = opt(None, "Bits of a quantised weight: 2, 3, 4, 5, 6 or 8; 4 by default.", metavar="N")
    q_group_size: int | None = opt(None, "Weights that share a scale: 32, 64 or 128; 64 by default.", metavar="N")
    config: str | None = opt(None, "config.json or the teacher's folder, for a .pth; an adapter's model.", metavar="DIR_OR_JSON")
    variant: Literal["A", "B", "C"] | None = opt(None, "Era of a published RAD-RWKV7, where its tensors cannot tell.")
    stage: Literal["0", "1", "2", "3"] | None = opt(None, "Stage of a student whose files do not say.")
    allow_nonfinite: bool = opt(False, "Take weights that hold NaN or infinity.", "--allow-nonfinite")
    output_dir: str = opt("converted", "Folder to write; or a file, if it ends in .gguf or .pth.", metavar="PATH")
    overwrite: bool = opt(False, "Replace the output if it exists.", "--overwrite")
    quiet: bool = opt(False, "Show no progress.", "--quiet")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class ConvertResult:
    """What was written; `notices` holds what was inferred about the source, and how to overrule it."""

    output: str
    format: str
    source: str
    source_format: str
    architecture: str
    parameters: int
    weight_bytes: int
    written: bool
    notices: list[str] = field(default_factory=list)

    def blocks(self) -> list[Table | str]:
        """A summary."""
        rows = [
            ("source", f"{self.source} ({self.source_format})"),
            ("architecture", self.architecture),
            ("parameters", f"{self.parameters:,}"),
            ("output", f"{self.output} ({self.format}, {size(self.weight_bytes)})"),
        ]
        done = [] if self.written else ["It was there already, from this very source; nothing was done."]
        return [Table(("", ""), rows), *done]


def convert(options: ConvertOptions) -> ConvertResult:
    """Write the model, or the adapter, in another format; R101, R2xx, R4xx, and then nothing is written."""
    from radlads.adapters import is_adapter

    check(options)
    if is_adapter(options.source):
        return convert_adapter(options)
    from radlads.weights_tools.convert import convert as run
    from radlads.weights_tools.formats.format import DTYPES, Reading, Writing

    writing = Writing(
        dtype=DTYPES[options.dtype] if options.dtype else None,
        bits=(4 if options.q_bits is None else options.q_bits) if options.quantize else None,
        group_size=64 if options.q_group_size is None else options.q_group_size,
        layout=options.layout,
    )
    notices: list[str] = []

    def say(text: str) -> None:
        notices.append(text)
        note(text)

    with nullcontext() if options.quiet else progress(f"convert to {options.to}") as report:
        done = run(
            options.source,
            options.output_dir,
            options.to,
            reading=Reading(options.config, options.variant, None if options.stage is None else int(options.stage)),
            writing=writing,
            allow_nonfinite=options.allow_nonfinite,
            overwrite=options.overwrite,
            report=report,
            say=say,
        )
    spec = done.source.spec
    return ConvertResult(
        output=str(done.path),
        format=options.to,
        source=str(done.source.path),
        source_format=f"{done.source.format}: {done.source.layout}",
        architecture=f"{spec.family} {spec.recurrent or 'softmax'}",
        parameters=spec.parameters(),
        weight_bytes=done.nbytes,
        written=done.written,
        notices=notices,
    )


def check(options: ConvertOptions) -> None:
    """R101 for flags that have no meaning without another."""
    for flag, value in (("--q-bits", options.q_bits), ("--q-group-size", options.q_group_size)):
        if value is not None and not options.quantize:
            raise fail("R101", where=flag, why="it has no meaning without --quantize", fix="Add -q, or leave it out")


def convert_adapter(options: ConvertOptions) -> ConvertResult:
    """Write an adapter in mlx-lm's format (mlx) or peft's (hf). R101 where neither the flag nor its config names its model."""
    from radlads.adapted import rewrite_adapter
    from radlads.adapters import base_of
    from radlads.folder import open_folder

    if options.to not in ("hf", "mlx") or options.quantize:
        why = f"{options.source} is an adapter, which is written for peft (hf) or mlx-lm (mlx)"
        raise fail("R101", where="--to", why=why, fix="Choose --to hf or --to mlx; `radlads fuse` makes it part of the model")
    for flag, value in (("--dtype", options.dtype), ("--layout", options.layout), ("--stage", options.stage)):
        if value is not None:
            raise fail("R101", where=flag, why="it has no meaning for an adapter", fix="Leave it out")
    base = options.config or base_of(options.source)
    if base is None or not Path(base).is_dir():
        why = "its config names no model" if base is None else f"its model {base} is not there"
        raise fail("R101", where=options.source, why=why, fix="Name the model's folder with --config")
    folder = open_folder(base, variant=options.variant)
    adapter = rewrite_adapter(options.source, options.output_dir, options.to, folder, overwrite=options.overwrite)
    nbytes = sum(entry.nbytes for entry in adapter.entries.values())
    return ConvertResult(
        output=options.output_dir,
        format=options.to,
        source=options.source,
        source_format=f"{adapter.kind} adapter of {'peft' if adapter.from_peft else 'mlx-lm'}",
        architecture=f"{folder.spec.family} {folder.spec.recurrent or 'softmax'}",
        parameters=sum(adapter.array(name).size for name in adapter.entries),
        weight_bytes=nbytes,
        written=True,
    )
