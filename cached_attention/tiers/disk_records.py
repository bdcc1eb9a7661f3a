"""Layout of a page in its slot: as in memory, or encrypted."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from cached_attention.checksum import page_checksum
from cached_attention.tiers.cipher import EPOCH_BYTES, NONCE_BYTES, TAG_BYTES, StoreCipher
from cached_attention.tiers.disk_space import slot_stride
from cached_attention.tiers.page_io import PageRead, PageWrite

HUGE_PAGE = 2 << 20
"""Bytes."""
TRAILER_BYTES = TAG_BYTES + NONCE_BYTES + EPOCH_BYTES


class Records(Protocol):
    """Converts between a page's buffer, of `slot_stride(page_bytes)` bytes, and its slot. Any thread."""

    stride: int
    """Bytes per slot."""
    record_bytes: int
    """Bytes of a slot without padding."""

    def outgoing(self, pages: Sequence[PageWrite]) -> list[memoryview]:
        """Buffers to write to the slots of `pages`; valid until the thread's next call."""

    def incoming(self, pages: Sequence[PageRead]) -> list[memoryview]:
        """Buffers to read the slots of `pages` into; valid until the thread's next call."""

    def accept(self, page: PageRead, found: memoryview) -> bool:
        """Fill the page's buffer from `found`, the content of its slot; False if that is not the page."""


class PlainRecords:
    """The page's bytes and padding, read into and written from the page's own buffer."""

    def __init__(self, page_bytes: int) -> None:
        self.record_bytes = page_bytes
        self.stride = slot_stride(page_bytes)

    def outgoing(self, pages: Sequence[PageWrite]) -> list[memoryview]:
        return [page.buffer for page in pages]

    def incoming(self, pages: Sequence[PageRead]) -> list[memoryview]:
        return [page.buffer for page in pages]

    def accept(self, page: PageRead, found: memoryview) -> bool:
        return page_checksum(page.key, found[: self.record_bytes]) == page.checksum


class SealedRecords:
    """The page's bytes encrypted, then tag, nonce and epoch, then padding.

    Encrypted from the page's buffer into memory of the thread, aligned for O_DIRECT, and decrypted the other way,
    without further copies. The key of the page is associated data, so a record in another page's slot is invalid.
    The checksum is compared as well, because it also covers the page's time in host memory.
    """

    def __init__(self, page_bytes: int, cipher: StoreCipher) -> None:
        self._page_bytes = page_bytes
        self._cipher = cipher
        self._tag_end = page_bytes + TAG_BYTES
        self._nonce_end = self._tag_end + NONCE_BYTES
        self.record_bytes = self.bytes_for(page_bytes)
        self.stride = slot_stride(self.record_bytes)
        self._memory = threading.local()

    @staticmethod
    def bytes_for(page_bytes: int) -> int:
        return page_bytes + TRAILER_BYTES

    def outgoing(self, pages: Sequence[PageWrite]) -> list[memoryview]:
        buffers = self._buffers(len(pages))
        for page, buffer in zip(pages, buffers, strict=True):
            (epoch, cipher), nonce = self._cipher.sealing()
            plain = page.buffer[: self._page_bytes]
            cipher.encrypt_into(nonce, plain, self._cipher.context + page.key, buffer[: self._tag_end])
            buffer[self._tag_end : self.record_bytes] = nonce + epoch
        return buffers

    def incoming(self, pages: Sequence[PageRead]) -> list[memoryview]:
        return self._buffers(len(pages))

    def accept(self, page: PageRead, found: memoryview) -> bool:
        from cryptography.exceptions import InvalidTag

        nonce = bytes(found[self._tag_end : self._nonce_end])
        cipher = self._cipher.of_epoch(bytes(found[self._nonce_end : self.record_bytes]))
        plain = page.buffer[: self._page_bytes]
        try:
            cipher.decrypt_into(nonce, found[: self._tag_end], self._cipher.context + page.key, plain)
        except InvalidTag:
            return False
        return page_checksum(page.key, plain) == page.checksum

    def _buffers(self, count: int) -> list[memoryview]:
        buffers: list[memoryview] = getattr(self._memory, "buffers", [])
        if len(buffers) < count:
            memory = mmap.mmap(-1, -(-count * self.stride // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE)
            with suppress(OSError):
                # A direct transfer to or from scattered small memory pages is split into many.
                memory.madvise(mmap.MADV_HUGEPAGE)
            whole = memoryview(memory)
            buffers = [whole[slot * self.stride :][: self.stride] for slot in range(count)]
            self._memory.buffers = buffers
        return buffers[:count]
