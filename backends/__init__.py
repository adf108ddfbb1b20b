"""The two places a model can run, chosen by name; neither is imported before it is asked for."""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from radlads.errors import fail

if TYPE_CHECKING:
    from radlads.adapters import Settings
    from radlads.engine import Engine
    from radlads.folder import ModelFolder
    from radlads.tuning.loop import Tuner
    from radlads.tuning.settings import Tuning

BACKENDS = {"torch": "radlads.backends.torch.engine", "mlx": "radlads.backends.mlx.engine"}
PACKAGES = {"torch": ("torch",), "mlx": ("mlx", "mlx_lm")}


def available_backends() -> list[str]:
    """Names of the backends whose packages are installed."""
    return [name for name, packages in PACKAGES.items() if all(find_spec(package) for package in packages)]


def choose_backend(asked: str) -> str:
    """The backend for `asked`: "auto" means MLX on a Mac and PyTorch elsewhere, where installed. R101 or R405."""
    if asked not in ("auto", *BACKENDS):
        raise fail("R101", where="--backend", why=f"{asked!r} is none of auto, {', '.join(BACKENDS)}", fix="Choose one of these")
    found = available_backends()
    order = ("mlx", "torch") if sys.platform == "darwin" else ("torch", "mlx")
    wanted = order if asked == "auto" else (asked,)
    for name in wanted:
        if name in found:
            return name
    extra = wanted[0]
    why = f"{' and '.join(PACKAGES[extra])} not installed"
    raise fail("R405", where=f"backend {asked}", why=why, fix=f"Run `pip install 'radlads[{extra}]'`")


def open_engine(folder: "ModelFolder", backend: str = "auto", dtype: str | None = None) -> "Engine":
    """Load the model of `folder` into an engine; `dtype` is "float32", "bfloat16" or None for the file's own."""
    module = import_module(BACKENDS[choose_backend(backend)])
    engine: Engine = module.load_engine(folder, dtype=dtype)
    return engine


def peak_memory(engine: "Engine") -> int:
    """The most that the process held so far on the engine's GPU, or at all where it is on none; bytes, 0 where nobody says."""
    if engine.device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_reserved()
    if engine.name == "mlx" and engine.device == "gpu":
        import mlx.core as mx

        return mx.get_peak_memory()
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def open_tuner(folder: "ModelFolder", tuning: "Tuning", settings: "Settings") -> "Tuner":
    """Load the model of `folder` on the backend of `tuning`, with the adapter of `settings` ready to be trained."""
    module = import_module(f"radlads.backends.{choose_backend(tuning.backend)}.finetune")
    tuner: Tuner = module.open_tuner(folder, tuning, settings)
    return tuner
