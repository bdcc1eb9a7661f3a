"""What the log of a server says about how its pages moved."""

from __future__ import annotations

from pathlib import Path

WAYS = ("saves are made by", "loads are made by")
"""In the log of ours: kernel or copy engines, with the times of both."""
SLOW = ("Failed to load", "Unsupported element_size")
"""In the log of HiCache, each with `HiCache kernel` on the same line: it copies with a slower one instead."""


def ways(log: Path) -> list[str]:
    """Lines of our server that say how it saves and loads, without what precedes the message."""
    return [_message(line) for line in _lines(log) if any(way in line for way in WAYS)]


def slow_kernels(log: Path) -> list[str]:
    """Lines of HiCache's server that say that it does without one of its kernels."""
    return [line for line in _lines(log) if "HiCache kernel" in line and any(text in line for text in SLOW)]


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines() if log.exists() else []


def _message(line: str) -> str:
    return line[max(0, line.find("CachedAttention: ")) :]
