"""Reading the YAML of a recipe: plain scalars, lists and tables only, each with its line.

Aliases, tags, duplicate keys and deep nesting are refused, so no text can grow or build objects. What the values mean is
the matter of `recipe`.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from radlads.errors import RadladsError, fail

MAX_BYTES = 1 << 18
MAX_DEPTH = 16
# YAML 1.2's plain forms, and underscores in numbers. YAML 1.1 would read 1e-5 as text, 010 as 8 and `no` as false.
PLAIN = (
    (re.compile(r"~|null|Null|NULL|"), lambda text: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text.lower() == "true"),
    (re.compile(r"[-+]?(0|[1-9][0-9_]*)"), int),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: -math.inf if text[0] == "-" else math.inf),
    (re.compile(r"\.(nan|NaN|NAN)"), lambda text: math.nan),
)


@dataclass
class Document:
    """Values of one YAML file, and the line of every key by its path."""

    path: Path
    values: dict[str, Any]
    lines: dict[tuple[str | int, ...], int]
    base: "Document | None" = None

    def place(self, *path: str | int) -> str:
        """Where a key stands, as "file:line: a.0.b": in the file, else in its base, else the nearest key above it."""
        if path not in self.lines and self.base is not None and path in self.base.lines:
            return self.base.place(*path)
        known = next((path[:n] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        line = "" if known is None else f":{self.lines[known]}"
        return f"{self.path}{line}" + (f": {'.'.join(map(str, path))}" if path else "")


def read_document(path: Path) -> Document:
    """The table in a YAML file. Raises R201 when it cannot be read, R102 when it is not valid."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise fail("R201", where=path, why=str(error.strerror), fix="Check the path and its permissions") from None
    if len(data) > MAX_BYTES:
        raise fail("R102", where=path, why=f"it is larger than {MAX_BYTES} bytes", fix="Give a recipe file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise fail("R102", where=path, why=f"byte {error.start} is not UTF-8", fix="Save the file as UTF-8") from None
    lines: dict[tuple[str | int, ...], int] = {}
    values = parse(text, str(path), lines)
    if not isinstance(values, dict):
        raise fail("R102", where=path, why="it holds no table of settings", fix="Write `key: value` lines")
    return Document(path, values, lines)


def parse_value(text: str, where: str) -> Any:
    """The value after "=" of an override, read as YAML; a table only in braces, so that text may hold colons. Raises R101."""
    try:
        value = parse(text, where, {})
        return text if isinstance(value, dict) and not text.lstrip().startswith("{") else value
    except RadladsError as error:
        raise fail("R101", where=where, why=error.why, fix="Write a plain YAML value") from None


def parse(text: str, where: str, lines: dict[tuple[str | int, ...], int]) -> Any:
    """Value of a YAML text; fills `lines` with the line of every key. Raises R102 naming the line."""
    try:
        check_events(text)
        node = yaml.compose(text, yaml.SafeLoader)
        return None if node is None else build(node, (), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if mark else where
        raise fail("R102", where=place, why=error.problem or "it is no YAML", fix="Correct the file") from None
    except (yaml.YAMLError, ValueError) as error:
        raise fail("R102", where=where, why=str(error).splitlines()[0], fix="Correct the file") from None


def check_events(text: str) -> None:
    """Refuse aliases, tags and deep nesting before anything is built."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not allowed", problem_mark=event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(problem="tags are not allowed", problem_mark=event.start_mark)
        if depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"it is nested deeper than {MAX_DEPTH} levels", problem_mark=event.start_mark)


def build(node: yaml.Node, path: tuple[str | int, ...], lines: dict[tuple[str | int, ...], int]) -> Any:
    """Python value of a node: dict, list, str, int, float, bool or None."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [build(item, (*path, index), lines) for index, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        table: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a name", problem_mark=key_node.start_mark)
            key = key_node.value
            if key in table:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} stands twice", problem_mark=key_node.start_mark)
            lines[(*path, key)] = key_node.start_mark.line + 1
            table[key] = build(value_node, (*path, key), lines)
        return table
    if node.style is None:
        for form, read in PLAIN:
            if form.fullmatch(node.value):
                return read(node.value)
    return node.value
