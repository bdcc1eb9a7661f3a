"""What does a page cost in the remote tier, and what does that add up to with 10, 100 and 1,000 servers?

    python -m benchmark.remote [--page-mib 8] [--pages 32] [--rounds 5] [--encryption] [--output DIR]

Starts a Mooncake master and a process that lends memory, and measures over TCP on this machine:

- put and get of pages, in batches as the store makes them, compared with one memcpy of the same bytes,
- with --encryption, the same for encrypted pages, alternating with unencrypted ones,
- one lookup, by the number of pages in it,
- growth of the master's memory per page, over --objects small pages.

Then calculates a fleet from these: see docs/remote.md for the assumptions, which are options. Prints tables and
saves a figure and the numbers in DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

import matplotlib.pyplot as plt
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmark.mooncake import Lender, Master, missing
from benchmark.report import machine
from cached_attention.checksum import page_checksum
from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import PageLayout
from cached_attention.tiers.host import HostTier
from cached_attention.tiers.page_io import PageRead, PageWrite, ReadOutcome
from cached_attention.tiers.remote import RemoteTier
from cached_attention.tiers.remote_address import parse_remote

FLEETS = (10, 100, 1000)
LOOKUP_PAGES = (1, 16, 256, 2048)
PAGE_TOKENS = 64


@dataclass
class Costs:
    """Costs of one page, in seconds and bytes."""

    page_bytes: int
    put: float
    get: float
    memcpy: float
    lookup: dict[int, float] = field(default_factory=dict)
    """Seconds per call, by the number of pages in it."""
    master_bytes: float = 0.0
    """Memory of the master per page."""
    sealed: dict[str, float] = field(default_factory=dict)
    """`put` and `get` of an encrypted page."""


@dataclass(frozen=True)
class Load:
    """Load of one server."""

    requests: float
    """Requests per second."""
    new_tokens: int
    """Tokens of a request, prompt and answer, that no page holds yet."""
    history_tokens: int
    moved: float
    """Share of the requests whose history comes from another server."""
    lent: int
    """Bytes of memory that it lends."""


@dataclass(frozen=True)
class FleetCosts:
    servers: int
    index_pages: float
    index_bytes: float
    """Memory of the master."""
    calls: float
    """Calls per second at the master."""
    put_bytes: float
    """Per second and server, as much outgoing as incoming."""
    get_bytes: float

    @classmethod
    def of(cls, servers: int, load: Load, costs: Costs) -> Self:
        pages = servers * load.lent / costs.page_bytes
        new, old = load.new_tokens / PAGE_TOKENS, load.history_tokens / PAGE_TOKENS
        # A put takes two calls (begin, end), a get one, each for up to 16 pages; a request has one lookup.
        calls = load.requests * (1 + 2 * -(-new // 16) + load.moved * -(-old // 16))
        return cls(
            servers,
            pages,
            pages * costs.master_bytes,
            servers * calls,
            load.requests * new * costs.page_bytes,
            load.requests * load.moved * old * costs.page_bytes,
        )


class Bench:
    """A member that lends nothing, so that every page moves to or from the lender's process."""

    def __init__(
        self, master: Master, page_bytes: int, pages: int, segment: int, key: EncryptionKey | None = None
    ) -> None:
        layout = PageLayout(PAGE_TOKENS, ((page_bytes // 2, page_bytes // 2),))
        self.pages = pages
        self.host = HostTier(layout, pages * layout.stride)
        self.host.arena.random_(0, 255)
        self._lender = Lender(master, str(segment))
        self._lender.start()
        fingerprint = Fingerprint("bench", "w", "bfloat16", PAGE_TOKENS, layout.component_bytes, {}, {})
        self.tier = RemoteTier(parse_remote("--remote", master.url("0")), 0, fingerprint, encryption=key)
        self.tier.open(self.host)
        while not self.tier.healthy:
            time.sleep(0.01)

    def put(self, first: int) -> float:
        """Seconds that it takes."""
        writes = [self._write(first, slot) for slot in range(self.pages)]
        begun = time.perf_counter()
        done = self.tier.write(writes).result()
        seconds = time.perf_counter() - begun
        assert None not in done, "the store is full: lend more"
        return seconds

    def get(self, first: int) -> float:
        """Seconds that it takes, including the check of every page."""
        buffers = [self.host.slot_bytes(slot) for slot in range(self.pages)]
        reads = [PageRead(key(first + slot), -1, 0, buffer) for slot, buffer in enumerate(buffers)]
        begun = time.perf_counter()
        outcomes = self.tier.read(reads).result()
        seconds = time.perf_counter() - begun
        assert set(outcomes) == {ReadOutcome.READ}, outcomes
        return seconds

    def lookup(self, pages: int) -> float:
        keys = [key(-1 - page) for page in range(pages)]
        begun = time.perf_counter()
        self.tier.exist(keys).result()
        return time.perf_counter() - begun

    def memcpy(self) -> float:
        source, target = self.host.arena.numpy(), np.empty_like(self.host.arena.numpy())
        target[:] = source
        begun = time.perf_counter()
        target[:] = source
        return time.perf_counter() - begun

    def clear(self) -> None:
        self.tier._client._call.remove_all(True)

    def close(self) -> None:
        self.tier.close()
        self._lender.kill()

    def _write(self, first: int, slot: int) -> PageWrite:
        name = key(first + slot)
        checksum = page_checksum(name, self.host.record(slot))
        return PageWrite(name, None, 0, checksum, 0.0, 1, self.host.slot_bytes(slot))


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def measure(page_bytes: int, pages: int, rounds: int, *, encryption: bool = False) -> Costs:
    seconds: dict[str, list[float]] = {"put": [], "get": [], "memcpy": []}
    seconds |= {"sealed put": [], "sealed get": []} if encryption else {}
    segment = max(64 << 20, 4 * pages * page_bytes)
    with Master() as master, ExitStack() as benches:
        bench = benches.enter_context(closing(Bench(master, page_bytes, pages, segment)))
        sealing = bench
        if encryption:
            key = EncryptionKey(bytes(range(32)))
            sealing = benches.enter_context(closing(Bench(master, page_bytes, pages, segment, key)))
        for first in tqdm(range(0, (rounds + 1) * pages, pages), "put, get, memcpy", file=sys.stderr):
            seconds["put"].append(bench.put(first))
            seconds["get"].append(bench.get(first))
            seconds["memcpy"].append(bench.memcpy())
            bench.clear()
            if encryption:
                seconds["sealed put"].append(sealing.put(first))
                seconds["sealed get"].append(sealing.get(first))
                bench.clear()
        lookups = {
            asked: statistics.median(bench.lookup(asked) for _ in range(10 * rounds)) for asked in LOOKUP_PAGES
        }
    # The first round includes connecting.
    one = {name: statistics.median(found[1:]) / pages for name, found in seconds.items()}
    sealed = {name: one[f"sealed {name}"] for name in ("put", "get") if encryption}
    return Costs(page_bytes, one["put"], one["get"], one["memcpy"], lookups, sealed=sealed)


def master_bytes(objects: int) -> float:
    """Bytes by which the master's memory grows per object."""
    pages = 1000
    with Master() as master:
        bench = Bench(master, 64, pages, segment=max(64 << 20, 1024 * objects))
        process = psutil.Process(master.pid)
        try:
            bench.put(0)
            before = process.memory_info().rss
            for first in tqdm(range(pages, objects + pages, pages), "objects", file=sys.stderr):
                bench.put(first)
            return (process.memory_info().rss - before) / objects
        finally:
            bench.close()


def tell(costs: Costs, fleets: list[FleetCosts], load: Load, console: Console) -> None:
    one = Table("", "us", "GB/s", title=f"A page of {costs.page_bytes / 2**20:g} MiB, TCP on this machine")
    sealed = {f"{name}, encrypted": seconds for name, seconds in costs.sealed.items()}
    for name, seconds in {"put": costs.put, "get, checked": costs.get, **sealed, "memcpy": costs.memcpy}.items():
        one.add_row(name, f"{seconds * 1e6:.0f}", f"{costs.page_bytes / seconds / 1e9:.2f}")
    for asked, seconds in costs.lookup.items():
        one.add_row(f"lookup of {asked:,} pages at once", f"{seconds * 1e6:.0f}", "")
    console.print(one)
    console.print(f"Memory of the master: {costs.master_bytes:.0f} bytes per page.")
    title = (
        f"Each server: {load.requests:g} requests/s of {load.new_tokens} new tokens, {load.moved:.0%} of them "
        f"with {load.history_tokens} tokens from elsewhere; {load.lent / 1e9:g} GB lent"
    )
    columns = ("servers", "pages", "master's memory", "calls/s", "put per server", "get per server")
    many = Table(*columns, title=title)
    for fleet in fleets:
        many.add_row(
            f"{fleet.servers:,}",
            f"{fleet.index_pages / 1e6:.2f} M",
            f"{fleet.index_bytes / 1e9:.2g} GB",
            f"{fleet.calls:,.0f}",
            f"{fleet.put_bytes / 1e6:.0f} MB/s",
            f"{fleet.get_bytes / 1e6:.0f} MB/s",
        )
    console.print(many)


def draw(costs: Costs, fleets: list[FleetCosts], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    names = {"put": costs.put, "get, checked": costs.get, "memcpy": costs.memcpy}
    left.bar(list(names), [costs.page_bytes / seconds / 1e9 for seconds in names.values()], color="#0072b2")
    left.set(ylabel="GB/s", title=f"pages of {costs.page_bytes / 2**20:g} MiB, TCP on one machine")
    servers = [fleet.servers for fleet in fleets]
    right.loglog(servers, [fleet.calls for fleet in fleets], "o-", color="#0072b2", label="calls/s at the master")
    right.loglog(servers, [fleet.index_pages for fleet in fleets], "s-", color="#cc79a7", label="pages it knows")
    right.set(xlabel="servers", title="worked out from it")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-mib", type=float, default=8, help="MiB; 8: 64 tokens of Llama-3-8B (default: 8)")
    parser.add_argument("--pages", type=int, default=32, help="moved at once (default: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--encryption", action="store_true", help="measure encrypted pages as well")
    parser.add_argument("--objects", type=int, default=200_000, help="for the master's memory (default: 200,000)")
    parser.add_argument("--requests", type=float, default=2, help="per second and server (default: 2)")
    parser.add_argument("--new-tokens", type=int, default=512, help="of a request (default: 512)")
    parser.add_argument("--history-tokens", type=int, default=8192, help="of a request (default: 8,192)")
    parser.add_argument("--moved", type=float, default=0.1, help="share that changes servers (default: 0.1)")
    parser.add_argument("--lent", type=float, default=256e9, help="bytes per server (default: 256e9)")
    parser.add_argument("--output", type=Path, default=Path("out/remote"))
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if (reason := missing()) is not None:
        sys.exit(f"error: {reason}")
    load = Load(args.requests, args.new_tokens, args.history_tokens, args.moved, int(args.lent))
    costs = measure(int(args.page_mib * 2**20), args.pages, args.rounds, encryption=args.encryption)
    costs.master_bytes = master_bytes(args.objects)
    fleets = [FleetCosts.of(servers, load, costs) for servers in FLEETS]
    args.output.mkdir(parents=True, exist_ok=True)
    numbers = {
        "machine": machine(),
        "costs": asdict(costs),
        "load": asdict(load),
        "fleets": list(map(asdict, fleets)),
    }
    (args.output / "remote.json").write_text(json.dumps(numbers, indent=1))
    draw(costs, fleets, args.output / "remote.png")
    tell(costs, fleets, load, Console())


if __name__ == "__main__":
    main()
