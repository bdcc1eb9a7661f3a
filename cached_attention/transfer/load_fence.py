"""Whether a load must wait for the forward that was launched last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cached_attention.transfer.streams import Event


class LoadFence:
    """Watches releases of device slots, so that a load may start while the forward before its own is running.

    A load writes slots that were free when they were allocated to it. Let N be the forward launched last. It
    touches the slots that its requests held at the launch, and no others (except slot 0, which is never
    allocated). A slot that is allocated to a load later was, at the launch of N, either

    - free: only forwards before N may touch it, for requests that had released it;
    - or in the tree, locked by no request, and evicted since: likewise;
    - or held by a request that has released it since: N may touch it.

    Only the device could tell these cases apart, because slot numbers are computed there. And the slots freed
    last are allocated first, so that in a full pool a load gets what was evicted for it. But the host knows
    whether any request has released slots. Until one does, there are no slots of the third kind, and a load waits
    only for the forwards before N (`earlier`). Each of three signs closes the fence: a lock of the tree that is
    older than the launch is released; a request inserts slots into the tree, after which it might no longer hold
    them; slots become free other than by an eviction, which takes only what nobody holds.

    A decode step in which no request ends, as in most, leaves it open. It is closed when the result of a prefill
    is read, and when a request ends, is retracted or is aborted. It says nothing of when the slots of a load are
    computed: SGLang does that after a prefill, or after a decode step without a CUDA graph, has ended.

    Args:
        free_list: the state of the allocator's list of free slots. Two of its results are equal only if no slot
            became free between them; slots allocated in between do not matter.
    """

    def __init__(self, free_list: Callable[[], Any]) -> None:
        self._free_list = free_list
        self._young: set[int] = set()
        """Locks taken since the last launch."""
        self._closed = True
        self._seen: Any = None
        self.earlier: Sequence[Event] = ()
        """Events after which all forwards but the last are done."""
        self._launched: Sequence[Event] = ()

    def launched(self, done: Sequence[Event]) -> None:
        """A forward was launched; it and all before it are done after the events `done`."""
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
        """Slots may be released: until the next launch, loads wait for the last forward."""
        self._closed = True

    @contextmanager
    def evicting(self) -> Iterator[None]:
        """Context in which slots become free that were in the tree and that nobody held."""
        unchanged = self._seen == self._free_list()
        yield
        if unchanged:
            self._seen = self._free_list()

    @property
    def is_closed(self) -> bool:
        """Whether the last forward may touch slots that are allocated to a load now."""
        return self._closed or self._seen != self._free_list()
