"""A machine that serves a workload in virtual time: queue, admission, prefill, decode."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cached_attention.index import PageKey
from cached_attention.simulator.clock import Clock
from cached_attention.simulator.cost import Cost
from cached_attention.simulator.device import DeviceCache
from cached_attention.simulator.policies import Policy
from cached_attention.simulator.request import Outcome, Request, Served
from cached_attention.simulator.store import SimulatedStore
from cached_attention.simulator.workload import Workload

LOOK_AGAIN = 0.01
"""Seconds until an idle machine checks again whether a request that waits for the disk may run."""
LONGEST_PREFIX_QUEUE = 128
"""SGLang sorts by prefix only up to this many waiting requests."""


@dataclass(frozen=True)
class Machine:
    """Sizes in pages of `page_tokens` tokens; the rest as in `SimulatedStore`."""

    cost: Cost
    page_tokens: int
    host_pages: int
    disk_pages: int = 0
    device_pages: int = 0
    ttl: float = math.inf
    schedule: str = "fcfs"
    """Like SGLang's `--schedule-policy`: `fcfs`, or `lpm`, longest prefix first."""

    def store(self, policy: Policy, requests: Sequence[Request], clock: Clock) -> SimulatedStore:
        """Store under `policy`, which may use `requests` if it is offline."""
        return SimulatedStore(
            policy,
            policy.make(requests),
            self.host_pages,
            self.disk_pages,
            page_tokens=self.page_tokens,
            cost=self.cost,
            clock=clock,
            ttl=self.ttl,
        )


class Simulation:
    """One run. Events happen between steps: a step is one prefill, or decoding until something may change.

    A prompt is prefilled alone and at once, before decoding continues, like in SGLang without mixed chunks.
    Saving to host memory takes no machine time (the paper's section 3.2.2).

    Args:
        requests: in execution order, for an offline policy.
        served: called for each request when it has its first token.
    """

    def __init__(
        self,
        machine: Machine,
        policy: Policy,
        workload: Workload,
        requests: Sequence[Request] = (),
        served: Callable[[Served], Any] = lambda _served: None,
    ) -> None:
        self._machine = machine
        self._cost = machine.cost
        self._workload = workload
        self._on_served = served
        self._clock = Clock()
        self.store = machine.store(policy, requests, self._clock)
        self._device = DeviceCache(machine.device_pages)
        self._waiting: dict[str, Request] = {}
        self._wanted: Counter[PageKey] = Counter()
        self._running: list[tuple[int, int, Request]] = []
        """Heap by the decode step in which a request ends."""
        self._steps = 0
        self._busy = 0.0
        self._served: list[Served] = []

    def run(self) -> Outcome:
        """Serve all requests."""
        first = self._workload.next_arrival()
        self._clock.now = start = first if first < math.inf else 0.0
        while True:
            self._take_arrivals()
            self.store.poll()
            if not (self._prefill_next() or self._decode() or self._idle()):
                break
        disk = self.store.disk
        written = 0 if disk is None else disk.written_pages
        return Outcome(self._served, self._clock.now - start, self._busy, written, self.store.declined)

    def _take_arrivals(self) -> None:
        while (request := self._workload.due(self._clock.now, len(self._waiting))) is not None:
            self._waiting[request.name] = request
            self._wanted.update(request.prompt_keys)
            self.store.arrive(request)

    def _prefill_next(self) -> bool:
        """Prefill the first waiting request that is ready; False if none can run."""
        if len(self._running) >= self._cost.batch:
            return False
        for request in islice(self._in_order(), self._cost.batch):
            if self.store.is_ready(request):
                self._prefill(request)
                return True
        return False

    def _in_order(self) -> Iterable[Request]:
        if self._machine.schedule != "lpm" or len(self._waiting) > LONGEST_PREFIX_QUEUE:
            return self._waiting.values()
        waiting = sorted(self._waiting.values(), key=self.store.restorable_pages, reverse=True)
        self.store.reorder(waiting)
        return waiting

    def _prefill(self, request: Request) -> None:
        queue, wanted = len(self._waiting), len(self._wanted)
        self._stop_waiting(request)
        on_device = self._device.match(request.prompt_keys)
        hits = self.store.load(request, on_device)
        computed = max(1, request.prompt - hits.pages * self._machine.page_tokens)
        started = self._clock.now
        self._work(self._cost.prefill(computed, hits.pages - hits.device))
        self.store.prefill_took(computed, self._cost.compute(computed))
        self.store.save(request.prompt_keys)
        served = Served(request, hits, computed, started, self._clock.now, queue, wanted)
        self._served.append(served)
        self._on_served(served)
        heapq.heappush(self._running, (self._steps + max(0, request.output - 1), len(self._served), request))
        self._finish_ended()

    def _stop_waiting(self, request: Request) -> None:
        del self._waiting[request.name]
        for key in request.prompt_keys:
            if self._wanted[key] == 1:
                del self._wanted[key]
            else:
                self._wanted[key] -= 1

    def _decode(self) -> bool:
        """Decode until a request ends, or until one may be admitted before that; False if none is running."""
        if not self._running:
            return False
        step = self._cost.decode(len(self._running))
        steps = self._running[0][0] - self._steps
        if len(self._running) < self._cost.batch:
            steps = math.ceil(min(steps, max(1.0, (self._next_event() - self._clock.now) / step)))
        self._steps += steps
        self._work(steps * step)
        self._finish_ended()
        return True

    def _finish_ended(self) -> None:
        while self._running and self._running[0][0] <= self._steps:
            _, _, request = heapq.heappop(self._running)
            self.store.save(request.keys)
            self._device.insert(request.keys)
            self._workload.answered(request, self._clock.now)

    def _work(self, seconds: float) -> None:
        self._clock.now += seconds
        self._busy += seconds

    def _next_event(self) -> float:
        """Time at which a request may become ready to run."""
        arrival = self._workload.next_arrival()
        if not self._waiting:
            return arrival
        return min(arrival, self.store.next_event(), self._clock.now + LOOK_AGAIN)

    def _idle(self) -> bool:
        """Wait for the next event; False if there will be none."""
        if (event := self._next_event()) == math.inf:
            return False
        self._clock.now = max(self._clock.now, event)
        return True
