"""Disk and remote tier below one of a rank's stores: opened for the weights, and paused when these change."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

from cached_attention.config import CachedAttentionConfig
from cached_attention.encryption import EncryptionKey, read_key
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.disk_directory import BADLY_CHOSEN, DirectoryInUseError
from cached_attention.tiers.remote import RemoteTier
from cached_attention.tiers.remote_address import LEAST_SEGMENT, parse_remote
from cached_attention.units import format_size

from .flags import REMOTE
from .identity import ModelIdentity

logger = logging.getLogger(__name__)


class LowerTiers:
    """Opens the tiers that are configured, and keeps pages of different weights apart.

    Args:
        config: may be replaced; what it says of the disk takes effect with the next `reset`.
        identity: of the pages.
        directory: name of their directory on disk, below that of the server.
        share: their part of some bytes of this machine.
        lends: whether this machine's memory is lent to the remote store here.
    """

    def __init__(
        self,
        config: CachedAttentionConfig,
        identity: ModelIdentity,
        directory: str,
        share: Callable[[int], int],
        *,
        lends: bool = True,
    ) -> None:
        self.config = config
        self.identity = identity
        self._directory = directory
        self._share = share
        self._lends = lends

    @property
    def key(self) -> EncryptionKey | None:
        return read_key(self.config.encryption_key) if self.config.encryption_key else None

    def open_disk(self) -> DiskTier | None:
        """None if no disk is configured, or while its file system fails or is full.

        Raises:
            DirectoryInUseError: another server uses the directory.
            PermissionError, NotADirectoryError, FileExistsError: it was badly chosen.
            ValueError: it is too small for a page.
        """
        if self.config.disk_path is None:
            return None
        whole = Path(self.config.disk_path)
        try:
            return DiskTier(
                whole / self._directory,
                self.identity.fingerprint(),
                self._share(self.config.disk_size),
                ttl=self.config.ttl or None,
                encryption=self.key,
                whole=whole,
            )
        except BADLY_CHOSEN:
            raise
        except (OSError, sqlite3.Error) as error:
            # A disk that fails must not keep a server from being started again.
            _do_without_disk(error)
            return None

    def connect(self) -> RemoteTier | None:
        """Connects in the background: the server runs whether or not the store can be reached."""
        if self.config.remote is None:
            return None
        address = parse_remote(REMOTE.option, self.config.remote)
        segment = max(self._share(address.segment), LEAST_SEGMENT) if address.segment and self._lends else 0
        if self._lends:
            lent = format_size(segment)
            logger.info("CachedAttention: remote tier at %s, which this rank lends %s.", address.master, lent)
        return RemoteTier(address, segment, self.identity.shared_fingerprint(), encryption=self.key)

    def reset(self, store: CachedAttentionStore, *, replaces_disk: bool, may_share: bool) -> None:
        """Remove all pages of `store`.

        Args:
            replaces_disk: leave the pages on disk, and open the disk for the present weights.
            may_share: whether the weights to which pages belong from now on are known.
        """
        if replaces_disk:
            store.replace_disk(self._open_disk_again)
        else:
            store.reset()
        if store.remote is not None and may_share:
            store.remote.serve(self.identity.shared_fingerprint())

    def has_other_pages(self, store: CachedAttentionStore) -> bool:
        """Whether a disk is configured, and `store` has none open or one with pages of other weights."""
        return self.config.disk_path is not None and (store.disk is None or self.identity.has_changed())

    def _open_disk_again(self) -> DiskTier | None:
        """If that fails, a running server continues without a disk tier rather than stopping."""
        try:
            return self.open_disk()
        except (DirectoryInUseError, OSError, ValueError, sqlite3.Error) as error:
            _do_without_disk(error)
            return None

    def pause(self, store: CachedAttentionStore) -> None:
        """Stop using disk and remote store until the next `reset`: the KV may be of old or new weights."""
        if store.remote is not None:
            store.remote.pause()
        if store.disk is not None:
            logger.info("CachedAttention: weights were updated; the disk tier waits for the cache to be flushed.")
            store.detach_disk()


def _do_without_disk(error: Exception) -> None:
    logger.error("CachedAttention: no disk tier until the next flush of the cache: %s", error)
