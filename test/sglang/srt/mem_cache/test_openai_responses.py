"""What the OpenAI endpoints say of dropped tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionResponse,
    CompletionResponse,
    ErrorResponse,
    PromptTokensDetails,
    UsageInfo,
)
from sglang.srt.mem_cache.cached_attention.openai_responses import (
    note_dropped,
    tell_in_response,
    tell_in_stream,
)


def answers(*dropped: int) -> list[dict[str, Any]]:
    return [{"meta_info": {"truncated_tokens": tokens} if tokens else {}} for tokens in dropped]


def response(kind: type[Any]) -> Any:
    details = PromptTokensDetails(cached_tokens=3)
    usage = UsageInfo(prompt_tokens=7, total_tokens=9, completion_tokens=2, prompt_tokens_details=details)
    return kind(id="0", model="m", choices=[], usage=usage, metadata={"weight_version": "default"})


@pytest.mark.parametrize("kind", [ChatCompletionResponse, CompletionResponse])
@pytest.mark.parametrize(
    ("dropped", "samples", "told"), [((512,), 1, 512), ((0, 512, 64), 1, 576), ((64,) * 4, 2, 128)]
)
def test_a_response_says_it_of_all_its_prompts(
    kind: type[Any], dropped: Sequence[int], samples: int, told: int
) -> None:
    before = response(kind)
    after = tell_in_response(before, answers(*dropped), samples)
    expected = json.loads(before.model_dump_json())
    expected["usage"]["truncated_tokens"] = expected["metadata"]["truncated_tokens"] = told
    assert json.loads(after.model_dump_json(by_alias=True)) == expected


def test_a_response_to_prompts_that_fit_is_left_alone() -> None:
    assert tell_in_response(response(ChatCompletionResponse), answers(0, 0), 1) is None


def test_an_error_is_left_alone() -> None:
    error = ErrorResponse(message="no", type="BadRequest", code=400)
    assert tell_in_response(error, answers(512), 1) is None


def chunk(*choices: tuple[int, str | None], **fields: Any) -> dict[str, Any]:
    return {"id": "0", "choices": [{"index": index, "finish_reason": end} for index, end in choices], **fields}


def streamed(chunks: Sequence[Any], dropped: Sequence[int], samples: int = 1) -> list[Any]:
    """What a client gets of `chunks`, when so many tokens were dropped from the prompt of each answer."""

    async def responses() -> AsyncIterator[dict[str, Any]]:
        for index, answer in enumerate(answers(*dropped)):
            yield answer | ({"index": index} if len(dropped) > 1 else {})

    async def events() -> AsyncIterator[str]:
        async for _ in note_dropped(responses()) or responses():
            pass
        for content in chunks:
            yield content if isinstance(content, str) else f"data: {json.dumps(content)}\n\n"

    async def read() -> list[str]:
        return [event async for event in tell_in_stream(events(), samples)]

    seen = asyncio.run(read())
    return [json.loads(event[6:]) if event.startswith("data: {") else event for event in seen]


def test_a_stream_says_it_where_an_answer_ends_and_in_its_usage() -> None:
    usage = {"prompt_tokens": 7}
    chunks = [chunk((0, None)), chunk((0, "stop")), chunk(usage=usage), "data: [DONE]\n\n"]
    told = {"truncated_tokens": 512}
    assert streamed(chunks, [512]) == [
        chunks[0],
        chunks[1] | {"metadata": told},
        chunks[2] | {"metadata": told, "usage": usage | told},
        chunks[3],
    ]
    assert streamed(chunks, [0]) == chunks


def test_a_stream_of_several_prompts_says_of_each_what_is_its_own_and_of_all_in_the_end() -> None:
    usage = {"prompt_tokens": 7}
    chunks = [
        chunk((0, "stop"), usage=usage),
        chunk((1, None), usage=usage),
        chunk((2, "length"), metadata={"weight_version": "default"}),
        chunk(usage=usage),
    ]
    first, second, third, last = streamed(chunks, [0, 512, 64])
    assert first == chunks[0]
    assert second == chunks[1] | {"usage": usage | {"truncated_tokens": 512}}
    assert third["metadata"] == {"weight_version": "default", "truncated_tokens": 64}
    assert last["usage"] == usage | {"truncated_tokens": 576}


def test_the_samples_of_a_prompt_count_once() -> None:
    (last,) = streamed([chunk(usage={})], [512, 512, 64, 64], samples=2)
    assert last["metadata"] == {"truncated_tokens": 576}


def test_what_is_no_chunk_is_passed_on() -> None:
    events = ['data: {"error": {"message": "no"}}\n\n', 'event: sglext_ids\ndata: {"choices": []}\n\n']
    assert streamed(events, [512]) == [json.loads(events[0][6:]), events[1]]


def test_only_a_stream_of_these_endpoints_is_noted() -> None:
    async def responses() -> AsyncIterator[dict[str, Any]]:
        yield answers(512)[0]

    assert note_dropped(responses()) is None
