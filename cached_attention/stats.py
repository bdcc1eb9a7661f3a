"""What a store counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StoreStats:
    """Counts since the store was made, in pages."""

    loaded: int = 0
    saved: int = 0
    declined: int = 0
    """Not saved: host memory was full of pages in use, or the page before was not in the store."""
    failed: int = 0
    """Saves whose copy failed."""
    expired: int = 0
    """Not used for longer than the time to live."""
