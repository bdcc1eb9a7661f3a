"""A disk with slow reads: put this directory on a server's PYTHONPATH and name a file in SLOW_READS.

The file holds seconds per read, as JSON: `0.2`, or `{"below": OFFSET, "seconds": 2, "otherwise": 0.02}` to slow
down what is at the start of a slot file. It is read at every read, so that a disk can turn slow and recover.
Independent of CachedAttention: it wraps `os.preadv`.
"""

import json
import os
import time

_preadv = os.preadv


def _delay(offset: int) -> float:
    try:
        with open(os.environ["SLOW_READS"]) as file:
            rule = json.load(file)
    except (OSError, ValueError):
        return 0.0
    if isinstance(rule, dict):
        return float(rule["seconds"] if offset < rule["below"] else rule["otherwise"])
    return float(rule)


def _slow_preadv(fd, buffers, offset, flags=0):  # type: ignore[no-untyped-def]
    time.sleep(_delay(offset))
    return _preadv(fd, buffers, offset, flags)


if "SLOW_READS" in os.environ:
    os.preadv = _slow_preadv
