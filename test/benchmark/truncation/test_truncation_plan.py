from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmark.truncation.plan import Plan


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    window = draw(st.integers(3, 200))
    step = draw(st.integers(1, window - 1))
    return Plan(window, step, draw(st.integers(0, window - step - 1)))


def test_periods_of_a_long_conversation() -> None:
    assert [tuple(period) for period in Plan(window=256, step=128, sink=16).periods(600)] == [
        (0, 0, 256, 0),
        (1, 256, 384, 128),
        (2, 384, 512, 256),
        (3, 512, 600, 384),
    ]


@given(plan=plans(), tokens=st.integers(1, 1_000))
def test_every_token_is_read_once_and_fits_into_the_window(plan: Plan, tokens: int) -> None:
    periods = list(plan.periods(tokens))
    assert [period.start for period in periods] == [0, *(period.end for period in periods[:-1])]
    assert periods[-1].end == tokens
    for period in periods:
        assert period.start < period.end
        assert period.end - period.dropped <= plan.window
        # What is dropped lies before what is new.
        assert plan.sink + period.dropped <= period.start or period.dropped == 0


@pytest.mark.parametrize("sizes", [(8, 0, 0), (8, 8, 0), (8, 4, 4), (8, 4, -1)])
def test_plans_that_keep_nothing_or_drop_nothing(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="the step must be at least one token"):
        Plan(*sizes)
