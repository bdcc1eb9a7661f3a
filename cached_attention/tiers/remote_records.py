"""Layout of a page in the remote store, as in the arena or encrypted, and its name."""

from __future__ import annotations

import hmac
import mmap
import threading
from collections.abc import Callable, Sequence
from itertools import count
from typing import Protocol

import numpy as np

from cached_attention.checksum import page_checksum
from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.index import PageKey
from cached_attention.tiers.cipher import EPOCH_BYTES, NONCE_BYTES, TAG_BYTES, StoreCipher
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.page_io import PageRead, PageWrite
from cached_attention.tiers.remote_client import Extent

CALL_PAGES = 16
"""Most pages per call of the store, so that a request's first pages arrive before its last."""
CHECKSUM_BYTES = 8
STAGING_BYTES = 32 << 20
"""Per thread, for encrypting pages; at least one page."""

Region = tuple[int, int]
"""Address and size in bytes."""


class Objects(Protocol):
    """Objects of one fingerprint. Any thread of the tier; results are valid until its next call."""

    object_bytes: int
    call_pages: int
    """Most pages per call."""
    prefix: str
    """Common start of all names, up to a slash."""

    def name(self, key: PageKey) -> str: ...

    def outgoing(self, pages: Sequence[PageWrite]) -> list[Extent]:
        """Objects to put, and the memory they are in."""

    def incoming(self, pages: Sequence[PageRead]) -> list[Extent]:
        """Objects to get, and the memory to get them into."""

    def accept(self, page: PageRead, found: Extent) -> bool:
        """Fill the page's buffer from `found` and record its checksum; False if that is not the page."""


class RecordMemory:
    """The arena of a host tier, and the checksums that move with its slots from and to the store."""

    def __init__(self, host: HostTier) -> None:
        self.page_bytes, self._stride = host.layout.page_bytes, host.layout.stride
        self._arena = host.arena.data_ptr(), host.arena.numel()
        self.checksums = np.zeros(host.capacity, np.uint64)
        """Checksum per slot."""

    @property
    def regions(self) -> list[Region]:
        return [self._arena, (self.checksums.ctypes.data, self.checksums.nbytes)]

    def slot(self, buffer: memoryview) -> int:
        """Arena slot that `buffer` views."""
        return (np.frombuffer(buffer, np.uint8).ctypes.data - self._arena[0]) // self._stride

    def checksum(self, buffer: memoryview) -> int:
        return int(self.checksums[self.slot(buffer)])

    def addresses(self, slot: int) -> tuple[int, int]:
        """Addresses of the page and of its checksum."""
        return self._arena[0] + slot * self._stride, self.checksums.ctypes.data + slot * CHECKSUM_BYTES


class PlainObjects:
    """The page's bytes followed by its checksum, transferred in place without a copy."""

    call_pages = CALL_PAGES

    def __init__(self, memory: RecordMemory, fingerprint: Fingerprint) -> None:
        self._memory = memory
        self.prefix = fingerprint.digest()
        self.object_bytes = memory.page_bytes + CHECKSUM_BYTES

    def name(self, key: PageKey) -> str:
        return f"{self.prefix}/{key.hex()}"

    def outgoing(self, pages: Sequence[PageWrite]) -> list[Extent]:
        for page in pages:
            self._memory.checksums[self._memory.slot(page.buffer)] = page.checksum
        return [self.extent(page.key, self._memory.slot(page.buffer)) for page in pages]

    def incoming(self, pages: Sequence[PageRead]) -> list[Extent]:
        return [self.extent(page.key, self._memory.slot(page.buffer)) for page in pages]

    def accept(self, page: PageRead, found: Extent) -> bool:
        record = page.buffer[: self._memory.page_bytes]
        return page_checksum(page.key, record) == self._memory.checksum(page.buffer)

    def extent(self, key: PageKey, slot: int) -> Extent:
        sizes = self._memory.page_bytes, CHECKSUM_BYTES
        return Extent(self.name(key), self._memory.addresses(slot), sizes)


