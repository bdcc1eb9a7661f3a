"""Whether a load must wait for the forward that was launched last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cached_attention.transfer.streams import Event


class LoadFence:
    """Watches what lets go of device slots, so that a load may start while the forward before its own runs.

    A load writes slots that were free when they were given to it. Let forward N be the last that was launched. It
    touches the slots that its requests held then, and no others (but slot 0, which is never given to anybody).
    A slot that is given to a load later was, at the launch of N,

    - free: only forwards before N may touch it, of requests that had let go of it;
    - or in the tree and locked by no request, and was evicted since: the same;
    - or held by a request, which has let go of it since: N may touch it.

    Which of these a slot was only the device could tell: slot numbers are computed there. And the slots that
    are given away are those that were freed last, so that in a full pool a load gets what was evicted for it.
    The host knows whether anybody let go of anything. Until a request does, there are no slots of the third
    kind, and a load waits for the forwards before N alone (`earlier`). Three signs close the fence, each by
    itself: a lock of the tree that is older than the launch is given back; a request puts slots into the tree,
    where it might hold them no more; slots become free other than by an eviction, which takes what nobody
    holds.

    A decode step in which no request ends, and that is most of them, leaves it open. It is closed by a prompt
    whose result is read, by an end, a retraction or an abort.

    Args:
        free_list: what the allocator's list of free slots is. Two of its results are equal only if no slot
            became free between them; that some were taken does not matter.
    """

    def __init__(self, free_list: Callable[[], Any]) -> None:
        self._free_list = free_list
        self._young: set[int] = set()
        """Locks that were taken since the last launch."""
        self._closed = True
        self._seen: Any = None
        self.earlier: Sequence[Event] = ()
        """All forwards but the last are done."""
        self._launched: Sequence[Event] = ()

    def launched(self, done: Sequence[Event]) -> None:
        """A forward was launched; it and all before it are done with the events `done`."""
        self.earlier, self._launched = self._launched, done
        self._closed = not self.earlier and bool(done)
        self._young.clear()
        self._seen = self._free_list()

    def locked(self, lock: object) -> None:
        self._young.add(id(lock))

    def unlocked(self, lock: object) -> None:
        if id(lock) not in self._young:
            self.close()

    def close(self) -> None:
        """Slots may be let go of. Until the next launch, loads wait for the last forward."""
        self._closed = True

    @contextmanager
    def evicting(self) -> Iterator[None]:
        """What becomes free inside lay in the tree, and nobody held it."""
        unchanged = self._seen == self._free_list()
        yield
        if unchanged:
            self._seen = self._free_list()

    @property
    def is_closed(self) -> bool:
        """Whether slots that are given to a load now may be touched by the last forward."""
        return self._closed or self._seen != self._free_list()
