"""Hit counts of a replay against models that look at every page."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cached_attention.simulator.cost import Cost
from cached_attention.simulator.engine import Machine
from cached_attention.simulator.policies import POLICIES
from cached_attention.simulator.replay import Replay
from cached_attention.simulator.request import Outcome, Request

Make = Callable[[Sequence[str]], list[Request]]


def hits(outcome: Outcome) -> int:
    return sum(one.hits.pages for one in outcome.served)


def prefixes(word: str) -> list[str]:
    return [word[: end + 1] for end in range(len(word))]


def lru_hits(words: Sequence[str], capacity: int) -> int:
    """Of a model that knows nothing but the time of each page's last use."""
    used: dict[str, int] = {}
    found = 0
    for now, word in enumerate(words):
        pages = prefixes(word)
        known = [page for page in pages if page in used]
        found += len(known)
        used.update(dict.fromkeys(known, now))
        for page in pages[len(known) :]:
            if len(used) == capacity:
                leaves = [one for one in used if one != page[:-1] and not any(o[:-1] == one for o in used)]
                if not leaves:
                    break
                del used[min(leaves, key=lambda one: used[one])]
            used[page] = now
    return found


def most_hits(words: Sequence[str], capacity: int) -> int:
    """Of all ways to choose what to keep after each request."""

    @cache
    def best(place: int, kept: frozenset[str]) -> int:
        if place == len(words):
            return 0
        pages = prefixes(words[place])
        there = kept | set(pages)
        choices = closed_subsets(frozenset(there), capacity)
        return sum(page in kept for page in pages) + max(best(place + 1, choice) for choice in choices)

    return best(0, frozenset())


@cache
def closed_subsets(pages: frozenset[str], most: int) -> list[frozenset[str]]:
    chosen = [frozenset[str]()]
    for page in sorted(pages, key=len):
        chosen += [one | {page} for one in chosen if len(one) < most and (len(page) == 1 or page[:-1] in one)]
    return chosen


short_words = st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=7)


@pytest.mark.parametrize("capacity", [1, 3, 10, 20, 50])
@pytest.mark.parametrize("policy", ["lru", "ours-lru"])
def test_lru_is_lru(make_requests: Make, words: list[str], machine: Machine, capacity: int, policy: str) -> None:
    outcome = Replay(replace(machine, host_pages=capacity), POLICIES[policy], make_requests(words)).run()
    assert hits(outcome) == lru_hits(words, capacity)


@settings(max_examples=60, deadline=None)
@given(words=short_words, capacity=st.integers(1, 4))
def test_no_choice_beats_the_optimum(words: list[str], capacity: int) -> None:
    requests = [
        Request(str(place), float(place), tuple(page.encode() for page in prefixes(word)), len(word), 16, 1)
        for place, word in enumerate(words)
    ]
    outcome = Replay(Machine(Cost(), 16, capacity), POLICIES["optimum"], requests).run()
    assert hits(outcome) == most_hits(tuple(words), capacity)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "optimum"])
def test_every_policy_is_between_nothing_and_the_optimum(
    make_requests: Make, words: list[str], machine: Machine, policy: str
) -> None:
    requests = make_requests(words)
    best = hits(Replay(machine, POLICIES["optimum"], requests).run())
    replay = Replay(machine, POLICIES[policy], requests)
    outcome = replay.run()
    replay.store.check_invariants()
    assert replay.store.pages.in_host.pages <= machine.host_pages
    assert len(outcome.served) == len(words)
    assert hits(outcome) <= best
    assert bool(hits(outcome)) == (policy != "none")


def test_what_fits_is_never_computed_twice(make_requests: Make, words: list[str], machine: Machine) -> None:
    everything = len({page for word in words for page in prefixes(word)})
    repeated = sum(map(len, words)) - everything
    for name, policy in POLICIES.items():
        outcome = Replay(replace(machine, host_pages=everything), policy, make_requests(words)).run()
        assert hits(outcome) == (0 if name == "none" else repeated), name


def test_a_scan_passes_s3_fifo_by(make_requests: Make, machine: Machine) -> None:
    """Pages in use survive more one-time pages than the tier holds; under LRU they do not."""
    words = ["a", "a", "b", "b"]
    words += [chr(0x4E00 + one) for one in range(30)] + ["a", "b"]
    requests = make_requests(words)
    assert hits(Replay(machine, POLICIES["s3-fifo"], requests).run()) == 4
    assert hits(Replay(machine, POLICIES["slru"], requests).run()) == 4
    assert hits(Replay(machine, POLICIES["lru"], requests).run()) == 2


def test_the_simulator_needs_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, cached_attention.simulator as package\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
