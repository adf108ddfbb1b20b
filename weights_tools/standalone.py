"""Joins our model code into the one file per runtime that a converted model ships, so that it runs without radlads.

The sources are read as text and never imported. What joining cannot keep right is refused, as ValueError with the place.
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import radlads
from radlads.spec import ModelSpec

# Shipped file: the module it grows from.
ENTRIES = {
    "radlads_mlx.py": "radlads.backends.mlx.model",
    "configuration_radlads.py": "radlads.backends.torch.hf_config",
    "modeling_radlads.py": "radlads.backends.torch.hf",
}
CONFIG_KEYS = {
    "model_file": "radlads_mlx.py",
    "auto_map": {
        "AutoConfig": "configuration_radlads.RadladsConfig",  # mlx-lm reads it too, where there is no PyTorch
        "AutoModelForCausalLM": "modeling_radlads.RadladsForCausalLM",
    },
}
# Besides its own backend, a shipped file may hold these and what lies below them.
SHARED = ("radlads.spec", "radlads.mixers", "radlads.positions")
HEADER = """\
# SPDX-License-Identifier: Apache-2.0
# Part of radlads {version}, joined from the sources named below; it needs no radlads to run.
"""
LINE_LENGTH = 130


@dataclass
class Source:
    """One module of ours: its text without docstring and lifted imports, and what it needs and defines."""

    name: str
    docstring: str = ""
    body: str = ""
    needs: dict[str, set[str]] = field(default_factory=dict)  # module of ours: names taken from it
    lifted: dict[str, str] = field(default_factory=dict)  # name: the import that binds it
    defined: set[str] = field(default_factory=set)


def model_files(spec: ModelSpec) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files and config keys by which mlx-lm and transformers load a model on their own; none for a teacher."""
    if spec.recurrent is None:
        return {}, {}
    return {file: joined(entry) for file, entry in ENTRIES.items()}, dict(CONFIG_KEYS)


@cache
def joined(entry: str) -> bytes:
    """`join_module` once in a process: it takes a second, and the sources do not change."""
    return join_module(entry).encode()


def join_module(entry: str) -> str:
    """The text of one Python file with module `entry` and every module of ours that it imports, in import order."""
    sources: dict[str, Source] = {}
    collect(entry, entry.rpartition(".")[0], sources, ())
    check_names(sources)
    lifted = {line for source in sources.values() for line in source.lifted.values()}
    blocks = [f'"""{sources[entry].docstring}"""\n\n{import_block(lifted)}']
    blocks += [f"# ---- {source.name} ----\n\n{source.body}" for source in sources.values() if source.body]
    return HEADER.format(version=radlads.__version__) + "\n\n\n".join(blocks) + "\n"


def collect(name: str, backend: str, sources: dict[str, Source], path: tuple[str, ...]) -> None:
    """Add module `name` to `sources` after everything that it imports; a circle is refused."""
    if name in path:
        raise ValueError(f"{name}: imported in a circle: {' -> '.join(path)}")
    if name in sources:
        return
    if not any(name == root or name.startswith(f"{root}.") for root in (backend, *SHARED)):
        raise ValueError(f"{name}: it may not be shipped in {backend} (imported by {path[-1]})")
    source = read_source(name)
    for needed, names in source.needs.items():
        collect(needed, backend, sources, (*path, name))
        unknown = names - sources[needed].defined - sources[needed].lifted.keys() - set().union(*sources[needed].needs.values())
        if unknown:
            raise ValueError(f"{name}: {needed} defines no {', '.join(sorted(unknown))}; a module itself cannot be imported")
    sources[name] = source


