"""Text that repeats parts of itself, as conversations, manuals and logs do."""

from __future__ import annotations

import numpy as np

SHORTEST = 8
LONGEST = 24


def quoting(text: np.ndarray, source: np.random.Generator) -> np.ndarray:
    """`text`, `[tokens]`, with about half of its later part replaced by copies of earlier passages."""
    written = text.copy()
    place = int(source.integers(LONGEST, 2 * LONGEST))
    while place < len(written):
        start = int(source.integers(1, place - SHORTEST))
        length = min(int(source.integers(SHORTEST, LONGEST)), place - start, len(written) - place)
        written[place : place + length] = written[start : start + length]
        place += length + int(source.integers(SHORTEST, LONGEST))
    return written
