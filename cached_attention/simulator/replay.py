"""Replays a trace without a queue: every request runs when it arrives, before the next one arrives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cached_attention.simulator.clock import Clock
from cached_attention.simulator.engine import LOOK_AGAIN, Machine
from cached_attention.simulator.policies import Policy
from cached_attention.simulator.request import Outcome, Request, Served


class Replay:
    """Hits depend on the policy and the capacities alone; the cost only affects TTFT.

    Args:
        served: called for each request.
    """

    def __init__(
        self,
        machine: Machine,
        policy: Policy,
        requests: Sequence[Request],
        served: Callable[[Served], Any] = lambda _served: None,
    ) -> None:
        self._machine = machine
        self._requests = requests
        self._on_served = served
        self._clock = Clock()
        self.store = machine.store(policy, requests, self._clock)

    def run(self) -> Outcome:
        """Serve all requests."""
        served = []
        for request in self._requests:
            served.append(self._serve(request))
            self._on_served(served[-1])
        seconds = self._clock.now - self._requests[0].arrival if self._requests else 0.0
        busy = sum(one.prefill for one in served)
        written = 0 if self.store.disk is None else self.store.disk.written_pages
        return Outcome(served, seconds, busy, written, self.store.declined)

    def _serve(self, request: Request) -> Served:
        clock, store = self._clock, self.store
        clock.now = max(clock.now, request.arrival)
        store.arrive(request)
        store.poll()
        while not store.is_ready(request):
            clock.now = min(store.next_event(), clock.now + LOOK_AGAIN)
            store.poll()
        started = clock.now
        hits = store.load(request)
        computed = max(1, request.prompt - hits.pages * self._machine.page_tokens)
        store.save(request.keys)
        first_token = started + self._machine.cost.prefill(computed, hits.pages)
        return Served(request, hits, computed, started, first_token, 1, request.prompt_pages)
