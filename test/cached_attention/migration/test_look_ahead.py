"""What the waiting queue and clients' hints do to the tiers: who is fetched, who is kept, who lets go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from cached_attention import store
from cached_attention.chain import Chain, PageRun
from cached_attention.drops import DROPPING, PAUSE
from cached_attention.fingerprint import Fingerprint
from cached_attention.hints import GRACE
from cached_attention.layout import DevicePool
from cached_attention.policy.waiting import WaitOrRecompute
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier

PAGE, LONG = 2, 4
"""Tokens of a page, pages of a conversation."""
HOST_PAGES = 10


def keys_of(name: str, pages: int = LONG) -> list[bytes]:
    return [sha256(f"{name} {page}".encode()).digest() for page in range(pages)]


class Talk:
    """A store over disk whose conversations, named by letters, are `LONG` pages each."""

    def __init__(self, directory: Path, io: Any, look_ahead: int = 100) -> None:
        self.io = io
        self.directory = directory
        self.pool = DevicePool([[torch.zeros(LONG * PAGE, 1, 4)]], PAGE)
        self.look_ahead = look_ahead
        self.host_pages = HOST_PAGES
        self.now = 1000.0
        self.open()

    def open(self) -> None:
        layout = self.pool.layout
        fingerprint = Fingerprint("m", "w", "float32", PAGE, layout.component_bytes, {}, {})
        disk = DiskTier(self.directory, fingerprint, 4 << 20, io=self.io)
        self.store = CachedAttentionStore(
            self.pool, self.host_pages * layout.stride, disk, look_ahead=self.look_ahead, clock=lambda: self.now
        )
        for _ in range(20):
            self.store.prefill_took(PAGE, 60.0)  # So that a fetch is always worth waiting for.

    def close(self) -> None:
        self.io.gate.set()
        self.store.close()

    def save(self, name: str) -> None:
        self.now += 1
        self.store.save(PageRun(None, 0, keys_of(name), torch.arange(LONG * PAGE)))
        self.store._saves.wait()
        while self.store.poll():
            self.store.pop_save()

    def on_disk_only(self, names: str) -> None:
        """Save the conversations `names`, and restart."""
        for name in names:
            self.save(name)
            assert not self.store.flush(20)
        self.store.close()
        self.open()

    def arrive(self, *names: str) -> None:
        for name in names:
            self.store.arrive(name, Chain(keys_of(name)))

    def in_host(self, name: str) -> int:
        return self.store.loadable_pages(Chain(keys_of(name)))

    def kept(self, name: str) -> int:
        return self.store.restorable_pages(Chain(keys_of(name)))

    def poll_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.001)
            self.store.poll()

    def poll_for_a_while(self) -> None:
        for _ in range(50):
            time.sleep(0.001)
            self.store.poll()

    def run(self, name: str) -> None:
        """The request `name` is admitted, and loads what is there."""
        pages = self.store.reserve(name, Chain(keys_of(name)))
        self.store.queue_load(name, keys_of(name)[:pages], torch.arange(pages * PAGE))
        self.store.cancel_load(name)
        self.store.end_pass()


@pytest.fixture
def talk(tmp_path: Path, gated_reads: Any) -> Iterator[Talk]:
    talk = Talk(tmp_path, gated_reads())
    yield talk
    talk.store.check_invariants()
    talk.close()


def test_the_front_of_the_queue_is_fetched_first_and_no_more_than_fits(talk: Talk) -> None:
    talk.on_disk_only("abcd")
    talk.arrive("a", "b", "c", "d")
    talk.store.reorder(["c", "a", "d", "b"])
    talk.poll_until(lambda: talk.in_host("c") == talk.in_host("a") == LONG)
    talk.poll_for_a_while()
    # 0.9 of ten pages may be held: all of c and a, one page of d.
    assert [talk.in_host(name) for name in "cadb"] == [LONG, LONG, 1, 0]
    assert talk.store.is_ready("c")
    assert not talk.store.is_ready("d")
    talk.run("c")
    talk.poll_until(lambda: talk.in_host("d") == LONG)


def test_a_request_that_comes_first_now_gets_the_room_of_the_last(talk: Talk) -> None:
    talk.on_disk_only("abc")
    talk.arrive("a", "b")
    talk.poll_until(lambda: talk.in_host("a") == talk.in_host("b") == LONG)
    talk.arrive("c")
    talk.store.reorder(["c", "a", "b"])
    talk.poll_until(lambda: talk.in_host("c") == LONG)
    assert talk.in_host("a") == LONG
    assert talk.in_host("b") <= HOST_PAGES - 2 * LONG
    talk.store.reorder(["c", "b"])
    talk.poll_until(lambda: talk.in_host("b") == LONG)


def test_a_read_that_is_noticed_late_took_no_longer(talk: Talk) -> None:
    talk.on_disk_only("a")
    talk.io.gate.clear()
    talk.arrive("a")
    talk.store.poll()
    (read,) = talk.store._migration.fetch._reads
    talk.io.gate.set()
    read.future.result(20)
    while read.ended is None:
        time.sleep(0.001)
    time.sleep(0.2)  # The engine computes something long.
    amount, pace = LONG * talk.store._migration.fetch.page_bytes, WaitOrRecompute().fetching
    pace.observe(amount, read.ended - read.started)
    talk.store.poll()
    assert talk.in_host("a") == LONG
    assert talk.store._decision.fetching.seconds(amount) == pace.seconds(amount)


def test_what_was_aborted_is_not_read_and_holds_nothing(talk: Talk) -> None:
    talk.on_disk_only("ab")
    talk.io.gate.clear()
    talk.arrive("a", "b")
    talk.store.poll()
    assert talk.store.pins
    talk.store.reorder([])
    talk.io.gate.set()
    talk.poll_until(lambda: not talk.store.pins)
    talk.poll_for_a_while()
    assert talk.in_host("a") + talk.in_host("b") <= LONG, "reads that had not begun were not given up"
    assert talk.store.is_ready("a")


def test_pages_that_the_queue_wants_outlast_colder_and_warmer_ones(talk: Talk) -> None:
    for name in "ab":
        talk.save(name)
        assert not talk.store.flush(20)
    talk.arrive("a")
    for name in "cdefg":
        talk.save(name)
        assert not talk.store.flush(20)
    assert talk.in_host("a") == LONG
    assert talk.in_host("b") == 0
    talk.store.reorder([])
    talk.save("h")
    assert talk.in_host("a") < LONG


def test_a_conversation_longer_than_host_memory_runs_with_what_fits(talk: Talk) -> None:
    talk.store.close()
    talk.host_pages = 6 * LONG
    talk.open()
    chain = keys_of("long", 5 * LONG)
    for first in range(0, len(chain), LONG):
        parent = chain[first - 1] if first else None
        talk.store.save(PageRun(parent, first, chain[first : first + LONG], torch.arange(LONG * PAGE)))
        assert not talk.store.flush(20)
    talk.store.close()
    talk.host_pages = HOST_PAGES
    talk.open()
    assert talk.store.arrive("long", Chain(chain)) == 5 * LONG
    talk.poll_until(lambda: talk.store.is_ready("long"))
    assert HOST_PAGES - 2 <= talk.store.loadable_pages(Chain(chain)) <= HOST_PAGES
    assert not talk.store.counters()["recomputed"], "it waited for what cannot come"


def test_without_look_ahead_only_the_next_request_is_fetched(tmp_path: Path, gated_reads: Any) -> None:
    talk = Talk(tmp_path, gated_reads(), look_ahead=1)
    talk.on_disk_only("ab")
    talk.arrive("a", "b")
    talk.poll_until(lambda: talk.in_host("a") == LONG)
    talk.poll_for_a_while()
    assert talk.in_host("b") == 0
    talk.run("a")
    talk.poll_until(lambda: talk.in_host("b") == LONG)
    talk.close()


def test_an_expected_turn_is_brought_up_and_kept_until_its_time_has_passed(talk: Talk) -> None:
    talk.on_disk_only("ab")
    assert talk.store.expect(Chain(keys_of("a")), 30.0) == LONG
    talk.poll_until(lambda: talk.in_host("a") == LONG)
    for name in "cdef":
        talk.save(name)
        assert not talk.store.flush(20)
    assert talk.in_host("a") == LONG
    talk.now += 30 + GRACE + 1
    talk.store.poll()
    assert not talk.store.pins
    for name in "ghi":
        talk.save(name)
    assert talk.in_host("a") < LONG


def test_a_hint_gives_way_to_requests(talk: Talk) -> None:
    talk.on_disk_only("abcd")
    for name in "ab":
        talk.store.expect(Chain(keys_of(name)), 5.0)
    talk.poll_until(lambda: talk.in_host("a") + talk.in_host("b") >= 5)
    talk.arrive("c", "d")
    talk.store.reorder(["c", "d"])
    talk.poll_until(lambda: talk.in_host("c") == talk.in_host("d") == LONG)


def test_hints_leave_room_for_conversations_that_go_on(talk: Talk) -> None:
    talk.on_disk_only("abc")
    for name in "abc":
        talk.store.expect(Chain(keys_of(name)), 3600.0)
    talk.poll_until(lambda: talk.in_host("a") + talk.in_host("b") >= 5)
    talk.poll_for_a_while()
    for name in "defgh":
        talk.save(name)
        assert talk.kept(name) == LONG
        assert not talk.store.flush(20)


def test_a_hint_ends_with_the_turn_that_it_announced(talk: Talk) -> None:
    talk.on_disk_only("a")
    talk.store.expect(Chain(keys_of("a")), 60.0)
    talk.poll_until(lambda: talk.in_host("a") == LONG)
    talk.arrive("a")
    talk.run("a")
    talk.poll_for_a_while()
    assert not talk.store.pins
    assert talk.store.counters()["waiting"] == 0


def test_a_kept_conversation_outlasts_others(talk: Talk) -> None:
    talk.save("a")
    assert talk.store.keep(Chain(keys_of("a"))) == LONG
    for name in "bcdefgh":
        talk.save(name)
        assert not talk.store.flush(20)
    assert talk.in_host("a") == LONG


def test_a_kept_conversation_is_still_kept_after_its_next_turn(talk: Talk) -> None:
    talk.save("a")
    talk.store.keep(Chain(keys_of("a")))
    talk.arrive("a")
    talk.run("a")
    for name in "bcdefgh":
        talk.save(name)
        assert not talk.store.flush(20)
    assert talk.in_host("a") == LONG


def test_a_hint_holds_for_pages_that_are_saved_after_it(talk: Talk) -> None:
    """It comes right after an answer."""
    assert talk.store.keep(Chain(keys_of("a"))) == 0
    for name in "abcdefgh":
        talk.save(name)
        assert not talk.store.flush(20)
    assert talk.in_host("a") == LONG


def test_a_hint_that_has_ended_is_not_looked_up_again(talk: Talk) -> None:
    talk.store.expect(Chain(keys_of("a")), 5.0)
    talk.now += 5 + GRACE + 1
    talk.store.poll()
    talk.save("a")
    assert talk.store.counters()["waiting"] == 0


def test_a_dropped_conversation_is_gone_but_for_what_others_share(talk: Talk) -> None:
    talk.save("a")
    other = [*keys_of("a")[:2], *keys_of("other", 2)]
    talk.store.save(PageRun(None, 0, other, torch.arange(LONG * PAGE)))
    talk.store._saves.wait()
    talk.poll_until(lambda: not talk.store.saving)
    assert not talk.store.flush(20)
    assert talk.store.drop(Chain(keys_of("a"))) == 2
    assert talk.kept("a") == 2
    assert talk.store.restorable_pages(Chain(other)) == LONG
    assert talk.store.drop(Chain(other)) == LONG
    assert talk.kept("a") == 0
    assert talk.store.counters()["disk_pages_used"] == 0


def test_a_conversation_without_its_last_page_is_dropped(talk: Talk) -> None:
    talk.save("a")
    assert not talk.store.flush(20)
    assert talk.store.drop(Chain(keys_of("a", LONG + 2))) == LONG
    assert talk.kept("a") == 0


def test_what_is_still_being_saved_is_dropped_when_it_has_been(talk: Talk) -> None:
    talk.store.save(PageRun(None, 0, keys_of("a"), torch.arange(LONG * PAGE)))
    assert talk.store.drop(Chain(keys_of("a"))) == 0
    talk.store._saves.wait()
    talk.store.poll()
    assert talk.kept("a") == LONG
    for _ in range(50):  # It may meet the write to disk once or twice.
        talk.now += PAUSE
        talk.poll_for_a_while()
        if talk.kept("a") == 0:
            return
    pytest.fail("it is still there")


def test_a_drop_is_not_tried_for_ever(talk: Talk) -> None:
    """The conversation may come back."""
    talk.store.save(PageRun(None, 0, keys_of("a"), torch.arange(LONG * PAGE)))
    talk.store.drop(Chain(keys_of("a")))
    talk.store._saves.wait()
    talk.now += DROPPING
    talk.poll_for_a_while()
    assert talk.kept("a") == LONG


def test_hints_for_unknown_conversations_are_taken_and_do_nothing(talk: Talk) -> None:
    unknown = Chain(keys_of("unknown"))
    assert talk.store.expect(unknown, 1.0) == talk.store.keep(unknown) == talk.store.drop(unknown) == 0
    assert talk.store.expect(Chain(), 1.0) == talk.store.drop(Chain()) == 0
    assert talk.store.chain_to(b"nobody").keys == []


def test_a_conversation_is_found_by_its_last_page(talk: Talk) -> None:
    talk.save("a")
    assert talk.store.chain_to(keys_of("a")[-1]).keys == keys_of("a")
    assert talk.store.chain_to(b"evicted", *keys_of("a")[::-1]).keys == keys_of("a")


def test_a_fetch_that_starts_late_brings_what_has_left_meanwhile(talk: Talk) -> None:
    """Else a page would be there without those before it, and who knew of these would take all for loadable."""
    for name in "ab":
        talk.save(name)
        assert not talk.store.flush(20)
    other = Chain(keys_of("a"))
    assert talk.store.loadable_pages(other) == LONG
    # The last page of it leaves, and the next request finds the others there.
    talk.store.save(PageRun(None, 0, keys_of("c", 3), torch.arange(3 * PAGE)))
    assert not talk.store.flush(20)
    assert talk.in_host("a") == LONG - 1
    talk.arrive("a")
    # Before anything is asked for, these leave as well.
    talk.store.save(PageRun(None, 0, keys_of("d", HOST_PAGES), torch.zeros(HOST_PAGES * PAGE, dtype=torch.long)))
    assert talk.in_host("a") == 0
    talk.store._saves.wait()
    talk.poll_until(lambda: talk.store.is_ready("a"))
    assert talk.store.loadable_pages(other) == talk.in_host("a") == LONG
    assert talk.store.reserve("other", other) == LONG
    assert talk.store.queue_load("other", other.keys, torch.arange(LONG * PAGE))
    talk.store.cancel_load("other")
    talk.store.leave("a")
    talk.store.end_pass()


def test_what_is_reserved_is_there_even_if_pages_came_back_out_of_order(talk: Talk) -> None:
    """Its beginning is on disk only when the rest is computed again."""
    waiting = Chain(keys_of("a"))
    talk.save("a")
    assert not talk.store.flush(20)
    assert talk.store.loadable_pages(waiting) == LONG
    for name in "bcd":
        talk.save(name)
        assert not talk.store.flush(20)
    assert talk.in_host("a") == 0
    first = talk.store._index.find(keys_of("a")[0])
    slots = [slot for key in keys_of("a")[1:] for slot in talk.store._pages.forget(talk.store._index.find(key))]
    talk.store.disk.remove(slots)
    talk.save("a")
    assert first not in talk.store._in_host
    assert talk.store.reserve("waiting", waiting) == 0
    talk.store.end_pass()


@pytest.mark.parametrize("call", ["reset", "detach_disk", "close"])
def test_a_read_that_never_ends_holds_nothing_up(talk: Talk, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it write into pages that are saved later, when it ends after all."""
    monkeypatch.setattr(store, "PATIENCE", 0.2)
    talk.on_disk_only("a")
    talk.io.gate.clear()
    talk.arrive("a")
    talk.poll_for_a_while()
    talk.store.reorder([])
    busy = [talk.store._in_host.slot[talk.store._index.find(key)] for key in keys_of("a")]
    getattr(talk.store, call)()
    assert talk.store.disk is None
    if call == "close":
        return
    for name in "bcd":
        talk.save(name)
    assert talk.in_host("d") == LONG
    assert not {talk.store._in_host.slot[row] for row in talk.store._index.rows()}.intersection(busy)
    assert talk.store.host.retired == set(busy)
    talk.io.gate.set()
    talk.poll_for_a_while()
    assert talk.in_host("d") == LONG