def read_source(name: str) -> Source:
    """Read and take apart one module of ours."""
    text = find_source(name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    source = Source(name, ast.get_docstring(tree, clean=False) or "")
    removed: list[ast.stmt] = tree.body[:1] if source.docstring else []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            take_import(source, node)
            removed.append(node)
        else:
            source.defined.update(bound_names(node))
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom) and any(is_ours(module) for module in modules_of(inner)):
                    raise ValueError(f"{name}:{inner.lineno}: import of ours inside a block or function")
    lines = text.splitlines()
    for before, after in zip(tree.body, tree.body[1:], strict=False):
        if before in removed and before.end_lineno == after.lineno:
            raise ValueError(f"{name}:{after.lineno}: two statements on a line")
    for node in removed:
        last = node.end_lineno or node.lineno
        lines[node.lineno - 1 : last] = [""] * (last - node.lineno + 1)
    source.body = "\n".join(lines).strip("\n")
    return source


def find_source(name: str) -> Path:
    """The file of a module of ours, without importing it."""
    inner = Path(*name.split(".")[1:])
    for root in map(Path, radlads.__path__):
        for candidate in (root / inner.with_suffix(".py"), root / inner / "__init__.py"):
            if candidate.is_file():
                return candidate
    raise ValueError(f"{name}: there is no such module")


def take_import(source: Source, node: ast.Import | ast.ImportFrom) -> None:
    """Record a top-level import: names from a module of ours, or a line to lift."""
    place = f"{source.name}:{node.lineno}"
    if isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__"):
        raise ValueError(f"{place}: relative import or __future__")
    for alias in node.names:
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        if alias.name == "*":
            raise ValueError(f"{place}: import of *")
        if is_ours(module):
            if alias.asname or isinstance(node, ast.Import):
                raise ValueError(f"{place}: import of ours as another name or as a module")
            source.needs.setdefault(module, set()).add(alias.name)
        else:
            name = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
            source.lifted[alias.asname or alias.name] = (
                f"import {name}" if isinstance(node, ast.Import) else f"from {module} import {name}"
            )


def check_names(sources: dict[str, Source]) -> None:
    """Refuse a top-level name that two modules define, or that is an import in one place and something else in another."""
    meanings: dict[str, tuple[str, str]] = {}
    for source in sources.values():
        bound = {**{name: f"defined in {source.name}" for name in source.defined}, **source.lifted}
        for name, meaning in bound.items():
            known, place = meanings.setdefault(name, (meaning, source.name))
            if known != meaning:
                raise ValueError(f"{source.name}: name {name!r} has another meaning in {place}")
        clash = source.defined & source.lifted.keys()
        if clash:
            raise ValueError(f"{source.name}: {sorted(clash)[0]!r} is imported and defined")


def import_block(lifted: set[str]) -> str:
    """Import lines merged by module and sorted, the standard library first."""
    names: dict[str, set[str]] = {}
    standard: list[str] = []
    others: list[str] = []
    for line in sorted(lifted):
        if line.startswith("import "):
            (standard if is_standard(line.split()[1]) else others).append(line)
        else:
            module, _, name = line.removeprefix("from ").partition(" import ")
            names.setdefault(module, set()).add(name)
    for module, taken in sorted(names.items()):
        line = f"from {module} import {', '.join(sorted(taken))}"
        if len(line) > LINE_LENGTH:
            line = f"from {module} import (\n    " + ",\n    ".join(sorted(taken)) + ",\n)"
        (standard if is_standard(module) else others).append(line)
    return "\n\n".join("\n".join(lines) for lines in (standard, others) if lines)


def is_standard(module: str) -> bool:
    """Whether a module belongs to Python's standard library."""
    return module.partition(".")[0] in sys.stdlib_module_names


def bound_names(node: ast.AST) -> Iterator[str]:
    """Names that a statement at module level binds in the module, also within its blocks."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).partition(".")[0]
    elif isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Store):
            yield node.id
    elif not isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        for inner in ast.iter_child_nodes(node):
            yield from bound_names(inner)


def modules_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Modules that an import statement names; a relative one counts as ours."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return ["radlads"] if node.level else [node.module or ""]


def is_ours(module: str) -> bool:
    """Whether a module belongs to radlads."""
    return module.partition(".")[0] == "radlads"
