"""What a server believes to be in the remote store, and what it tells of that."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from cached_attention.hierarchy import Hierarchy
from cached_attention.remote_pages import RemotePages
from cached_attention.residency import ResidencyFeed, ResidentPage
from cached_attention.tiers.host_slots import HostSlots

MOST, KEYS = 5, 9


class Picture:
    """What an observer makes of what it is told."""

    def __init__(self) -> None:
        self.pages: dict[bytes, ResidentPage] = {}

    def entered(self, page: ResidentPage) -> None:
        assert page.tier == "remote"
        assert page.key not in self.pages, "told twice"
        self.pages[page.key] = page

    def left(self, tier: str, key: bytes) -> None:
        assert tier == "remote"
        del self.pages[key]

    def cleared(self) -> None:
        self.pages.clear()


def watched(most: int = MOST) -> tuple[RemotePages, ResidencyFeed, Picture]:
    feed, picture = ResidencyFeed(), Picture()
    feed.observer = picture
    pages = Hierarchy(HostSlots(4), has_disk=False, feed=feed)
    pages.remote = RemotePages(most, feed)
    return pages.remote, feed, picture


def key(number: int) -> bytes:
    return b"%d" % number


NUMBER = st.integers(0, KEYS - 1)
OPERATIONS: dict[str, st.SearchStrategy[int]] = {
    "add": NUMBER,
    "discard": NUMBER,
    "offer": NUMBER,
    "clear": st.just(0),
    "tell": st.integers(0, 3),
}
STEPS = st.lists(
    st.sampled_from(sorted(OPERATIONS)).flatmap(lambda name: st.tuples(st.just(name), OPERATIONS[name]))
)


@given(STEPS)
def test_what_was_told_is_what_is_known_once_all_was_told(steps: list[tuple[str, int]]) -> None:
    remote, feed, picture = watched()
    known: list[bytes] = []
    """Latest last."""
    for name, number in steps:
        if name == "add":
            chain = [key(number), key((number + 1) % KEYS)]
            remote.add(chain, None)
            known = [*(other for other in known if other not in chain), *chain][-MOST:]
        elif name == "discard":
            remote.discard(key(number))
            known = [other for other in known if other != key(number)]
        elif name == "clear":
            remote.clear()
            known = []
        else:
            getattr(remote, name)(number if name == "tell" else key(number))
        assert len(remote) == len(known)
        assert {key(one) for one in range(KEYS) if key(one) in remote} == set(known)
        assert set(known) <= set(picture.pages)
        for one in map(key, range(KEYS)):
            assert feed.is_known(one) == (one in picture.pages)
            assert feed.tiers_of(one) == [page for page in picture.pages.values() if page.key == one]
        walked = [page for start in range(0, feed.end, 2) for page in feed.walk(start, 2)]
        assert sorted(page.key for page in walked) == sorted(known)
    remote.tell(KEYS)
    assert set(picture.pages) == set(known)


def test_pages_are_told_with_the_one_before_them() -> None:
    remote, _, picture = watched()
    remote.add([key(1), key(2)], key(0))
    assert [page.parent for page in picture.pages.values()] == [key(0), key(1)]


def test_an_outage_is_told_in_parts() -> None:
    remote, _, picture = watched(most=100)
    remote.add(list(map(key, range(100))), None)
    remote.clear()
    assert (len(remote), len(picture.pages)) == (0, 100)
    remote.tell(30)
    assert len(picture.pages) == 70
    remote.add([key(50)], key(49))
    remote.clear()
    remote.add([key(60), key(5)], None)
    remote.tell(100)
    assert picture.pages.keys() == {key(60), key(5)}


def test_of_too_many_pages_the_newest_wait_for_their_turn() -> None:
    """The oldest are the first to leave host memory as well."""
    remote, _, _ = watched(most=3)
    for number in range(5):
        remote.offer(key(number))
    assert [remote.next_unshared() for _ in range(4)] == [key(2), key(3), key(4), None]


def test_nothing_is_known_where_there_is_no_store() -> None:
    remote, _, picture = watched(most=0)
    calls: list[Callable[[], object]] = [
        lambda: remote.add([key(0)], None),
        lambda: remote.offer(key(0)),
        remote.clear,
        lambda: remote.discard(key(0)),
        lambda: remote.tell(10),
    ]
    for call in calls:
        call()
    assert not picture.pages
    assert (len(remote), remote.unshared) == (0, 0)
