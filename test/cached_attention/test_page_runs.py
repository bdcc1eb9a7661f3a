"""Many pages at once must do what `Hierarchy` does with one after the other."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from cached_attention import admission, page_runs
from cached_attention.hierarchy import Hierarchy
from cached_attention.index import PageKey
from cached_attention.tiers.host_slots import HostSlots

HOST_PAGES = 6
CHAINS = ["aaaaaa", "aaabbb", "cccc", "ccdddddd"]


def keys_of(chain: str) -> list[PageKey]:
    return [chain[: end + 1].encode() for end in range(len(chain))]


class OneByOne:
    """Fetches without bytes: what was admitted is landed or given up later."""

    def __init__(self) -> None:
        self.pages = Hierarchy(HostSlots(HOST_PAGES), has_disk=True)
        index = self.pages.index
        for number, chain in enumerate(CHAINS):
            keys = keys_of(chain)
            for place, key in enumerate(keys):
                row = index.add(key, keys[place - 1] if place else None, place)
                if row not in self.pages.on_disk:
                    index.place(row, self.pages.on_disk, row)
                index.last_use[row] = float(number)
        for row in index.rows():
            self.pages.offer(row)

    def admit(self, keys: list[PageKey], first: int, end: int) -> list[int]:
        rows: list[int] = []
        for page in range(first, end):
            row = admission.admit(self.pages, keys[page], keys[page - 1] if page else None, page)
            if row is None:
                break
            rows.append(row)
        return rows

    def land(self, rows: list[int]) -> None:
        for row in rows:
            self.pages.land(row, clean=True)
            self.pages.unpin(row)

    def give_up(self, rows: list[int]) -> None:
        for row in reversed(rows):
            self.pages.give_up(row)
        for row in rows:
            self.pages.unpin(row)

    def missing(self, keys: list[PageKey], most: int) -> tuple[int, int]:
        """First page that is not in host memory, and end of up to `most` such pages."""
        index, in_host = self.pages.index, self.pages.in_host
        lacks = [index.find(key) not in in_host for key in keys]
        first = lacks.index(True) if True in lacks else len(keys)
        end = first
        while end < min(first + most, len(keys)) and lacks[end]:
            end += 1
        return first, end

    def state(self) -> object:
        index, pages = self.pages.index, self.pages
        pages.check_invariants()
        return [
            (key, row in pages.in_host, pages.in_host.ready[row], index.pins[row], index.kind[row])
            for key, row in ((key, index.find(key)) for chain in CHAINS for key in keys_of(chain))
        ]

    def victims(self) -> Iterable[PageKey]:
        """What may leave, in its order."""
        while (row := self.pages.host_order.take()) is not None:
            yield self.pages.index.key(row)
            self.pages.leave_host(row)


class AtOnce(OneByOne):
    def admit(self, keys: list[PageKey], first: int, end: int) -> list[int]:
        found = page_runs.find_on_disk(self.pages, keys, first, end)
        assert len(found) == end - first
        return admission.admit_run(self.pages, found, -1)

    def land(self, rows: list[int]) -> None:
        page_runs.land(self.pages, rows)
        page_runs.unpin(self.pages, rows)

    def give_up(self, rows: list[int]) -> None:
        page_runs.give_up(self.pages, rows)
        page_runs.unpin(self.pages, rows)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(CHAINS), st.integers(1, HOST_PAGES), st.booleans(), st.booleans()), max_size=12
    )
)
def test_runs_do_what_single_pages_do(steps: list[tuple[str, int, bool, bool]]) -> None:
    both = OneByOne(), AtOnce()
    flying: list[tuple[tuple[list[int], list[int]], bool]] = []
    for chain, count, lands, now in steps:
        keys = keys_of(chain)
        first, end = both[0].missing(keys, count)
        if first < end:
            one, many = (each.admit(keys, first, end) for each in both)
            if one or many:
                flying.append(((one, many), lands))
        if now:
            _end(both, flying)
        assert both[0].state() == both[1].state()
    _end(both, flying)
    assert both[0].state() == both[1].state()
    assert not any(both[1].pages.index.pins)
    assert list(both[0].victims()) == list(both[1].victims())
    assert both[0].pages.host.free_slots == both[1].pages.host.free_slots == HOST_PAGES


def _end(both: tuple[OneByOne, AtOnce], flying: list[tuple[tuple[list[int], list[int]], bool]]) -> None:
    while flying:
        rows, lands = flying.pop()
        for each, some in zip(both, rows, strict=True):
            if some:
                (each.land if lands else each.give_up)(some)


def test_what_was_known_of_chains_outlasts_a_fetch_that_is_given_up() -> None:
    at_once = AtOnce()
    keys = keys_of(CHAINS[0])
    at_once.land(at_once.admit(keys, 0, 2))
    at_once.give_up(at_once.admit(keys, 2, 5))
    assert at_once.pages.epoch == 0
    assert at_once.pages.loadable(keys, 2) == 2
    assert at_once.pages.restorable(keys, len(keys)) == len(keys)


def test_a_gap_is_told_where_what_follows_is_in_host_memory() -> None:
    at_once = AtOnce()
    keys = keys_of(CHAINS[0])
    first, second = at_once.admit(keys, 0, 2), at_once.admit(keys, 2, 4)
    at_once.land(second)
    at_once.give_up(first)
    assert at_once.pages.epoch > 0
    assert at_once.pages.loadable(keys, 0) == 0


def test_what_was_known_of_a_chain_is_looked_up_again_when_its_pages_on_disk_are_cut_off() -> None:
    """Its last page is on disk, those before it were too cold for a full one: they leave host memory at once."""
    pages, keys = Hierarchy(HostSlots(HOST_PAGES), has_disk=True), keys_of("cccc")
    for place, key in enumerate(keys):
        row = admission.admit(pages, key, keys[place - 1] if place else None, place)
        assert row is not None
        pages.land(row, clean=False)
        pages.mark_clean(row)
        pages.unpin(row)
    pages.settle_on_disk(pages.index.find(keys[-1]), 0)
    known, epoch = pages.restorable(keys, 0), pages.epoch
    admission.make_room(pages, HOST_PAGES, None)
    assert known == len(keys)
    assert pages.restorable(keys, 0) == 0
    assert pages.epoch > epoch
    pages.check_invariants()
