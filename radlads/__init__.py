"""radlads: turn a softmax-attention transformer into a linear-attention RWKV model, and run it.

`import radlads` is light: every public name is fetched from its module on first use.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# A checkout keeps backends/, cli/ and weights_tools/ beside this folder, an installed wheel inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "backends" / "__init__.py").is_file():
    __path__.append(str(_root))

_PUBLIC = {
    "ModelSpec": "radlads.spec",
    "RadladsError": "radlads.errors",
    "Recipe": "radlads.recipe",
    "load_recipe": "radlads.recipe",
    "open_folder": "radlads.folder",
    "open_engine": "radlads.backends",
    "init": "radlads.cli.init",
    "TrainOptions": "radlads.cli.train",
    "train": "radlads.cli.train",
    "generate": "radlads.cli.generate",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> object:
    """Fetch a public name from the module that holds it."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'radlads' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
