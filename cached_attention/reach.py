"""How far the tiers reach along a chain."""

from __future__ import annotations

from cached_attention.chain import Chain
from cached_attention.hierarchy import Hierarchy


class Reach:
    """Numbers of leading pages of a chain, remembered in the chain: constant time if nothing changed."""

    def __init__(self, pages: Hierarchy) -> None:
        self._pages = pages

    def restorable(self, chain: Chain) -> int:
        """Number of leading pages in some tier."""
        reached, pages = chain.reached, self._pages
        if reached.epoch != pages.epoch:
            self._forget(chain)
        known = max(reached.restorable, reached.loadable)
        reached.restorable = found = pages.restorable(chain.keys, known)
        return found

    def loadable(self, chain: Chain) -> int:
        """Number of leading pages in host memory; too high if a page before a known one left, see `Hierarchy`."""
        reached, pages = chain.reached, self._pages
        if reached.epoch != pages.epoch:
            self._forget(chain)
        reached.loadable = found = pages.loadable(chain.keys, reached.loadable)
        return found

    def loadable_exactly(self, chain: Chain) -> int:
        """Number of leading pages in host memory, never too high; linear if pages came back out of order."""
        if chain.reached.disorder != self._pages.disorder:
            chain.reached.disorder, chain.reached.loadable = self._pages.disorder, 0
        return self.loadable(chain)

    def _forget(self, chain: Chain) -> None:
        """Pages were lost out of order since the last lookup."""
        reached = chain.reached
        reached.epoch, reached.disorder = self._pages.epoch, self._pages.disorder
        reached.restorable = reached.loadable = 0
