"""`radlads fuse`: a model with an adapter's change made part of its weights, with mlx-lm's flags."""

from contextlib import nullcontext
from dataclasses import dataclass

from radlads.cli.options import arg, opt
from radlads.cli.render import note, progress, size


@dataclass(kw_only=True)
class FuseOptions:
    """Which model, which adapter, and where the outcome goes."""

    model: str = arg("Folder of the model.", metavar="MODEL", flag="--model")
    adapter_path: str = opt("adapters", "Folder of the adapter, of mlx-lm or peft.", "--adapter-path", "--adapter", metavar="DIR")
    save_path: str = opt("fused_model", "Folder to write.", "--save-path", "--output-dir", metavar="DIR")
    dequantize: bool = opt(False, "Write floats where the model is quantised.", "--dequantize")
    overwrite: bool = opt(False, "Replace the output if it exists.", "--overwrite")
    quiet: bool = opt(False, "Show no progress.", "--quiet")
    json: bool = opt(False, "Print one JSON document.", "--json")


@dataclass
class FuseResult:
    """What was written."""

    output: str
    model: str
    adapter: str
    weight_bytes: int
    written: bool

    def blocks(self) -> list[str]:
        """The path, and what to do with it."""
        done = "" if self.written else " (it was there already)"
        return [f"{self.output}, {size(self.weight_bytes)}{done}", f"\nnext:\n  radlads chat {self.output}"]


def fuse(options: FuseOptions) -> FuseResult:
    """Write the model with the adapter in its weights; complete, or not at all."""
    from radlads.weights_tools.fuse import fuse as run

    with nullcontext() if options.quiet or options.json else progress("fuse") as report:
        done = run(
            options.model,
            options.adapter_path,
            options.save_path,
            dequantize=options.dequantize,
            overwrite=options.overwrite,
            report=report,
            say=note,
        )
    return FuseResult(str(done.path), options.model, options.adapter_path, done.nbytes, done.written)
