import importlib

import numpy as np
import pytest

from radlads.engine import Engine
from tests.toy import ToyEngine


def protocol_methods() -> list[str]:
    return [name for name in vars(Engine) if not name.startswith("_")]


def test_protocol_names_what_chat_and_state_files_need():
    methods = {"start", "feed", "feed_many", "seats", "score", "state_arrays", "from_arrays"}
    assert {"spec", "name", "device"} | methods <= set(protocol_methods())


def test_toy_engine_keeps_the_protocol_and_its_states_are_values():
    engine = ToyEngine()
    assert all(hasattr(engine, name) for name in protocol_methods())
    start = engine.start()
    first, after = engine.feed(start, [5, 6])
    again, _ = engine.feed(start, [5, 6])
    assert np.array_equal(first, again) and start.position == 0 and after.position == 2
    assert engine.from_arrays(engine.state_arrays(after)) == after


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_backends_offer_every_method(name):
    pytest.importorskip("torch" if name == "torch" else "mlx.core")
    module = importlib.import_module(f"radlads.backends.{name}.engine")
    made = [value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__]
    methods = {"start", "feed", "feed_many", "seats", "score", "state_arrays", "from_arrays"}
    assert any(methods <= set(dir(value)) for value in made), "no class of the module is an engine"
