"""Streaming client: plays conversations against a server and records what each turn cost."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmark.server import ServerError
from benchmark.workload import Conversation

# One request may wait behind many long prefills on a slow machine.
REQUEST_TIMEOUT_S = 1_800.0


@dataclass(frozen=True)
class TurnRecord:
    """One answered turn. Seconds: `start_s` since the start of the round, `ttft_s` and `e2e_s` since the request.

    `itl_s` has the times between output tokens, one entry per token after the first. `cached` is the number of
    prompt tokens by the tier they came from, as reported by the server; the rest of `prompt_tokens` was computed.
    """

    conversation: int
    turn: int
    prompt_tokens: int
    output_ids: tuple[int, ...]
    start_s: float
    ttft_s: float
    e2e_s: float
    itl_s: tuple[float, ...]
    cached: dict[str, int]


@dataclass(frozen=True)
class Round:
    """All turns of one run of a workload on one configuration; `wall_s` in seconds."""

    configuration: str
    index: int
    wall_s: float
    turns: tuple[TurnRecord, ...]


@dataclass
class Stream:
    """What has arrived of one answer so far."""

    started: float = field(default_factory=time.perf_counter)
    output_ids: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def add(self, event: dict[str, Any]) -> None:
        now = time.perf_counter()
        self.meta = event["meta_info"]
        total = self.meta["completion_tokens"]
        ids = event["output_ids"]
        # Servers with --incremental-streaming-output send only what is new.
        self.output_ids = ids if len(ids) == total else [*self.output_ids, *ids]
        fresh = total - len(self.token_times)
        if fresh > 0:
            last = self.token_times[-1] if self.token_times else now
            self.token_times += [last + (now - last) * (i + 1) / fresh for i in range(fresh)]

    def record(self, conversation: int, turn: int, round_start: float) -> TurnRecord:
        times = self.token_times
        return TurnRecord(
            conversation=conversation,
            turn=turn,
            prompt_tokens=self.meta["prompt_tokens"],
            output_ids=tuple(self.output_ids),
            start_s=self.started - round_start,
            ttft_s=times[0] - self.started,
            e2e_s=times[-1] - self.started,
            itl_s=tuple(after - before for before, after in itertools.pairwise(times)),
            cached=cached_by_tier(self.meta),
        )


def cached_by_tier(meta: dict[str, Any]) -> dict[str, int]:
    """Cached prompt tokens by tier from a `meta_info`; if the server names no tiers, all count as device."""
    details = meta.get("cached_tokens_details")
    if details is None:
        return {"device": meta["cached_tokens"]} if meta.get("cached_tokens") else {}
    return {tier: tokens for tier, tokens in details.items() if isinstance(tokens, int) and tokens}


def play(
    url: str,
    conversations: Sequence[Conversation],
    output_tokens: int,
    concurrency: int,
    *,
    configuration: str = "server",
    round_index: int = 0,
    progress: tqdm[Any] | None = None,
) -> Round:
    """Run `conversations` against the server at `url`; returns when all are answered.

    At most `concurrency` requests are in flight. Decoding is greedy, `output_tokens` per answer, and each prompt
    contains the answers that the server actually gave. ServerError if the server refuses or drops a request.
    """
    session = _Session(url, output_tokens, concurrency, progress)
    started = time.perf_counter()
    turns = asyncio.run(session.play(conversations, started))
    return Round(configuration, round_index, time.perf_counter() - started, tuple(turns))


class _Session:
    def __init__(self, url: str, output_tokens: int, concurrency: int, progress: tqdm[Any] | None) -> None:
        self.url = f"{url.rstrip('/')}/generate"
        self.sampling = {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}
        self.slots = asyncio.Semaphore(concurrency)
        self.progress = progress

    async def play(self, conversations: Sequence[Conversation], started: float) -> list[TurnRecord]:
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20) as http,
                asyncio.TaskGroup() as group,
            ):
                tasks = [group.create_task(self._converse(http, one, started)) for one in conversations]
        except ExceptionGroup as failures:
            # All requests to one server fail for the same reason: the first failure says enough.
            raise failures.exceptions[0] from None
        return [record for task in tasks for record in task.result()]

    async def _converse(
        self, http: aiohttp.ClientSession, conversation: Conversation, started: float
    ) -> list[TurnRecord]:
        await asyncio.sleep(conversation.arrival_s)
        history: list[int] = []
        records = []
        for index, turn in enumerate(conversation.turns):
            await asyncio.sleep(turn.think_s)
            history += turn.tokens
            async with self.slots:
                stream = await self._ask(http, history)
            history += stream.output_ids
            records.append(stream.record(conversation.index, index, started))
            if self.progress is not None:
                self.progress.update()
        return records

    async def _ask(self, http: aiohttp.ClientSession, input_ids: list[int]) -> Stream:
        body = {"input_ids": input_ids, "sampling_params": self.sampling, "stream": True}
        stream = Stream()
        try:
            async with http.post(self.url, json=body) as response:
                if response.status != 200:
                    raise ServerError(f"{self.url} answered {response.status}: {await response.text()}")
                async for event in events(response):
                    stream.add(event)
        except (aiohttp.ClientError, TimeoutError) as failure:
            reason = str(failure) or type(failure).__name__
            raise ServerError(f"{self.url} dropped a request of {len(input_ids)} tokens: {reason}") from failure
        if not stream.token_times or stream.meta["finish_reason"]["type"] == "abort":
            raise ServerError(f"{self.url} gave no answer to {len(input_ids)} tokens: {stream.meta}")
        return stream


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        payload = line.decode().strip().removeprefix("data:").strip()
        if not payload or payload == "[DONE]":
            continue
        event = json.loads(payload)
        if "error" in event:
            raise ServerError(f"the server answered {event['error']}")
        yield event
