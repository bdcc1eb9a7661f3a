"""Responses of the OpenAI endpoints say how many tokens were dropped from a prompt that was too long."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

TRUNCATED_TOKENS = "truncated_tokens"
"""Field of `meta_info`, and of `metadata` in OpenAI responses; absent where nothing was dropped."""
_EVENT = "data: "
_dropped: ContextVar[dict[str, int]] = ContextVar("cached_attention_dropped")
"""Of the stream that runs: request id -> tokens dropped. The requests of a batch run in tasks of their own."""


def note_dropped(request: str, tokens: int) -> None:
    """`tokens` were dropped from the prompt of `request`; kept where it belongs to an OpenAI stream."""
    if (dropped := _dropped.get(None)) is not None:
        dropped[request] = tokens


def add_to_metadata(metadata: dict[str, Any], meta_info: dict[str, Any]) -> None:
    """Say it in the `metadata` of a response that is no stream."""
    if TRUNCATED_TOKENS in meta_info:
        metadata[TRUNCATED_TOKENS] = meta_info[TRUNCATED_TOKENS]


async def tell_in_stream(events: AsyncGenerator[str]) -> AsyncIterator[str]:
    """`events`, server-sent, with the tokens dropped in the `metadata` of each chunk that ends an answer."""
    dropped: dict[str, int] = {}
    _dropped.set(dropped)
    async with aclosing(events):
        async for event in events:
            yield _with_metadata(event, dropped) if dropped else event


def _with_metadata(event: str, dropped: dict[str, int]) -> str:
    if not event.startswith(_EVENT + "{"):
        return event
    chunk = json.loads(event.removeprefix(_EVENT))
    choices = chunk.get("choices")
    ends = choices is not None and all(choice.get("finish_reason") for choice in choices)
    if not ends or chunk.get("id") not in dropped:
        return event
    chunk["metadata"] = {**(chunk.get("metadata") or {}), TRUNCATED_TOKENS: dropped[chunk["id"]]}
    return f"{_EVENT}{json.dumps(chunk, ensure_ascii=False)}\n\n"
