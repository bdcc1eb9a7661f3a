"""Removes stores of other fingerprints while the server runs, once all of their pages have expired."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from cached_attention.tiers.disk_opening import remove_expired_stores

logger = logging.getLogger(__name__)

PERIODS = (1.0, 900.0)
"""Shortest and longest seconds between two sweeps; otherwise a quarter of the time to live."""


class Sweeper:
    """A thread; see `remove_expired_stores` for the arguments.

    After an upgrade, the stores of the old fingerprint take the space that the new store needs.
    """

    def __init__(self, own: Path, whole: Path, ttl: float) -> None:
        self._own, self._whole = own, whole
        self._ttl = ttl
        self._period = min(max(PERIODS[0], ttl / 4), PERIODS[1])
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="disk-sweep", daemon=True)
        self._thread.start()

    def close(self, timeout: float) -> bool:
        """False if a sweep still runs after `timeout` seconds."""
        self._closing.set()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while not self._closing.wait(self._period):
            try:
                remove_expired_stores(self._own, self._whole, time.time() - self._ttl)
            except OSError as error:
                logger.warning("%s: expired stores could not be looked for: %s", self._whole, error)
            except Exception:
                logger.exception("%s: expired stores could not be looked for.", self._whole)
