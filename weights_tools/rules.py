"""Names and layouts of other formats as tables that are read in both directions.

A pattern holds `{i}`, the layer, and may end in `{x}`, any rest of a name. The first rule that fits counts.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from radlads.tensors import Raw
from radlads.weights_tools.lazy import Lazy, small


@dataclass(frozen=True)
class Transform:
    """A reversible change of layout: one or several of our tensors to one of theirs, and back."""

    forward: Callable[[Sequence[Lazy]], Lazy]
    backward: Callable[[Lazy], Sequence[Lazy]]


@dataclass(frozen=True)
class Rule:
    """`ours` (several names where tensors are joined) is `theirs` after `transform`.

    `kept` limits it to softmax layers (True) or to all others (False).
    """

    ours: str | tuple[str, ...]
    theirs: str
    transform: Transform
    kept: bool | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Our names."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


SAME = Transform(lambda ours: ours[0], lambda theirs: (theirs,))


def reshaped(change: Callable[[Raw], Raw], back: Callable[[Raw], Raw]) -> Transform:
    """A change of axes of one small tensor."""

    def apply(tensor: Lazy, turn: Callable[[Raw], Raw]) -> Lazy:
        return small(tensor, turn, turn(np.broadcast_to(np.uint8(0), tensor.shape)).shape)

    return Transform(lambda ours: apply(ours[0], change), lambda theirs: (apply(theirs, back),))


@lru_cache
def expression(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression with the groups `i` and `x`."""
    parts = re.escape(pattern).replace(r"\{i\}", r"(?P<i>\d{1,6})").replace(r"\{x\}", r"(?P<x>.+)")
    return re.compile(parts)


def filled(pattern: str, found: re.Match[str]) -> str:
    """The pattern with what another one matched."""
    groups = found.groupdict()
    return pattern.replace("{i}", groups.get("i") or "").replace("{x}", groups.get("x") or "")


def first_match(rules: Iterable[Rule], name: str, theirs: bool, kept: frozenset[int]) -> tuple[Rule, re.Match[str]] | None:
    """The first rule that fits a name of theirs, or one of ours; `kept` are the softmax layers."""
    for rule in rules:
        for pattern in (rule.theirs,) if theirs else rule.names:
            found = expression(pattern).fullmatch(name)
            if found and (rule.kept is None or rule.kept == (int(found["i"]) in kept)):
                return rule, found
    return None


def to_theirs(rules: Sequence[Rule], tensors: Mapping[str, Lazy], kept: Iterable[int] = ()) -> dict[str, Lazy]:
    """Our tensors under their names, in our order; KeyError naming the first that no rule covers."""
    softmax, made = frozenset(kept), dict[str, Lazy]()
    for name in tensors:
        match = first_match(rules, name, False, softmax)
        if match is None:
            raise KeyError(name)
        rule, found = match
        target = filled(rule.theirs, found)
        if target not in made:
            made[target] = rule.transform.forward([tensors[filled(ours, found)] for ours in rule.names])
    return made


def to_ours(rules: Sequence[Rule], tensors: Mapping[str, Lazy], kept: Iterable[int] = ()) -> dict[str, Lazy]:
    """Their tensors under our names; KeyError naming the first that no rule covers."""
    softmax, made = frozenset(kept), dict[str, Lazy]()
    for name, tensor in tensors.items():
        match = first_match(rules, name, True, softmax)
        if match is None:
            raise KeyError(name)
        rule, found = match
        for ours, part in zip(rule.names, rule.transform.backward(tensor), strict=True):
            made[filled(ours, found)] = part
    return made
