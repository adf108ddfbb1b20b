from dataclasses import fields, is_dataclass
from importlib import import_module

import pytest

from radlads.cli.verbs import GROUPS, VERBS


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_row_leads_to_a_documented_function_and_its_options(verb):
    module = import_module(verb.module)
    options = getattr(module, verb.options)
    assert is_dataclass(options) and getattr(module, verb.function).__doc__
    for item in fields(options):
        assert item.metadata["help"].endswith("."), f"{verb.name} {item.name}"
    assert verb.summary.endswith(".") and verb.examples and all(f"radlads {verb.name}" in line for line in verb.examples)


def test_names_and_aliases_are_unique_and_groups_known():
    words = [word for verb in VERBS for word in (verb.name, *verb.aliases)]
    assert len(set(words)) == len(words)
    assert {verb.name.split()[0] for verb in VERBS if " " in verb.name} == set(GROUPS)
