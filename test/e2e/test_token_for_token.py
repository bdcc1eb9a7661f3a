"""A server with a tiny device pool and a host tier answers what a server with a huge device pool answers."""

from __future__ import annotations

from typing import Any

import pytest

HISTORY = 400
ROOMY = ("--max-total-tokens", "60000")


def tight(tokens: int) -> tuple[str, ...]:
    return ("--max-total-tokens", str(tokens))


def test_thirty_conversations_of_five_turns(models: Any, start: Any, town: Any) -> None:
    model, turns, concurrency = models(), 5, (1, 4, 2, 3)
    expected, actual = town(30, HISTORY), town(30, HISTORY)
    with start(model, *ROOMY) as reference:
        expected.hold(reference, turns, concurrency)
    # Two of the longest conversations fit: 400 + 29 * 37 + 5 * (40 + 16) tokens each.
    with start(model, *tight(3520), host_size="600MB") as server:
        actual.hold(server, turns, concurrency)
    assert actual.answers == expected.answers
    assert expected.cached("host") == 0
    assert actual.cached("host") > 80_000
    assert actual.cached("device") < actual.cached("host")


@pytest.mark.parametrize(
    ("architecture", "dtype", "args"),
    [
        ("llama", "bfloat16", ("--disable-overlap-schedule",)),
        ("deepseek-mla", "float32", ()),
        ("llama", "float32", ("--tp-size", "2")),
    ],
    ids=["bfloat16-no-overlap", "mla", "tp2"],
)
def test_other_ways_to_run(
    models: Any, start: Any, town: Any, architecture: str, dtype: str, args: tuple[str, ...]
) -> None:
    model, turns = models(architecture, dtype), 3
    expected, actual = town(6, HISTORY), town(6, HISTORY)
    with start(model, *ROOMY, *args) as reference:
        expected.hold(reference, turns)
    with start(model, *tight(1216), *args, host_size="200MB") as server:
        actual.hold(server, turns)
    assert actual.answers == expected.answers
    assert actual.cached("host") > 4_000
