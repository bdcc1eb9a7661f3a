"""A store of pages of which a prefix needs only the last ones."""

from __future__ import annotations

from collections.abc import Container, Sequence

from cached_attention.chain import Chain
from cached_attention.index import NOWHERE, PageKey
from cached_attention.migration.lookups import ScatteredLookups
from cached_attention.store import CachedAttentionStore


class TrailingStore(CachedAttentionStore):
    """Pages of which only the last ones of a prefix are needed: states, or sliding windows.

    They are kept in chains of up to `chain_pages`, so that the end of a conversation can be kept without its
    beginning.
    """

    _lookup_type = ScatteredLookups
    _sought: list[str]
    """Requests for which `seek` has found pages."""

    def _migrate(self) -> None:
        super()._migrate()
        self._sought = []

    @property
    def _lookups(self) -> ScatteredLookups | None:
        lookups = self._migration.lookups
        return lookups if isinstance(lookups, ScatteredLookups) else None

    def _found(self, request: str, keys: Sequence[PageKey]) -> None:
        self._sought.append(request)

    @property
    def known_pages(self) -> Container[PageKey]:
        """Pages that may be in a tier of this server; no others are."""
        return self._index.known

    @property
    def remote_pages(self) -> Container[PageKey]:
        """Pages in the remote store, as far as is known."""
        return self._pages.remote.known

    def seek(self, request: str, keys: Sequence[PageKey], useful: int, page_tokens: int) -> None:
        """Look up which pages of the prompt `keys` the remote store has, see `ScatteredLookups`, and `found`."""
        if self._lookups is not None:
            self._lookups.seek(request, keys, useful, page_tokens)

    def has_sought(self, request: str, may_give_up: bool = True) -> bool:
        """Whether `seek` has an answer, or waiting for it is not expected to pay off."""
        return self._lookups is None or self._lookups.is_ready(request, may_give_up)

    def found(self) -> list[str]:
        """Requests for which `seek` has found pages since the last call."""
        found, self._sought = self._sought, []
        return found

    def stop_seeking(self, request: str) -> None:
        if self._lookups is not None:
            self._lookups.leave(request)

    def forget(self, keys: Sequence[PageKey]) -> None:
        """Drop the pages `keys` from every tier; those that a queued request needs stay on this server."""
        known = self._index.known
        for part in self.chains([key for key in keys if key in known]):
            self.drop(part)
        self._migration.forget([key for key in keys if not self._pages.is_kept(key)])

    def mark_used(self, key: PageKey) -> None:
        """The page, if it is in a tier, is in use: refresh its last use."""
        if (row := self._index.find(key)) != NOWHERE:
            self._uses.mark(row)

    def is_restorable(self, key: PageKey) -> bool:
        """Whether the page is in some tier."""
        return self.holds(key) or key in self._pages.remote

    def is_loadable(self, key: PageKey) -> bool:
        """Whether the page is in host memory."""
        row = self._index.find(key)
        return row != NOWHERE and bool(self._in_host.ready[row])

    def chains(self, keys: Sequence[PageKey]) -> list[Chain]:
        """Split consecutive pages of a prompt into chains, each of which is kept through its last page."""
        chains: list[Chain] = []
        before, was_remote = NOWHERE, False
        for key in keys:
            row, is_kept = self._index.find(key), self._pages.is_kept(key)
            # Pages from the remote store are in no chain here yet: those in a row become one.
            is_remote = not is_kept and key in self._pages.remote
            follows = was_remote if is_remote else before != NOWHERE and self._is_after(row, before)
            if not follows or (is_remote and len(chains[-1].keys) == self._chain_pages):
                chains.append(Chain())
            chains[-1].keys.append(key)
            before, was_remote = row if is_kept else NOWHERE, is_remote
        return chains

    def _is_after(self, row: int, before: int) -> bool:
        return row != NOWHERE and self._index.parent[row] == before
