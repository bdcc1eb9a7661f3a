"""What unit tests and end-to-end tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmark.mooncake import Master, missing


@pytest.fixture(scope="module")
def master() -> Iterator[Master]:
    """A Mooncake store on this machine; who kills it starts it again."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with Master(client_ttl=3) as running:
        yield running
