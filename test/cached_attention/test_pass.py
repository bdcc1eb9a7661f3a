"""What one scheduling pass asks, settles and decides is bounded, and nothing is left behind for good."""

from __future__ import annotations

import pytest

from cached_attention.hierarchy import Hierarchy
from cached_attention.index import PageKey
from cached_attention.migration import fetch, look_ahead
from cached_attention.migration.fetch import Fetch
from cached_attention.migration.fetch_source import DiskSource
from cached_attention.migration.look_ahead import ASKING, ASKING_MOST, ASKING_SHARE, BATCH, REVIEWED, LookAhead
from cached_attention.policy.waiting import CEILING, WaitOrRecompute
from cached_attention.simulator.cost import Cost
from cached_attention.simulator.disk import SimulatedDisk
from cached_attention.tiers.host_slots import HostSlots

CHAIN = 4 * BATCH
PAGE_TOKENS = 64


class Waiting:
    """Requests whose pages are on a disk that takes `page_seconds` for each, by a clock that tests set."""

    def __init__(self, requests: int, page_seconds: float = 1e-6) -> None:
        self.now, self.per_look = 0.0, 0.0
        cost = Cost(page_bytes=1, disk_read=1 / page_seconds, disk_latency=0.0)
        self.disk = SimulatedDisk(requests * CHAIN, cost, lambda: self.now)
        self.pages = Hierarchy(HostSlots(2 * requests * CHAIN), has_disk=True)
        decision = WaitOrRecompute(always=True)
        self.fetch = Fetch(self.pages, DiskSource(self.pages, self.disk, decision.fetching), clock=self.look)
        self.ahead = LookAhead(self.pages, self.fetch, decision, 1 << 20, PAGE_TOKENS, self.look)
        self.names = [f"request {number}" for number in range(requests)]
        for name in self.names:
            keys = self.keys(name)
            for place, key in enumerate(keys):
                row = self.pages.index.add(key, keys[place - 1] if place else None, place)
                self.pages.index.place(row, self.pages.on_disk, row)
            self.pages.waiting.append(name)
            self.ahead.prefetch(name, keys, 0)

    def look(self) -> float:
        """The clock, as a pass sees it: its own work takes time."""
        self.now += self.per_look
        return self.now

    @staticmethod
    def keys(name: str) -> list[PageKey]:
        return [f"{name}, page {page}".encode() for page in range(CHAIN)]

    def run_pass(self) -> list[str]:
        """Returns the requests that may run."""
        self.disk.advance()
        self.fetch.poll()
        self.ahead.advance()
        return [name for name in self.names if self.ahead.is_ready(name)]

    @property
    def asked(self) -> int:
        return self.pages.in_host.pages