class Staging:
    """Memory that encrypted objects pass through, with a separate part for each of `threads`."""

    def __init__(self, threads: int, object_bytes: int) -> None:
        self.objects = max(1, min(CALL_PAGES, STAGING_BYTES // object_bytes))
        """Number of objects per thread."""
        self._bytes, self._threads = object_bytes, threads
        self._whole = memoryview(mmap.mmap(-1, threads * self.objects * object_bytes))
        self._next = count()
        self._own = threading.local()

    @property
    def regions(self) -> list[Region]:
        return [(_address(self._whole), len(self._whole))]

    def at(self, address: int) -> memoryview:
        """Buffer of the object at `address`."""
        start = address - _address(self._whole)
        return self._whole[start : start + self._bytes]

    def buffers(self) -> list[memoryview]:
        """Buffers of this thread."""
        if not hasattr(self._own, "buffers"):
            thread = next(self._next)
            assert thread < self._threads, "more threads than there is memory for"
            first = thread * self.objects
            self._own.buffers = [
                self._whole[at * self._bytes : (at + 1) * self._bytes]
                for at in range(first, first + self.objects)
            ]
        return self._own.buffers


class SealedObjects:
    """The page's bytes encrypted, its checksum encrypted, each followed by its tag; then their nonce and epoch.

    Page and checksum have separate keys, so that one nonce serves both. The page key and the fingerprint are
    associated data of both, so an object under another name is invalid. Names are a keyed hash of page keys: the
    store does not learn the page keys, which could confirm a guessed prompt. The checksum covers the page's time
    in the memory of the server that put it.
    """

    def __init__(
        self, memory: RecordMemory, staging: Staging, fingerprint: Fingerprint, key: EncryptionKey
    ) -> None:
        self._memory, self._staging = memory, staging
        sealed = fingerprint.encrypted(key.id)
        self.prefix = sealed.digest()
        self._name_key = key.derive(b"remote name " + bytes.fromhex(self.prefix))
        self._pages = StoreCipher(key, sealed, "remote page")
        self._checksums = StoreCipher(key, sealed, "remote checksum")
        self.call_pages = staging.objects
        self.object_bytes = self.bytes_for(memory.page_bytes)
        sizes = (memory.page_bytes + TAG_BYTES, CHECKSUM_BYTES + TAG_BYTES, NONCE_BYTES, EPOCH_BYTES)
        ends = np.cumsum(sizes).tolist()
        self._parts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    @staticmethod
    def bytes_for(page_bytes: int) -> int:
        return page_bytes + CHECKSUM_BYTES + 2 * TAG_BYTES + NONCE_BYTES + EPOCH_BYTES

    def name(self, key: PageKey) -> str:
        return f"{self.prefix}/{hmac.digest(self._name_key, key, 'sha256').hex()}"

    def outgoing(self, pages: Sequence[PageWrite]) -> list[Extent]:
        extents = self._extents(pages)
        for page, extent in zip(pages, extents, strict=True):
            self._seal(page, self._staging.at(extent.addresses[0]))
        return extents

    def _seal(self, page: PageWrite, buffer: memoryview) -> None:
        (epoch, cipher), nonce = self._pages.sealing()
        record, checksum, at_nonce, at_epoch = (buffer[part] for part in self._parts)
        plain = page.buffer[: self._memory.page_bytes]
        cipher.encrypt_into(nonce, plain, self._pages.context + page.key, record)
        data = page.checksum.to_bytes(CHECKSUM_BYTES, "little")
        of_checksum = self._checksums.of_epoch(epoch)
        checksum[:] = of_checksum.encrypt(nonce, data, self._checksums.context + page.key)
        at_nonce[:], at_epoch[:] = nonce, epoch

    def incoming(self, pages: Sequence[PageRead]) -> list[Extent]:
        return self._extents(pages)

    def accept(self, page: PageRead, found: Extent) -> bool:
        from cryptography.exceptions import InvalidTag

        buffer = self._staging.at(found.addresses[0])
        record, checksum, nonce, epoch = (buffer[part] for part in self._parts)
        plain, name = page.buffer[: self._memory.page_bytes], bytes(epoch)
        try:
            of_checksum = self._checksums.of_epoch(name)
            data = of_checksum.decrypt(nonce, checksum, self._checksums.context + page.key)
            self._pages.of_epoch(name).decrypt_into(nonce, record, self._pages.context + page.key, plain)
        except InvalidTag:
            return False
        value = int.from_bytes(data, "little")
        self._memory.checksums[self._memory.slot(page.buffer)] = value
        return page_checksum(page.key, plain) == value

    def _extents(self, pages: Sequence[PageRead] | Sequence[PageWrite]) -> list[Extent]:
        buffers = self._staging.buffers()[: len(pages)]
        names = [self.name(page.key) for page in pages]
        return [
            Extent(name, (_address(buffer),), (self.object_bytes,))
            for name, buffer in zip(names, buffers, strict=True)
        ]


def objects_maker(
    memory: RecordMemory, key: EncryptionKey | None, threads: int
) -> tuple[Callable[[Fingerprint], Objects], list[Region]]:
    """Factory for the objects of a fingerprint, encrypted if there is a key; and the memory they move through."""
    if key is None:
        return lambda fingerprint: PlainObjects(memory, fingerprint), memory.regions
    staging = Staging(threads, SealedObjects.bytes_for(memory.page_bytes))
    return lambda fingerprint: SealedObjects(memory, staging, fingerprint, key), staging.regions


def _address(buffer: memoryview) -> int:
    return np.frombuffer(buffer, np.uint8).ctypes.data
