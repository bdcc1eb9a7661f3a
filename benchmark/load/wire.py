"""HTTP requests whose outcome is counted, whatever it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp

from benchmark.client import REQUEST_TIMEOUT_S, Stream, cached_by_tier, events
from benchmark.load.clock import Clock
from benchmark.load.ledger import Answer, Ledger
from benchmark.server import ServerError

ADMIN_TIMEOUT = aiohttp.ClientTimeout(total=600)
LOST = (aiohttp.ClientError, TimeoutError, ServerError)


class Wire:
    """Connections to the server at `url`, one per request; a context manager.

    SGLang closes a connection that was idle for 5 s. A client that is slow to notice, as all of these are on a
    machine with few cores, would send its next request over a closed connection.
    """

    def __init__(self, url: str, ledger: Ledger) -> None:
        self.ledger = ledger
        self.clock = Clock()
        self._http = aiohttp.ClientSession(
            url,
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
            read_bufsize=2**20,
        )

    async def __aenter__(self) -> Wire:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def ask(self, tokens: list[int], answer: int, **request: Any) -> list[int] | None:
        """The greedy answer of `answer` tokens; None if there was none, which counts as a failure."""
        lost = self.clock.lost
        try:
            stream = await self._stream(tokens, answer, request)
        except LOST as failure:
            self._fail(f"a request was lost: {type(failure).__name__}: {failure}")
            return None
        if stream is None:
            return None
        reason = stream.meta.get("finish_reason") or {"type": "stream ended"}
        if reason["type"] != "length" or len(stream.output_ids) != answer:
            self._fail(f"an answer ended by itself: {reason['type']}: {reason.get('message', '')}")
            return None
        self.ledger.answered(self._answer(stream, self.clock.lost > lost), list(tokens), stream.output_ids)
        return stream.output_ids

    def _answer(self, stream: Stream, stalled: bool) -> Answer:
        first, last = stream.token_times[0], stream.token_times[-1]
        return Answer(
            at=self.clock.now(),
            ttft=first - stream.started,
            e2e=last - stream.started,
            prompt_tokens=stream.meta["prompt_tokens"],
            cached=cached_by_tier(stream.meta),
            stalled=stalled,
        )

    async def give_up(self, tokens: list[int], answer: int, **request: Any) -> None:
        """Like `ask`, for a request that the client may abort meanwhile: a missing answer is not a failure."""
        try:
            stream = await self._stream(tokens, answer, request)
        except LOST as failure:
            self._fail(f"a request to be aborted was lost: {type(failure).__name__}: {failure}")
            return
        reason = (stream.meta.get("finish_reason") or {}) if stream is not None else {}
        self.ledger.aborts["aborted" if reason.get("type") == "abort" else "finished first"] += 1

    async def call(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """Status and text of a GET, or of a POST of `body` as JSON; 0 and the reason if there was no response."""
        method = "GET" if body is None else "POST"
        try:
            async with self._http.request(method, path, json=body, timeout=ADMIN_TIMEOUT) as response:
                text = await response.text()
        except (aiohttp.ClientError, TimeoutError) as failure:
            self._fail(f"{path} was lost: {type(failure).__name__}: {failure}")
            return 0, str(failure)
        self.ledger.statuses[path.partition("?")[0], response.status] += 1
        return response.status, text

    async def _stream(self, tokens: list[int], answer: int, request: Mapping[str, Any]) -> Stream | None:
        """None if the server refused, which counts as a failure."""
        sampling = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True}
        body = {"input_ids": tokens, "sampling_params": sampling, "stream": True, **request}
        stream = Stream()
        async with self._http.post("/generate", json=body) as response:
            status = response.status
            if status == 200:
                async for event in events(response):
                    stream.add(event)
                # A stream that has begun cannot change its status: it reports it at its end.
                status = (stream.meta.get("finish_reason") or {}).get("status_code") or 200
            else:
                self._fail(f"/generate answered {status}: {(await response.text())[:200]}")
        self.ledger.statuses["/generate", int(status)] += 1
        return stream if response.status == 200 else None

    def _fail(self, what: str) -> None:
        self.ledger.failures[what] += 1
