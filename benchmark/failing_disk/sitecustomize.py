"""A failing disk: put this directory on a server's PYTHONPATH and name a file in FAILING_DISK.

The file says which calls fail and how, as JSON: `{"calls": ["preadv"], "errno": "EIO"}`; with `"seconds": 0.5`
they take that long first, and without `errno` they only take long. Without the file nothing fails. It is read at
every call, so that a disk can fail and recover. Independent of CachedAttention: it wraps functions of `os`.
"""

import errno
import functools
import json
import os
import time

CALLS = ("preadv", "pwritev", "fdatasync", "posix_fallocate")


def _rule():  # type: ignore[no-untyped-def]
    try:
        with open(os.environ["FAILING_DISK"]) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {"calls": []}


def _failing(name):  # type: ignore[no-untyped-def]
    call = getattr(os, name)

    @functools.wraps(call)
    def failing(*args):  # type: ignore[no-untyped-def]
        rule = _rule()
        if name in rule["calls"]:
            time.sleep(rule.get("seconds", 0))
            if "errno" in rule:
                raise OSError(getattr(errno, rule["errno"]), f"{name}, on purpose")
        return call(*args)

    return failing


if "FAILING_DISK" in os.environ:
    for name in CALLS:
        setattr(os, name, _failing(name))
