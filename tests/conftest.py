"""The order of the tests: those that train whole models come first, so that no process is left alone with them at the end."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: "walks" not in item.path.parts)
