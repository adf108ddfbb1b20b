"""The rules of the house that a test can hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WINGS = {"radlads": ROOT / "radlads", "weights_tools": ROOT / "weights_tools", "backends": ROOT / "backends", "cli": ROOT / "cli"}
HEAVY = ("torch", "mlx", "mlx_lm", "transformers", "triton", "matplotlib", "numpy", "pydantic")


def modules(wing: str) -> list[Path]:
    return sorted(WINGS[wing].rglob("*.py"))


def imports(tree: ast.AST, top_level: bool = False) -> set[str]:
    """Dotted names that are imported; with `top_level` only those that run on import."""
    found = set()
    nodes = ast.iter_child_nodes(tree) if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(str(node.module))
    return found


def below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize(
    ("wing", "forbidden"),
    [
        (
            "radlads",
            (
                "radlads.backends",
                "radlads.weights_tools",
                "radlads.cli",
                "torch",
                "mlx",
                "mlx_lm",
                "triton",
                "transformers",
                "typer",
            ),
        ),
        ("weights_tools", ("radlads.backends", "radlads.cli", "torch", "mlx", "mlx_lm", "transformers", "typer")),
        ("backends", ("radlads.weights_tools", "radlads.cli", "typer")),
    ],
)
def test_floors(wing: str, forbidden: tuple[str, ...]) -> None:
    door = ROOT / "radlads" / "__main__.py"  # python -m radlads is the command line
    for path in (path for path in modules(wing) if path != door):
        bad = [name for name in imports(ast.parse(path.read_text())) if below(name, forbidden)]
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_the_backends_do_not_know_each_other() -> None:
    for name, other in (("torch", "mlx"), ("mlx", "torch")):
        for path in (ROOT / "backends" / name).rglob("*.py"):
            bad = [module for module in imports(ast.parse(path.read_text())) if below(module, (f"radlads.backends.{other}",))]
            assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_verbs_import_the_wings_only_when_they_run() -> None:
    for path in modules("cli"):
        tops = imports(ast.parse(path.read_text()), top_level=True)
        bad = [name for name in tops if below(name, ("radlads.backends", "radlads.weights_tools", *HEAVY))]
        assert not bad, f"{path.relative_to(ROOT)} imports {bad} at its top"


def test_no_bare_wing_is_imported_anywhere() -> None:
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("bench/*.py"), *(p for w in WINGS for p in modules(w))]:
        bad = [name for name in imports(ast.parse(path.read_text())) if below(name, ("backends", "cli", "weights_tools"))]
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}: a second copy of the module"


def test_every_module_says_what_lives_there() -> None:
    for path in (p for w in WINGS for p in modules(w)):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text and len(text.splitlines()) <= 6, f"{path.relative_to(ROOT)} has no short docstring"


def test_no_drawers() -> None:
    drawers = {"utils", "helpers", "common", "misc", "base", "util"}
    assert not [path for w in WINGS for path in modules(w) if path.stem in drawers]


@pytest.mark.parametrize(
    "code", ["import radlads", "import sys; sys.argv = ['radlads', '--help']; from radlads.cli.main import main; main()"]
)
def test_import_and_help_are_light(code: str) -> None:
    probe = f"""
import sys
try:
    exec({code!r})
except SystemExit:
    pass
print("LOADED", *(m for m in {HEAVY!r} if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    loaded = done.stdout.splitlines()[-1].split()[1:]
    heavy = set(loaded) - {"pydantic"} if "main" in code else set(loaded)  # typer itself brings pydantic
    assert not heavy


def test_public_names_exist() -> None:
    import radlads

    for name in radlads.__all__:
        assert getattr(radlads, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        radlads.nothing  # noqa: B018


def test_registers_agree() -> None:
    from typing import get_args

    from radlads.backends.mlx.mixers import MLX_MIXERS
    from radlads.backends.torch.mixers.register import TORCH_MIXERS
    from radlads.cli.options import StudentArch
    from radlads.mixers import MIXERS
    from radlads.oracle import ORACLES
    from radlads.spec import DEFAULT_OPTIONS

    assert set(MIXERS) == set(ORACLES) == set(TORCH_MIXERS) == set(MLX_MIXERS)
    assert {name for name in MIXERS if MIXERS[name].recurrent} == set(DEFAULT_OPTIONS) == set(get_args(StudentArch))


def test_error_codes_are_known() -> None:
    import re

    from radlads.errors import CODES, EXIT_STATUS

    used = {code for w in WINGS for path in modules(w) for code in re.findall(r'"(R\d{3})"', path.read_text())}
    assert used <= set(CODES), f"unknown codes {used - set(CODES)}"
    assert all(code[1] in EXIT_STATUS for code in CODES)
