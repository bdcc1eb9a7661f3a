"""Compares answers given under load with those of a server that keeps everything on the device."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from tqdm import tqdm

from benchmark.client import REQUEST_TIMEOUT_S
from benchmark.load.ledger import Kept

TIE = 1e-4
"""Nats. If the float32 log-probabilities of two tokens differ by less than this, rounding decides between them,
and rounding depends on what is computed together."""
AT_ONCE = 16


@dataclass
class Comparison:
    compared: int = 0
    ties: int = 0
    """Answers whose first differing token is as likely for the reference as its own."""
    wrong: list[str] = field(default_factory=list)


async def compare(url: str, kept: Sequence[Kept]) -> Comparison:
    """Ask the server at `url` again for every answer of `kept`, and compare."""
    result = Comparison()
    slots = asyncio.Semaphore(AT_ONCE)
    bar = tqdm(total=len(kept), desc="answers compared", unit="answer")
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)

    async def check(http: aiohttp.ClientSession, one: Kept) -> None:
        async with slots:
            await _check(http, one, result)
        bar.update()

    async with (
        aiohttp.ClientSession(url, timeout=timeout, connector=connector) as http,
        asyncio.TaskGroup() as group,
    ):
        for one in kept:
            group.create_task(check(http, one))
    bar.close()
    return result


async def _check(http: aiohttp.ClientSession, one: Kept, result: Comparison) -> None:
    right = (await _generate(http, one.prompt, len(one.output_ids)))["output_ids"]
    result.compared += 1
    if right == one.output_ids:
        return
    place = next(i for i, (a, b) in enumerate(zip(one.output_ids, right, strict=True)) if a != b)
    gap = await _gap(http, [*one.prompt, *right[:place]], right[place], one.output_ids[place])
    if gap < TIE:
        result.ties += 1
    else:
        result.wrong.append(
            f"prompt of {len(one.prompt)} tokens: token {place} of the answer is {one.output_ids[place]}, "
            f"the reference says {right[place]}, {gap:.2g} nats more likely"
        )


async def _gap(http: aiohttp.ClientSession, tokens: list[int], right: int, said: int) -> float:
    """How much more likely `right` is than `said` after `tokens`, in nats."""
    asked = {"return_logprob": True, "token_ids_logprob": [right, said]}
    reply = await _generate(http, tokens, 1, **asked)
    (scores,) = reply["meta_info"]["output_token_ids_logprobs"]
    by_token = {token: float(score) for score, token, _ in scores}
    return by_token[right] - by_token[said]


async def _generate(
    http: aiohttp.ClientSession, tokens: list[int], answer: int, **request: object
) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True}
    body = {"input_ids": tokens, "sampling_params": sampling, **request}
    async with http.post("/generate", json=body, raise_for_status=True) as response:
        return dict(await response.json())
