"""What a load test makes of its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmark.load.figure import save_figure, stretches
from benchmark.load.ledger import Answer, Kept, Ledger
from benchmark.load.outcome import Outcome, growth, outages
from benchmark.load.reference import Comparison
from benchmark.load.watch import Sample

MIB = 1 << 20


def samples(size: Callable[[float], float], healthy: Sequence[bool] = (True, False, True)) -> list[Sample]:
    state = {"host_pages": 4, "host_pages_used": 4, "disk_pages": 4, "disk_pages_used": 2}
    return [
        Sample(
            at=float(at),
            rss={"scheduler": int(size(at))},
            answers=0,
            asking=0,
            fault="",
            disk_healthy=healthy[at % len(healthy)],
            state=state,
            remote_healthy=healthy[at % len(healthy)],
        )
        for at in range(600)
    ]


def test_memory_that_fills_up_and_stays_is_flat() -> None:
    noise = np.random.default_rng(0).normal(0, 2 * MIB, 600)
    filled = samples(lambda at: min(at, 100) * MIB + 500 * MIB + noise[int(at)])
    assert abs(growth(filled)) < 3 * MIB


def test_a_leak_is_extrapolated_to_the_whole_run() -> None:
    leaking = samples(lambda at: 500 * MIB + max(0, at - 300) * MIB / 10)
    assert growth(leaking) == pytest.approx(60 * MIB, rel=0.02)
    assert growth(leaking, "scheduler") == growth(leaking)
    assert growth(leaking, "other") == 0


def test_stretches_end_with_the_sample_after_them() -> None:
    seen = samples(lambda _: 1, healthy=(True, False, False, True))[:7]
    assert list(stretches(seen, lambda sample: not sample.disk_healthy)) == [(1.0, 3.0), (5.0, 6.0)]


def test_a_run_that_is_too_short_says_so() -> None:
    with pytest.raises(ValueError, match="too short"):
        growth(samples(lambda _: 1)[:3])


def test_outages_are_counted_by_what_was_seen() -> None:
    seen = [True, True, False, False]
    assert outages(seen) == (1, 0)
    assert outages([*seen, *seen, True]) == (2, 2)


@pytest.fixture
def outcome() -> Outcome:
    answers = [Answer(float(at), 0.1, 0.2, 100, {"storage": 50}) for at in range(600)]
    ledger = Ledger(answers, [Kept([1], [2])])
    return Outcome(
        ledger=ledger,
        samples=samples(lambda _: MIB),
        final={"pins": 0},
        faults=3,
        flushed=1,
        stalled=0.0,
        comparison=Comparison(compared=1),
        hits={"disk": 50, "remote": 20},
        remote_faults=2,
    )


def failing(outcome: Outcome) -> list[str]:
    return [check.what for check in outcome.checks() if not check.holds]


def test_a_good_run_holds_and_is_saved(outcome: Outcome, tmp_path: Path) -> None:
    assert failing(outcome) == []
    outcome.save(tmp_path / "load.json", {"clients": 1})
    save_figure(tmp_path / "load.png", outcome)
    assert (tmp_path / "load.json").stat().st_size > 0
    assert (tmp_path / "load.png").stat().st_size > 0


def test_each_check_can_fail(outcome: Outcome) -> None:
    def broken(what: str, change: Callable[[Any], object]) -> None:
        change(outcome)
        assert what in failing(outcome)

    broken("HTTP 5xx", lambda o: o.ledger.statuses.update({("/generate", 503): 1}))
    broken("lost, refused, damaged", lambda o: o.ledger.failures.update({"damage": 1}))
    broken("wrong answers", lambda o: o.comparison.wrong.append("token 3"))
    broken("pins at rest", lambda o: o.final.update(pins=2))
    broken("tokens from disk", lambda o: o.hits.update(disk=0))
    broken("tokens from remote", lambda o: o.hits.pop("remote"))
    broken("memory growth", lambda o: o.samples.__setitem__(slice(None), samples(lambda at: at * MIB)))
    broken("disk out of service, back", lambda o: o.samples.__delitem__(slice(2, None, 3)))
    assert "remote out of service, back" in failing(outcome)


def test_a_run_without_a_remote_tier_is_asked_nothing_about_it(outcome: Outcome) -> None:
    assert not [check for check in replace(outcome, remote_faults=None).checks() if "remote" in check.what]
