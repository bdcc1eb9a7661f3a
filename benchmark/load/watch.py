"""An operator who inspects a server under load and does what operators do."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmark.load.crowd import Crowd
from benchmark.load.trouble import DiskTrouble, RemoteTrouble
from cached_attention.metrics import PREFIX

REST_S = 180.0
"""A server without requests comes to rest within this time."""
MOVING = ("saving", "dirty", "writing", "remote_unshared", "pins", "waiting")
"""Counters of the store that are zero at rest."""
HEALTH = ("disk_healthy", "remote_healthy")
"""1 at rest; missing for a tier that does not exist."""
ADMIN = ("/metrics/", "/health", "/flush_cache", "/get_server_info", "/v1/models")
"""Called in rotation. A flush is refused, with status 400, while requests run."""


class Sample(NamedTuple):
    """`at` in seconds since the start; `rss` in bytes, by process."""

    at: float
    rss: dict[str, int]
    answers: int
    asking: int
    fault: str
    disk_healthy: bool
    state: dict[str, int]
    """Counters of the store."""
    remote_fault: str = ""
    remote_healthy: bool = True
    """True also without a remote tier."""


class Watch:
    """Samples of the server whose process is `pid`, and admin calls between them."""

    def __init__(
        self,
        pid: int,
        crowd: Crowd,
        trouble: DiskTrouble,
        interval: float,
        remote_trouble: RemoteTrouble | None = None,
    ) -> None:
        self.samples: list[Sample] = []
        self.flushed = 0
        self._process = psutil.Process(pid)
        self._crowd, self._wire, self._trouble = crowd, crowd.wire, trouble
        self._remote_trouble = remote_trouble
        self._interval = interval

    async def run(self, on_sample: Callable[[Sample], object] = lambda _: None) -> None:
        """Run until cancelled."""
        for path in itertools.cycle(ADMIN):
            sample = await self.look()
            if sample is not None:
                on_sample(sample)
            await self._wire.call(path)
            await asyncio.sleep(self._interval)

    async def look(self) -> Sample | None:
        """Take a sample; None if the server did not answer, which counts as a failure, as does damage."""
        state = await self._state()
        if state is None:
            return None
        counters = {name: value for name, value in state.items() if isinstance(value, int)}
        sample = Sample(
            at=self._wire.clock.now(),
            rss=self._rss(),
            answers=len(self._wire.ledger.answers),
            asking=self._crowd.asking,
            fault=self._trouble.fault,
            disk_healthy=bool(state["disk_healthy"]),
            state=counters,
            remote_fault=self._remote_trouble.fault if self._remote_trouble else "",
            remote_healthy=bool(state.get("remote_healthy", True)),
        )
        self.samples.append(sample)
        return sample

    async def flush(self) -> None:
        """Pause the clients and empty every tier; then let them continue."""
        self._crowd.may_ask.clear()
        try:
            while self._crowd.asking:
                await asyncio.sleep(0.1)
            while (await self._wire.call("/flush_cache?timeout=10"))[0] == 400:
                await asyncio.sleep(1)
            self.flushed += 1
        finally:
            self._crowd.may_ask.set()

    async def rest(self) -> dict[str, Any]:
        """State of the store at rest; whatever still changes after `REST_S` is a failure."""
        deadline = time.monotonic() + REST_S
        while True:
            state = await self._state() or {}
            moving = {name: state.get(name) for name in MOVING if state.get(name)}
            away = [name for name in HEALTH if not state.get(name, 1)]
            if state and not moving and not away:
                return state
            if time.monotonic() > deadline:
                self._wire.ledger.failures[f"never at rest: {moving}, not {away}"] += 1
                return state
            await asyncio.sleep(0.5)

    async def hits(self) -> dict[str, int]:
        """Prompt tokens by the tier they came from, since the server started."""
        _, text = await self._wire.call("/metrics/")
        hits: dict[str, int] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"{PREFIX}hit_tokens_total":
                    tier = sample.labels["tier"]
                    hits[tier] = hits.get(tier, 0) + int(sample.value)
        return hits

    async def _state(self) -> dict[str, Any] | None:
        status, text = await self._wire.call("/server_info")
        if status != 200:
            return None
        (internal,) = json.loads(text)["internal_states"]
        state: dict[str, Any] = internal["cached_attention"]
        if state["damage"]:
            self._wire.ledger.failures[f"damage: {state['damage']}"] += 1
        return state

    def _rss(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for process in (self._process, *self._process.children(recursive=True)):
            try:
                name = _role(process)
                sizes[name] = sizes.get(name, 0) + process.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        return sizes


def _role(process: psutil.Process) -> str:
    title = process.cmdline()[:1]
    name = os.path.basename(title[0]) if title else process.name()
    return name.removeprefix("sglang::") if name.startswith("sglang::") else "http server and others"
