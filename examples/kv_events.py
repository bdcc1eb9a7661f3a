"""What a cache-aware router sees: which blocks of a server's KV cache are on the device, in host memory, on disk.

    python -m sglang.launch_server ... --enable-cached-attention --kv-events-config \
        '{"publisher": "zmq", "endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5667"}'
    python examples/kv_events.py --base-url http://127.0.0.1:30000

Prints a line per data-parallel rank whenever its picture has changed. For the events see `docs/kv-events.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec
import zmq
from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored, KVEventBatch, ZmqEventPublisher

REPLAY_SECONDS = 10.0


@dataclass
class Picture:
    """Blocks that are stored according to one publisher's events: block hashes per medium.

    `whole`: no event was missed. Otherwise blocks are missing until SGLang stores them again or CachedAttention
    repeats them, and `stored` errs on the side of recomputing.
    """

    stored: dict[str, set[int]] = field(default_factory=dict)
    whole: bool = True

    def apply(self, batch: KVEventBatch) -> None:
        for event in batch.events:
            if isinstance(event, BlockStored):
                self.stored.setdefault(event.medium or "GPU", set()).update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                self.stored.get(event.medium or "GPU", set()).difference_update(event.block_hashes)
            else:
                self.clear(whole=True)

    def clear(self, *, whole: bool) -> None:
        self.stored.clear()
        self.whole = whole

    def __str__(self) -> str:
        counts = ", ".join(f"{medium} {len(blocks)}" for medium, blocks in sorted(self.stored.items()))
        return f"blocks: {counts or 'none'}{'' if self.whole else ' (some were missed)'}"


class Subscriber:
    """Keeps the picture of one publisher: joins late, notices lost messages and restarts, and asks for replays.

    Args:
        replay_endpoint: if None, missed messages are not asked for.
    """

    def __init__(self, endpoint: str, replay_endpoint: str | None = None, topic: str = "") -> None:
        self.picture = Picture()
        self._time = 0.0
        """Time of the last message that was applied."""
        self._next = 0
        """Number of the first message that was not applied."""
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._replay_endpoint = replay_endpoint
        self._live: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
        self._lost: zmq.Socket[bytes] = self._live.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._live.set_hwm(0)
        self._live.setsockopt_string(zmq.SUBSCRIBE, topic)
        self._live.connect(endpoint)

    def join(self) -> None:
        """Ask for messages published before; `poll` does so for those published from now on."""
        self._catch_up()

    def poll(self, seconds: float) -> bool:
        """Apply messages that arrive within `seconds` or already wait; returns whether there were any."""
        came = False
        while self._live.poll(0 if came else int(seconds * 1000)):
            _topic, number, payload = self._live.recv_multipart()
            self._take(int.from_bytes(number), payload)
            came = True
        while self._lost.poll(0):
            # It may be another server that comes back, with numbers starting at 0 again.
            self._lost.recv_multipart()
            self._begin_anew()
        return came

    def _take(self, number: int, payload: bytes) -> None:
        if number < self._next and not self._is_old(payload):
            self._begin_anew()
        if number > self._next:
            self._catch_up()
        if number > self._next:
            self._lose_track(number)
        if number == self._next:
            self._apply(payload)

    def _apply(self, payload: bytes) -> None:
        batch = self._decoder.decode(payload)
        self._time = batch.ts
        self.picture.apply(batch)
        self._next += 1

    def _is_old(self, payload: bytes) -> bool:
        """Whether the message was replayed before. Numbers start at 0 again when the server was restarted."""
        return bool(self._decoder.decode(payload).ts <= self._time)

    def _begin_anew(self) -> None:
        self.picture.clear(whole=True)
        self._next = 0

    def _lose_track(self, number: int) -> None:
        """Messages before `number` are lost for good. Blocks that they removed must not count as stored."""
        self.picture.clear(whole=False)
        self._next = number

    def _catch_up(self) -> None:
        for number, payload in self._replayed(self._next):
            if number > self._next:
                self._lose_track(number)
            if number == self._next:
                self._apply(payload)

    def _replayed(self, first: int) -> Iterator[tuple[int, bytes]]:
        """Messages from `first` on that the publisher still has."""
        if self._replay_endpoint is None:
            return
        # A REQ socket would accept one answer only.
        asking: zmq.Socket[bytes]
        with zmq.Context.instance().socket(zmq.DEALER) as asking:
            asking.setsockopt(zmq.LINGER, 0)
            asking.connect(self._replay_endpoint)
            asking.send_multipart((b"", first.to_bytes(8)))
            while asking.poll(int(REPLAY_SECONDS * 1000)):
                _empty, _topic, number, payload = asking.recv_multipart()
                if number == ZmqEventPublisher.END_SEQ:
                    return
                yield int.from_bytes(number), payload

    def close(self) -> None:
        self._live.disable_monitor()
        self._live.close(0)


def subscribers(base_url: str) -> list[Subscriber]:
    """One per data-parallel rank, at the addresses that the server reports.

    Raises:
        ValueError: the server publishes no KV events.
    """
    with urllib.request.urlopen(f"{base_url}/server_info", timeout=60) as response:
        events: dict[str, Any] | None = json.loads(response.read()).get("kv_events")
    if events is None:
        raise ValueError(f"{base_url} publishes no KV events: start it with --kv-events-config, see --help.")
    host, first, replay = urlsplit(base_url).hostname, "endpoint_port_base", "replay_endpoint_port_base"
    return [
        Subscriber(
            f"tcp://{host}:{events[first] + rank}",
            f"tcp://{host}:{events[replay] + rank}" if replay in events else None,
            events["topic"],
        )
        for rank in range(events["dp_size"])
    ]


def watch(ranks: Iterable[Subscriber], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    shown: dict[int, str] = {}
    ranks = list(ranks)
    for subscriber in ranks:
        subscriber.join()
    while time.monotonic() < deadline:
        for rank, subscriber in enumerate(ranks):
            subscriber.poll(0.5 / len(ranks))
            if (line := str(subscriber.picture)) != shown.get(rank):
                shown[rank] = line
                print(f"rank {rank}: {line}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="how long to watch (default: for ever)"
    )
    args = parser.parse_args()
    base_url = args.base_url.rstrip("/")
    try:
        watch(subscribers(base_url), args.seconds)
    except (ValueError, OSError) as failure:
        print(failure if isinstance(failure, ValueError) else f"{base_url}: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