def test_a_slow_thread_asks_for_one_batch_in_a_pass_and_for_everything_in_the_end() -> None:
    waiting = Waiting(3)
    waiting.per_look = ASKING
    for passes in range(1, 3 * CHAIN // BATCH + 1):
        waiting.run_pass()
        assert waiting.asked == passes * BATCH
    waiting.per_look = 0.0
    waiting.now += 1
    assert waiting.run_pass() == waiting.names


def test_after_a_long_forward_more_is_asked_for_up_to_a_limit() -> None:
    waiting = Waiting(60)
    asked = []
    for forward in (0.0, 0.1, 100.0):
        waiting.now += forward
        waiting.per_look = ASKING / 4
        before = waiting.asked
        waiting.run_pass()
        asked.append(waiting.asked - before)
    assert BATCH <= asked[0] < asked[1] < asked[2] <= BATCH * (ASKING_MOST / waiting.per_look + 1)
    assert ASKING < 0.1 * ASKING_SHARE < ASKING_MOST


def test_a_burst_of_reads_is_settled_bit_by_bit() -> None:
    waiting = Waiting(2)
    waiting.ahead.advance()
    reads = 2 * CHAIN // BATCH
    waiting.now += 1
    waiting.disk.advance()
    waiting.per_look = fetch.SETTLING
    left = []
    for _ in range(reads):
        waiting.fetch.poll()
        left.append(waiting.fetch.in_flight.disk)
    assert left == list(range((reads - 1) * BATCH, -1, -BATCH))
    assert all(waiting.ahead.is_ready(name) for name in waiting.names)


def test_more_that_turns_out_to_be_there_is_asked_for_beside_what_is_on_its_way() -> None:
    waiting = Waiting(1)
    (name,) = waiting.names
    keys = waiting.keys(name)
    waiting.ahead.leave(name)
    for restorable in (CHAIN // 2, CHAIN):
        waiting.ahead.prefetch(name, keys[:restorable], 0)
        waiting.ahead.advance()
        assert waiting.fetch.held == restorable
    waiting.now += 1
    waiting.disk.advance()
    while waiting.fetch.is_reading:
        waiting.fetch.poll()
    assert waiting.ahead.is_ready(name)
    assert waiting.fetch.span(name).pages == CHAIN
    waiting.ahead.leave(name)
    assert not waiting.fetch.pins


def test_what_was_lost_and_is_asked_for_again_counts_once() -> None:
    """Pages of the remote store, which was out of reach meanwhile."""
    keys = Waiting.keys("request")[:8]
    prefetch = look_ahead._Prefetch([], 0, 0, 0, 0)
    for _ in range(3):
        prefetch.extend(keys, PAGE_TOKENS, lambda key: False)
        assert (prefetch.pages, prefetch.remote) == (8, 8)
        prefetch.cut_short()
        assert (prefetch.pages, prefetch.remote) == (0, 0)


@pytest.mark.parametrize("requests", [REVIEWED, 10 * REVIEWED])
def test_whoever_has_waited_too_long_runs_the_front_at_once_and_the_others_in_their_turn(requests: int) -> None:
    waiting = Waiting(requests, page_seconds=1e6)
    assert not waiting.run_pass()
    waiting.now += CEILING
    assert waiting.run_pass()[:REVIEWED] == waiting.names[:REVIEWED]
    for _ in range(requests // REVIEWED):
        ready = waiting.run_pass()
    assert ready == waiting.names
    assert waiting.pages.stats.given_up == requests


def test_whoever_the_scheduler_has_not_come_to_is_not_given_up_and_runs_once_its_pages_are_there() -> None:
    waiting = Waiting(1, page_seconds=CEILING)
    (name,) = waiting.names
    waiting.run_pass()
    for _ in range(3):
        waiting.now += CEILING
        assert not waiting.ahead.is_ready(name, may_give_up=False)
    assert not waiting.pages.stats.given_up
    waiting.now += CEILING * CHAIN
    waiting.disk.advance()
    waiting.fetch.poll()
    assert waiting.ahead.is_ready(name, may_give_up=False)


def test_whoever_is_not_looked_at_again_yet_runs_once_its_pages_are_there() -> None:
    waiting = Waiting(10 * REVIEWED, page_seconds=1e-3)
    waiting.per_look = ASKING
    last = waiting.names[2 * REVIEWED]
    assert last not in waiting.run_pass()
    waiting.per_look = 0.0
    waiting.ahead.advance()  # Asks for all.
    waiting.now += 1e-3 * CHAIN * (2 * REVIEWED + 1)
    waiting.disk.advance()
    assert not waiting.ahead.is_ready(last)
    waiting.fetch.poll()
    assert waiting.ahead.is_ready(last)
    assert not waiting.ahead.is_ready(waiting.names[-1])
    assert not waiting.pages.stats.given_up


def test_pages_that_were_lost_since_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look_ahead, "BATCH", 3)
    waiting = Waiting(1)
    keys = waiting.keys(waiting.names[0])
    pages = waiting.pages
    for key in reversed(keys[7:]):
        pages.leave_disk(pages.index.find(key))
    waiting.ahead.advance()
    waiting.now += 1
    assert waiting.run_pass() == waiting.names
    assert pages.loadable(keys, 0) == 7
