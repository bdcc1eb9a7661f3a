"""What unit tests and end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sglang_cached_attention  # noqa: F401
import torch

from benchmark.mooncake import Master, missing

LONG = {"e2e", "test_install.py"}
"""Folders and files whose tests take minutes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: what is short fills up the time of whichever process is free at the end."""
    items.sort(key=lambda item: LONG.isdisjoint(item.path.parts))
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU, or a simulated one"))


@pytest.fixture(scope="module")
def master() -> Iterator[Master]:
    """A Mooncake store on this machine; who kills it starts it again."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with Master(client_ttl=3) as running:
        yield running
