"""Memory of the arena: huge pages; with a GPU also pinned, and preferably on the GPU's NUMA node.

Everything but pinning is best effort: if the system refuses, ordinary memory does as well.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

HUGE_PAGE = 2 << 20
"""Bytes, and alignment of the memory. Fewer, larger pages are pinned faster and miss the TLB less."""
CHUNK = 1 << 30
"""Bytes pinned per call, approximately: the kernel handles no other such call meanwhile."""
PCI_DEVICES = Path("/sys/bus/pci/devices")
MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call; the system's libraries have no function for it."""
PREFERRED = 1
"""Its policy: allocate on this node as long as it has memory."""
POPULATE_WRITE = 23
"""Advice for `madvise`, from Linux 5.14 on: allocate the memory now."""
POPULATING = 8
"""Threads. A single one takes minutes to clear a terabyte, as the driver would."""

Register = Callable[[int, int], str | None]
"""Pins memory, given its address and size in bytes; returns an error message, or None."""


class HostMemoryError(RuntimeError):
    """There is not enough host memory, or it cannot be given to the GPU; the message says what can be done."""


class HostMemory:
    """Zero-initialised memory; without a GPU nothing is allocated before it is used.

    Args:
        size: bytes.
        record: bytes; no record is split between two pinning calls, because a single copy could not span them.
        device: the device whose transfers use the memory; if it is a GPU, the memory is pinned, preferably on the
            GPU's NUMA node.

    Raises:
        HostMemoryError: see there.
    """

    def __init__(self, size: int, record: int, device: torch.device) -> None:
        self._chunks: list[int] = []
        try:
            mapping = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            message = f"There is no room for {size:,} bytes of host memory ({error}): give less."
            raise HostMemoryError(message) from error
        _advise(mapping, mmap.MADV_HUGEPAGE)
        start = -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % HUGE_PAGE
        self.bytes = torch.frombuffer(mapping, dtype=torch.uint8, count=size, offset=start)
        """`[size]`, uint8. No slice: torch asks about the start of a storage whether a tensor is pinned."""
        if device.type == "cuda":
            # A child would share the pages: our next write would go to a copy that the GPU does not see.
            _advise(mapping, mmap.MADV_DONTFORK)
            self._pin(record, device)

    def _pin(self, record: int, device: torch.device) -> None:
        if (node := node_of(_pci_address(device))) is not None:
            prefer_node(self.bytes, node)
        started, free = time.monotonic(), torch.cuda.mem_get_info(device)[0]
        populate(self.bytes)
        with torch.cuda.device(device):
            self._chunks = pin(self.bytes, record, _register, free)
        logger.info(
            "CachedAttention: pinned %.1f GB of host memory in %.1f s; that takes %d MB of GPU memory, which "
            "leaves %d MB.",
            self.bytes.numel() / 1e9,
            time.monotonic() - started,
            (free - (left := torch.cuda.mem_get_info(device)[0])) / 1e6,
            left / 1e6,
        )

    def close(self) -> None:
        """Unpin; no transfer may be running. Left to the end of the process, it would take the kernel longer."""
        for start in self._chunks:
            torch.cuda.cudart().cudaHostUnregister(start)
        self._chunks = []


def _advise(mapping: mmap.mmap, advice: int) -> None:
    try:
        mapping.madvise(advice)
    except OSError as error:
        logger.debug("madvise(%d) was refused: %s", advice, error)


def populate(memory: torch.Tensor, threads: int = POPULATING) -> bool:
    """Allocate the pages of `memory` now; returns whether all were allocated."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    step = -(-memory.numel() // (threads * HUGE_PAGE)) * HUGE_PAGE

    def take(part: torch.Tensor) -> bool:
        start, size = ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(part.numel())
        return madvise(start, size, ctypes.c_int(POPULATE_WRITE)) == 0

    with ThreadPoolExecutor(threads) as pool:
        return all(list(pool.map(take, memory.split(step))))


def pin(memory: torch.Tensor, record: int, register: Register, free: int = 0, chunk: int = CHUNK) -> list[int]:
    """Pin all of `memory` in chunks of whole records, about `chunk` bytes each; returns their addresses.

    Args:
        free: bytes of GPU memory that were free before; the driver may need some of them.

    Raises:
        HostMemoryError: see there.
    """
    step = max(1, chunk // record) * record
    starts = range(memory.data_ptr(), memory.data_ptr() + memory.numel(), step)
    for start in starts:
        size = min(step, memory.data_ptr() + memory.numel() - start)
        if wrong := register(start, size):
            raise HostMemoryError(
                f"{start - memory.data_ptr():,} of {memory.numel():,} bytes of host memory were pinned, then the "
                f"CUDA driver said {wrong!r}. Give a smaller --cached-attention-host-size, or the process more "
                "memory and, where it is limited, more locked memory (`ulimit -l`, a container's memory limit). "
                f"If little GPU memory was free ({free / 1e6:,.0f} MB), give a smaller --mem-fraction-static."
            )
    return list(starts)


def _register(start: int, size: int) -> str | None:
    cudart = torch.cuda.cudart()
    result = cudart.cudaHostRegister(start, size, 0)
    return None if int(result) == 0 else cudart.cudaGetErrorString(result)


def _pci_address(device: torch.device) -> str:
    gpu: Any = torch.cuda.get_device_properties(device)
    return f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"


def node_of(pci_address: str, devices: Path = PCI_DEVICES) -> int | None:
    """NUMA node that the device is attached to; None if there is only one or it is unknown."""
    try:
        node = int((devices / pci_address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def prefer_node(memory: torch.Tensor, node: int) -> bool:
    """Have pages of `memory` that are not yet allocated come from `node`; returns whether that was accepted."""
    if (number := MBIND.get(platform.machine())) is None:
        return False
    call = ctypes.CDLL(None, use_errno=True).syscall
    bits = ctypes.c_ulong(1 << node)
    sizes = (ctypes.c_ulong(value) for value in (memory.data_ptr(), memory.numel()))
    last = (ctypes.c_ulong(8 * ctypes.sizeof(bits)), ctypes.c_uint(0))
    if call(ctypes.c_long(number), *sizes, ctypes.c_int(PREFERRED), ctypes.byref(bits), *last):
        logger.info("Host memory was not placed on NUMA node %d: error %d.", node, ctypes.get_errno())
        return False
    return True
