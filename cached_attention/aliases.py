"""Pages that a truncated prompt shares with earlier prompts, at other positions."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from cached_attention.chain import reach
from cached_attention.hierarchy import Hierarchy
from cached_attention.index import NOWHERE, PageKey

Source = Sequence[PageKey | None]
"""Per page of a chain: the key of the same tokens computed at another position, or None."""
POOLS_REMEMBERED = 4
"""Number of rotated pages to remember, as a multiple of the device pool's pages."""


class Aliases:
    """Aliases pages of a chain to pages stored under other keys; moves no bytes.

    Also remembers which pages on the device are rotated copies. These must not be saved: a page that is rotated,
    saved and rotated again drifts, while an original that is rotated by the sum of all deltas does not.

    Args:
        page_size: tokens per page.
        device_pages: number of pages of the device pool.
    """

    def __init__(self, pages: Hierarchy, page_size: int, device_pages: int) -> None:
        self._pages = pages
        self._page_size = page_size
        self._remembered = POOLS_REMEMBERED * device_pages
        self._rotated: OrderedDict[PageKey, None] = OrderedDict()
        self._loaded: dict[str, Sequence[PageKey]] = {}
        """Rotated pages per running request; the engine's cache may not contain them yet."""
        self._loading: Counter[PageKey] = Counter()
        """Number of these requests per page."""

    def extend(self, keys: Sequence[PageKey], sources: Iterable[Source]) -> None:
        """Alias the pages of the chain `keys` that are in no tier, up to the first one without a source.

        `sources`: in order of preference; each is generated only if those before it lack a page.
        """
        lazily = _Remembered(sources)
        for page in range(reach(keys, 0, self._pages.is_kept), len(keys)):
            if self._pages.is_kept(keys[page]):
                continue
            parent = keys[page - 1] if page else None
            if not any(self._name(keys[page], parent, source, page) for source in lazily):
                return
            self._pages.stats.aliased += 1

    def _name(self, key: PageKey, parent: PageKey | None, source: Source, page: int) -> bool:
        original = source[page] if page < len(source) else None
        return original is not None and self.alias(key, parent, page * self._page_size, original)

    def alias(self, key: PageKey, parent: PageKey | None, place: int, source: PageKey) -> bool:
        """Make `key`, which is in no tier, an alias of the page `source`; False if that is in no tier either.

        Its predecessor `parent` is in a tier; its first token is at `place` in its prompt. If a tier still holds
        the bytes of `key` for another row, `key` gets those instead.
        """
        index = self._pages.index
        row = index.find(key)
        if row != NOWHERE and self._join(row):
            return True
        named = index.find(source)
        if named == NOWHERE or not self._pages.is_kept(source):
            return False
        return self._join(index.alias(key, parent, place, index.aliases.origin(named)))

    def _join(self, row: int) -> bool:
        """`Hierarchy.join`, with the latest last use of all sharers: with an older one the row would expire."""
        index = self._pages.index
        index.last_use[row] = max(index.last_use[sharer] for sharer in index.aliases.sharers(row))
        return self._pages.join(row)

    def loaded_rotated(self, request: str, keys: Sequence[PageKey]) -> None:
        """The device holds these pages as rotated copies, at least while `request` runs."""
        self.ended(request)
        if keys:
            self._loaded[request] = keys
            self._loading.update(keys)
        for key in keys:
            self._rotated[key] = None
            self._rotated.move_to_end(key)
        while len(self._rotated) > self._remembered:
            self._rotated.popitem(last=False)

    def ended(self, request: str) -> None:
        """`request` has ended."""
        for key in self._loaded.pop(request, ()):
            self._loading[key] -= 1
            if not self._loading[key]:
                del self._loading[key]

    def left_device(self, keys: Iterable[PageKey]) -> None:
        """The engine's cache does not contain these pages; if they are recomputed, they are originals."""
        for key in keys if self._rotated else ():
            if key not in self._loading:
                self._rotated.pop(key, None)

    def is_rotated(self, key: PageKey) -> bool:
        """Whether the device holds the page `key` as a rotated copy."""
        return key in self._rotated


class _Remembered:
    """Iterates over `sources` any number of times, but generates each only once."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._known: list[Source] = []
        self._rest = iter(sources)

    def __iter__(self) -> Iterator[Source]:
        yield from self._known
        for source in self._rest:
            self._known.append(source)
            yield source
