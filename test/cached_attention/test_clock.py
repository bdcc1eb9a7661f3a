"""Time that does not jump."""

from __future__ import annotations

import time

import pytest

from cached_attention.clock import EpochClock


def test_it_tells_the_time() -> None:
    clock = EpochClock()
    assert clock() == pytest.approx(time.time(), abs=1.0)


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_the_time_of_the_system_may_be_set(monkeypatch: pytest.MonkeyPatch, step: float) -> None:
    clock = EpochClock()
    before, wall = clock(), time.time
    monkeypatch.setattr(time, "time", lambda: wall() + step)
    assert before <= clock() < before + 60
