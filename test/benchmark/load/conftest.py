"""A small server that speaks what a load test needs of SGLang's protocol, with faults that can be planted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

STATE = {"disk_healthy": 1, "host_pages": 4, "host_pages_used": 1, "disk_pages": 4, "disk_pages_used": 0}


@dataclass
class StandIn:
    """Its answer to a prompt is the prompt's checksum, counted up."""

    spoil: Callable[[int], str] = lambda number: ""
    """What is wrong with the answer to request `number`: "token", "503", "cut" or nothing."""
    gap: float = 1.0
    """Nats between the tokens that it is asked to compare."""
    damage: str = ""
    running: int = 0
    flushes: int = 0
    hints: list[dict[str, Any]] = field(default_factory=list)
    _requests: int = 0
    _aborted: dict[str, asyncio.Event] = field(default_factory=dict)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_post("/cached_attention/hint", self._hint)
        app.router.add_get("/server_info", self._info)
        app.router.add_get("/flush_cache", self._flush)
        app.router.add_get("/{any:.*}", self._other)
        return app

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt, count = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        first = sum(prompt) % 1_000
        answer = [first + place for place in range(count)]
        if not body.get("stream"):
            named = enumerate(body.get("token_ids_logprob", ()))
            scores = [[(-self.gap * place, token, None) for place, token in named]]
            meta = {"output_token_ids_logprobs": scores}
            return web.json_response({"output_ids": answer, "meta_info": meta})
        self._requests += 1
        self.running += 1
        response = web.StreamResponse()
        try:
            with suppress(ConnectionError):  # Its client has gone.
                await response.prepare(request)
                fault = self.spoil(self._requests)
                await self._stream(request, response, body.get("rid", ""), prompt, answer, fault)
        finally:
            self.running -= 1
        return response

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        rid: str,
        prompt: list[int],
        answer: list[int],
        fault: str,
    ) -> None:
        aborted = self._aborted.setdefault(rid, asyncio.Event()) if rid else asyncio.Event()
        meta: dict[str, Any] = {"prompt_tokens": len(prompt), "cached_tokens": 0, "finish_reason": None}
        for done in range(1, len(answer) + 1):
            await asyncio.sleep(0.002)
            end = {"type": "length"} if done == len(answer) else None
            if aborted.is_set():
                end = {"type": "abort", "message": "as asked", "status_code": None}
            if fault == "503":
                end = {"type": "abort", "message": "no", "status_code": 503}
            if fault == "cut" and request.transport is not None:
                request.transport.abort()
            said = [*answer[: done - 1], answer[done - 1] + (fault == "token")]
            event = {"output_ids": said, "meta_info": meta | {"completion_tokens": done, "finish_reason": end}}
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            if end:
                break

    async def _other(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _abort(self, request: web.Request) -> web.Response:
        self._aborted.setdefault((await request.json())["rid"], asyncio.Event()).set()
        return web.Response()

    async def _hint(self, request: web.Request) -> web.Response:
        self.hints.append(await request.json())
        return web.json_response({}, status=202)

    async def _info(self, _: web.Request) -> web.Response:
        state = STATE | {"damage": self.damage, "pins": 0}
        return web.json_response({"internal_states": [{"cached_attention": state}]})

    async def _flush(self, _: web.Request) -> web.Response:
        self.flushes += not self.running
        return web.Response(status=400 if self.running else 200)


@pytest.fixture
def stand_in() -> type[StandIn]:
    return StandIn


@pytest.fixture
def serving() -> Callable[[StandIn], AbstractAsyncContextManager[str]]:
    """Its URL, for as long as it is served."""

    @asynccontextmanager
    async def serving(server: StandIn) -> AsyncIterator[str]:
        runner = web.AppRunner(server.app(), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    return serving
