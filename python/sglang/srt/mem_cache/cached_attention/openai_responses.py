"""Reports in responses of the OpenAI endpoints how many tokens were dropped from over-long prompts.

Like the other counts in `usage`, the number is the sum over all prompts of a request; `metadata` has it as well.
In a stream, the chunk that ends an answer has `metadata` with the number for its prompt, and a chunk after all
answers has the sum. Both lack it if nothing was dropped.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from sglang.srt.entrypoints.openai.protocol import ChatCompletionResponse, CompletionResponse, UsageInfo

from .truncation import TRUNCATED_TOKENS

_EVENT = "data: "
_dropped: ContextVar[dict[int, int]] = ContextVar("cached_attention_dropped")
"""For the current stream: number of an answer -> tokens dropped from its prompt. The prompts of a batch run in
tasks of their own, which share the dictionary."""


class _Usage(UsageInfo):
    truncated_tokens: int


class _ChatCompletion(ChatCompletionResponse):
    usage: _Usage


class _Completion(CompletionResponse):
    usage: _Usage


_TELLING: dict[type, type[_ChatCompletion] | type[_Completion]] = {
    ChatCompletionResponse: _ChatCompletion,
    CompletionResponse: _Completion,
}


def _of_all_prompts(dropped: Mapping[int, int], samples: int) -> int:
    """Sum over all prompts, each of which has `samples` answers with adjacent numbers."""
    return sum(tokens for answer, tokens in dropped.items() if answer % samples == 0)


def tell_in_response(response: Any, answers: Sequence[dict[str, Any]], samples: int) -> Any | None:
    """What to send instead of `response`; None if nothing was dropped, or it is an error."""
    dropped = {i: answer["meta_info"].get(TRUNCATED_TOKENS, 0) for i, answer in enumerate(answers)}
    tokens, telling = _of_all_prompts(dropped, samples), _TELLING.get(type(response))
    if not tokens or telling is None:
        return None
    usage = _Usage(**dict(response.usage), truncated_tokens=tokens)
    metadata = {**(response.metadata or {}), TRUNCATED_TOKENS: tokens}
    return telling.model_construct(**{**dict(response), "usage": usage, "metadata": metadata})


async def tell_in_stream(events: AsyncGenerator[str], samples: int) -> AsyncIterator[str]:
    """The server-sent `events`, with the numbers that `note_dropped` has noted."""
    dropped: dict[int, int] = {}
    _dropped.set(dropped)
    async with aclosing(events):
        async for event in events:
            yield _telling(event, dropped, samples) if dropped else event


def _telling(event: str, dropped: Mapping[int, int], samples: int) -> str:
    if not event.startswith(_EVENT + "{"):
        return event
    chunk = json.loads(event.removeprefix(_EVENT))
    choices = chunk.get("choices")
    if choices:
        tokens = dropped.get(choices[0]["index"], 0)
    else:
        tokens = 0 if choices is None else _of_all_prompts(dropped, samples)
    if not tokens:
        return event
    if chunk.get("usage"):
        chunk["usage"][TRUNCATED_TOKENS] = tokens
    if all(choice.get("finish_reason") for choice in choices):
        chunk["metadata"] = {**(chunk.get("metadata") or {}), TRUNCATED_TOKENS: tokens}
    return f"{_EVENT}{json.dumps(chunk, ensure_ascii=False)}\n\n"


def note_dropped(responses: AsyncGenerator[Any]) -> AsyncIterator[Any] | None:
    """`responses`, noting dropped tokens for the OpenAI stream that requested them; None if there is none."""
    dropped = _dropped.get(None)
    return None if dropped is None else _noted(responses, dropped)


async def _noted(responses: AsyncGenerator[Any], dropped: dict[int, int]) -> AsyncIterator[Any]:
    async with aclosing(responses):
        async for response in responses:
            if tokens := response["meta_info"].get(TRUNCATED_TOKENS):
                dropped[response.get("index", 0)] = tokens
            yield response
