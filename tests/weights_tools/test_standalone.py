"""The joiner: what it ships stands alone and is complete, and what it cannot keep right it refuses."""

import ast
import importlib.util
import json
import sys

import pytest
import torch

import radlads
from radlads.backends.torch.model import Decoder
from radlads.weights_tools.standalone import CONFIG_KEYS, ENTRIES, join_module, model_files
from tests.models import tiny_spec

FOREIGN = {
    "radlads_mlx.py": {"mlx", "mlx_lm"},
    "configuration_radlads.py": {"transformers"},
    "modeling_radlads.py": {"torch", "transformers", "triton"},
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes files of a small package in place of ours, and joins its backends/x/entry.py."""
    monkeypatch.setattr(radlads, "__path__", [str(tmp_path)])

    def join(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return join_module("radlads.backends.x.entry")

    return join


def imports_of(text):
    """Top modules of every import in the text, wherever it stands."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("file", ENTRIES)
def test_shipped_file_imports_its_framework_and_the_standard_library(file):
    files, _ = model_files(tiny_spec().as_student("rwkv7"))
    text = files[file].decode()
    assert set(imports_of(text)) - sys.stdlib_module_names <= FOREIGN[file]
    assert "# SPDX-License-Identifier: Apache-2.0" in text and f"radlads {radlads.__version__}" in text
    assert "# ---- radlads.spec ----" in text and f"# ---- {ENTRIES[file]} ----" in text


def test_config_keys_name_what_the_files_define():
    files, keys = model_files(tiny_spec().as_student("rwkv6"))
    assert keys == CONFIG_KEYS and keys is not CONFIG_KEYS
    json.dumps(keys)
    assert keys["model_file"] in files
    for target in keys["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}(" in files[f"{module}.py"].decode()


def test_teacher_ships_nothing():
    assert model_files(tiny_spec()) == ({}, {})


def test_joined_torch_model_is_bit_equal_to_the_package(tmp_path):
    spec = tiny_spec().as_student("rwkv7", (1,))
    path = tmp_path / "modeling_radlads.py"
    path.write_bytes(model_files(spec)[0][path.name])
    location = importlib.util.spec_from_file_location("joined_radlads", path)
    joined = importlib.util.module_from_spec(location)
    location.loader.exec_module(joined)
    ours, theirs = Decoder(spec), joined.Decoder(joined.ModelSpec.from_dict(spec.to_dict()))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in ours.parameters():
            x.copy_(0.1 * torch.randn(x.shape, generator=generator))
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(spec.V, (2, 40), generator=generator)
    with torch.no_grad():
        assert torch.equal(ours(tokens)[0], theirs(tokens)[0])


ENTRY = '''\
"""Entry."""

import os

from radlads.backends.x.part import double
from radlads.spec import ONE

TWO = double(ONE)
'''
PART = """\
import os
from math import (
    floor,
)

from radlads.spec import ONE


def double(x):
    return floor(x + ONE)
"""


def test_modules_come_in_the_order_of_their_imports_once(package):
    text = package({"backends/x/entry.py": ENTRY, "backends/x/part.py": PART, "spec.py": "# why\nONE = 1\n"})
    assert text.index("ONE = 1") < text.index("def double") < text.index("TWO =")
    assert (text.count("import os"), text.count("ONE = 1"), text.count("# why")) == (1, 1, 1)
    assert text.startswith("# SPDX") and '"""Entry."""' in text
    names = {}
    exec(text, names)
    assert names["TWO"] == 2


def test_guarded_imports_of_others_stay_as_they_stand(package):
    guard = "try:\n    import json as codec\nexcept ImportError:\n    codec = None\n"
    assert guard in package({"backends/x/entry.py": guard})


def test_package_folder_is_a_module_too(package):
    text = package({"backends/x/entry.py": "from radlads.mixers import A\n", "mixers/__init__.py": "A = 1\n"})
    assert "# ---- radlads.mixers ----" in text


REFUSED = {
    "relative": ("from . import part\n", "relative"),
    "future": ("from __future__ import annotations\n", "__future__"),
    "as": ("from radlads.spec import ONE as UNO\n", "another name"),
    "module": ("import radlads.spec\n", "as a module"),
    "star": ("from radlads.spec import *\n", r"import of \*"),
    "function": ("def f():\n    from radlads.spec import ONE\n    return ONE\n", "inside a block or function"),
    "guarded": ("try:\n    from radlads.spec import ONE\nexcept ImportError:\n    ONE = 1\n", "inside a block or function"),
    "relative in function": ("def f():\n    from . import part\n", "inside a block or function"),
    "unknown name": ("from radlads.spec import NONE\n", "defines no NONE"),
    "submodule": ("from radlads.backends.x import part\n", "no such module"),
    "other floor": ("from radlads.errors import fail\n", "may not be shipped"),
    "other backend": ("from radlads.backends.y.part import f\n", "may not be shipped"),
    "missing": ("from radlads.backends.x.gone import f\n", "no such module"),
    "circle": ("from radlads.backends.x.back import f\n", "circle"),
    "name twice": ("from radlads.spec import ONE\n\n_product = 1\n", "'_product' has another meaning"),
    "name twice in a block": ("from radlads.spec import ONE\n\nif ONE:\n    _product = 1\n", "'_product' has another meaning"),
    "import against definition": ("from radlads.spec import ONE\nfrom os import path as helper\n", "'helper' has"),
    "import twice": ("from cmath import sqrt\n\nfrom radlads.spec import ONE\n", "'sqrt' has another meaning"),
    "imported and defined": ("from os import path\n\n\ndef path():\n    pass\n", "imported and defined"),
    "one line": ("import os; x = 1\n", "two statements on a line"),
}  # fmt: skip


@pytest.mark.parametrize("text, reason", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_right_is_refused(package, text, reason):
    with pytest.raises(ValueError, match=reason):
        package(
            {
                "backends/x/entry.py": text,
                "backends/x/part.py": "f = 1\n",
                "backends/y/part.py": "f = 1\n",
                "backends/x/back.py": "from radlads.backends.x.entry import g\n\nf = g\n",
                "errors.py": "def fail():\n    pass\n",
                "spec.py": "from math import sqrt\n\nONE = sqrt(1)\n\n\ndef helper():\n    pass\n\n\ndef _product():\n    pass\n",
            }
        )


def test_comprehension_variables_are_no_names_of_the_module(package):
    package(
        {
            "backends/x/entry.py": "from radlads.spec import A\n\nB = [x for x in A]\n",
            "spec.py": "A = [x for x in (1, 2)]\n",
        }
    )
