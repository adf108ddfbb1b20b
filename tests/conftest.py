"""Which tests run, and in which order: those that train whole models come first, so that no process is left alone with them."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDS_MLX = re.compile(r"^(import mlx|from mlx|from mlx_lm|from radlads\.backends\.mlx)\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without MLX, as on a machine with a GPU for PyTorch, files that compare with it are left out, and the others run."""
    if find_spec("mlx") is not None or collection_path.suffix != ".py":
        return None
    return True if NEEDS_MLX.search(collection_path.read_text(encoding="utf-8")) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "walks" not in item.path.parts)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `gpu` are skipped without an NVIDIA GPU; `pytest -m gpu` runs all that need one."""
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
