"""Tests that start ranks need torch, which only the extra `replay` brings."""

from importlib.util import find_spec

import pytest

NEED_TORCH = (
    "test_layer",
    "test_cuda",
    "test_failures",
    "test_measure",
    "test_calibrate",
    "test_loop",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("torch") is None:
        for item in items:
            if item.path.stem in NEED_TORCH and item.path.parent.name == "replay":
                item.add_marker(pytest.mark.skip(reason="torch is not installed"))
