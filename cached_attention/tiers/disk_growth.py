"""Whether a store may take more of its directory."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from cached_attention.tiers.disk_space import disk_usage

logger = logging.getLogger(__name__)

PAUSE = 30.0
"""Seconds until the next attempt after the store could not grow."""
COMPLAINT_PAUSE = 3600.0
"""Seconds between two lines in the log that say so."""


class Growth:
    """Allows a store to grow as long as its directory stays within its size; any thread may ask.

    Args:
        directory: limited to `capacity` bytes, of which everything else in it takes its share.
        path: the store's own directory.
        reserve: bytes that the store takes besides its page files.
    """

    def __init__(self, directory: Path, path: Path, capacity: int, reserve: int) -> None:
        self._directory, self._path = directory, path
        self._room = capacity - reserve
        self._lock = threading.Lock()
        self._resume_at = self._complain_at = float("-inf")

    @property
    def is_on(self) -> bool:
        """False for a while after the store could not grow."""
        return time.monotonic() >= self._resume_at

    def allows(self, size: int) -> bool:
        """Whether the page files may take `size` bytes. Measured, because others may write there too."""
        return self.is_on and size <= self._room - (disk_usage(self._directory) - disk_usage(self._path))

    def pause(self) -> None:
        self._resume_at = time.monotonic() + PAUSE

    def failed(self, error: OSError) -> None:
        """The store could not grow."""
        with self._lock:
            now = time.monotonic()
            if now >= self._complain_at:
                logger.warning("%s: %s; pages are declined until others leave.", self._path, error)
                self._complain_at = now + COMPLAINT_PAUSE
            self.pause()
