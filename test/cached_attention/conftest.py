from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from cached_attention.tiers.disk_files import FileIO


class GatedReads(FileIO):
    """Reads of the disk wait while the gate is shut."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        assert self.gate.wait(20)
        return super().preadv(fd, buffers, offset)


@pytest.fixture(scope="session")
def gated_reads() -> type[GatedReads]:
    return GatedReads
