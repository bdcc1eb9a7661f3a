"""What unit tests and end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmark.mooncake import Master, missing


@pytest.fixture
def master() -> Iterator[Master]:
    """A Mooncake store of its own, on this machine."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with Master(client_ttl=3) as running:
        yield running
