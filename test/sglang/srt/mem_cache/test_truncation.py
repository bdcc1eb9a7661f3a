"""What the tokenizer process and the scheduler make of an over-long prompt."""

from __future__ import annotations

import asyncio
import random
from array import array
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.cached_attention import flags, truncation
from sglang.srt.mem_cache.cached_attention.tree_link import RequestChain
from sglang.srt.mem_cache.cached_attention.truncation import Truncation
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, prepare_server_args

from cached_attention.chain import Chain
from cached_attention.position.truncation import TruncationRule

PAGE, WINDOW, LIMIT = 16, 256, 250
RULE = TruncationRule(WINDOW, LIMIT, PAGE, 0.5, 1)


def words(count: int, seed: int = 0) -> array[int]:
    return array("q", random.Random(seed).choices(range(1000), k=count))


def keys(tokens: array[int], extra_key: str | None, cache_salt: str | None = None) -> list[bytes]:
    known = RequestChain([], Chain())
    known.extend(RadixKey(tokens, extra_key, cache_salt=cache_salt), PAGE)
    return known.chain.keys


def turn(conversation: array[int], *namespace: str | None) -> tuple[array[int], list[bytes], Any]:
    """Kept tokens, their page keys, and the truncated prompt where there is one."""
    extra_key, cache_salt = namespace
    prompt = Truncation(RULE).cut(conversation, extra_key, cache_salt)
    if prompt is None:
        return conversation, keys(conversation, extra_key, cache_salt), None
    return prompt.kept, keys(prompt.kept, prompt.extra_key, cache_salt), prompt


@pytest.mark.parametrize("namespace", [(None, None), ("tenant", None), (None, "salt"), ("tenant", "salt")])
def test_a_conversation_finds_its_pages_after_every_overflow(namespace: tuple[str | None, str | None]) -> None:
    """Turn after turn, each kept page has the key it had, or its source names the key it had before."""
    conversation, content = words(6 * WINDOW), {}
    overflows = 0
    for length in range(40, len(conversation), 23):
        kept, page_keys, prompt = turn(conversation[:length], *namespace)
        pages = [kept[page * PAGE : (page + 1) * PAGE].tobytes() for page in range(len(page_keys))]
        if prompt is not None and page_keys[0] not in content:
            overflows += 1
            sources = list(prompt.sources(len(page_keys)))
            found = 0
            for page, tokens in enumerate(pages):
                had = [source[page] for source in sources if source[page] in content]
                assert all(content[key] == tokens for key in had)
                found += bool(had)
            # All but those that the new tokens of this turn fill or complete.
            assert found >= len(pages) - 23 // PAGE - 2
        content.update(zip(page_keys, pages, strict=True))
    assert overflows == 11


def test_a_prompt_that_fits_is_left_alone() -> None:
    assert Truncation(RULE).cut(words(LIMIT - 1), "tenant", None) is None


def test_other_tokens_dropped_are_another_namespace() -> None:
    ours = words(LIMIT + 100)
    theirs = ours[:]
    theirs[RULE.sink + RULE.step - 1] += 1
    kept, our_keys, _ = turn(ours, None, None)
    kept_too, their_keys, _ = turn(theirs, None, None)
    assert kept == kept_too
    assert not set(our_keys) & set(their_keys)


def test_other_tokens_kept_are_the_same_namespace_up_to_there() -> None:
    ours = words(LIMIT + 40)
    theirs = ours[:]
    theirs[-1] += 1
    (_, our_keys, _), (_, their_keys, _) = turn(ours, None, None), turn(theirs, None, None)
    assert our_keys[:-1] == their_keys[:-1]


def test_tenants_share_nothing() -> None:
    tokens = words(2 * WINDOW)
    namespaces = [(None, None), ("a", None), ("b", None), (None, "a"), (None, "b"), ("a", "a")]
    chains = []
    for namespace in namespaces:
        _, page_keys, prompt = turn(tokens, *namespace)
        sources = {key for source in prompt.sources(len(page_keys)) for key in source if key}
        chains.append({*page_keys, *sources})
    assert sum(map(len, chains)) == len(set.union(*chains))


def request(tokens: array[int], **fields: Any) -> Req:
    return Req("rid", "", tokens, SamplingParams(max_new_tokens=4), **fields)


def test_the_request_runs_on_what_is_kept() -> None:
    tokens = words(LIMIT + 30)
    req = request(tokens, extra_key="tenant", lora_id="adapter")
    prompt = Truncation(RULE).cut_request(req)
    kept = tokens[: RULE.sink] + tokens[RULE.sink + RULE.step :]
    assert prompt is not None
    assert req.origin_input_ids == req.origin_input_ids_unpadded == prompt.kept == kept
    assert req.extra_key == prompt.extra_key
    assert req.extra_key.startswith("tenantadapter|truncated:")


def test_adapters_share_nothing_before_or_after_a_truncation() -> None:
    chains = []
    for adapter in (None, "one", "two"):
        req = request(words(LIMIT + 30), lora_id=adapter)
        whole = keys(req.origin_input_ids, req.extra_key)
        prompt = Truncation(RULE).cut_request(req)
        assert prompt is not None
        kept = keys(req.origin_input_ids, req.extra_key)
        assert {key for source in prompt.sources(len(kept)) for key in source if key} <= {*whole}
        chains.append({*whole, *kept})
    assert sum(map(len, chains)) == len(set.union(*chains))


def test_a_request_that_fits_is_untouched() -> None:
    req = request(words(LIMIT - 1), extra_key="tenant")
    assert Truncation(RULE).cut_request(req) is None
    assert (len(req.origin_input_ids), req.extra_key) == (LIMIT - 1, "tenant")


# In the tokenizer process

AUTO = ["--allow-auto-truncate"]


class Manager:
    """What the hook reads of a `TokenizerManager`."""

    max_req_input_len, context_len = LIMIT, WINDOW

    def __init__(self, *args: str) -> None:
        self.server_args = server_args(*args)
        self.seen: list[int] = []

    def validate(self, obj: Any, input_ids: list[int] | None) -> None:
        def original(_manager: Manager, _obj: Any, tokens: list[int] | None) -> None:
            self.seen.append(len(tokens or ()))

        truncation.validate(original, self, obj, input_ids)


def server_args(*args: str) -> ServerArgs:
    command = ["--model-path", "some/model", "--enable-cached-attention", *args]
    args_before = prepare_server_args(command)
    assert flags.is_enabled(args_before.unified_cache_external_linker_config)
    return args_before


@pytest.fixture(autouse=True, scope="module")
def _plugins() -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()


def generate(**fields: Any) -> GenerateReqInput:
    obj = GenerateReqInput(input_ids=[1], **fields)
    obj.normalize_batch_and_arguments()
    return obj


def test_the_prompt_stays_whole_and_all_else_is_validated() -> None:
    manager, obj, tokens = Manager(*AUTO), generate(), [1] * 1000
    manager.validate(obj, tokens)
    assert len(tokens) == 1000
    assert manager.seen == [1]
    assert told(obj, prompt_tokens=232)["truncated_tokens"] == 768


@pytest.mark.parametrize(
    ("args", "obj", "length"),
    [
        (AUTO, generate(), LIMIT - 1),
        ([], generate(), 1000),
        ([*AUTO, "--tokenizer-worker-num", "2"], generate(), 1000),
        ([*AUTO, "--disaggregation-mode", "prefill"], generate(), 1000),
        (AUTO, EmbeddingReqInput(input_ids=[1]), 1000),
        (AUTO, generate(return_logprob=True, logprob_start_len=0), LIMIT - 1),
    ],
    ids=["fits", "no auto truncation", "many tokenizers", "disaggregation", "embedding", "positions that fit"],
)
def test_what_is_left_to_sglang(args: list[str], obj: Any, length: int) -> None:
    manager = Manager(*args)
    manager.validate(obj, [1] * length)
    assert manager.seen == [length]
    assert "truncated_tokens" not in told(obj, prompt_tokens=length)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"return_logprob": True, "logprob_start_len": 0}, "log probabilities of the prompt: leave logprob"),
        ({"session_params": {"id": "s"}}, "session_params: send the conversation without a session"),
        ({"return_hidden_states": True}, 'hidden states of the prompt: ask for "last" only'),
        ({"return_routed_experts": True}, "return_routed_experts: leave it out"),
        ({"return_indexer_topk": True}, "return_indexer_topk: leave it out"),
        (
            {"return_logprob": True, "logprob_start_len": 7, "top_logprobs_num": 2},
            "log probabilities of the prompt",
        ),
        ({"image_data": ["image.png"]}, "images, video or audio: send less of the conversation"),
        ({"video_data": ["video.mp4"]}, "images, video or audio: send less of the conversation"),
        ({"audio_data": ["audio.wav"]}, "images, video or audio: send less of the conversation"),
        (
            {"positional_embed_overrides": PositionalEmbeds([torch.zeros(1, 8)], [3])},
            "positional_embed_overrides: leave it out",
        ),
        ({"multi_item_delimiter_indices": [3]}, "multi-item scoring: score fewer items at once"),
        ({"token_indices_to_pool": [3]}, "token_indices_to_pool: leave it out"),
    ],
)
def test_positions_of_a_truncated_prompt_are_refused(fields: dict[str, Any], what: str) -> None:
    manager = Manager(*AUTO)
    limits = r"The prompt has 1000 tokens, and this server takes 249; .* not together with "
    with pytest.raises(ValueError, match=f"^{limits}{what}.*, or send at most 249 tokens.$"):
        manager.validate(generate(**fields), [1] * 1000)
    assert not manager.seen


@pytest.mark.parametrize(
    "fields",
    [
        {"return_logprob": True, "top_logprobs_num": 2},
        {"return_logprob": True, "token_ids_logprob": [4]},
        {"return_hidden_states": "last"},
        {"session_id": "s"},
    ],
)
def test_what_concerns_the_answer_works_as_ever(fields: dict[str, Any]) -> None:
    manager = Manager(*AUTO)
    manager.validate(generate(**fields), [1] * 1000)
    assert manager.seen == [1]


def told(obj: Any, **meta_info: Any) -> dict[str, Any]:
    """`meta_info` of a response to `obj`, as the client sees it."""

    async def responses() -> AsyncIterator[dict[str, Any]]:
        yield {"meta_info": {"id": "0", "finish_reason": None, **meta_info}}

    async def first() -> dict[str, Any]:
        answer = responses()
        async for response in truncation.tell(answer, obj) or answer:
            return response["meta_info"]
        raise AssertionError

    return asyncio.run(first())


def test_an_aborted_request_tells_nothing() -> None:
    manager, obj = Manager(*AUTO), generate()
    manager.validate(obj, [1] * 1000)
    assert "truncated_tokens" not in told(obj, finish_reason={"type": "abort", "message": ""})


def test_closing_the_responses_closes_those_of_sglang() -> None:
    closed = []

    async def responses() -> AsyncIterator[dict[str, Any]]:
        try:
            while True:
                yield {"meta_info": {"finish_reason": None, "prompt_tokens": 1, "id": "0"}}
        finally:
            closed.append(True)

    async def hang_up() -> None:
        manager, obj = Manager(*AUTO), generate()
        manager.validate(obj, [1] * 1000)
        answer: Any = truncation.tell(responses(), obj)
        await anext(answer)
        await answer.aclose()

    asyncio.run(hang_up())
    assert closed == [True]


@pytest.mark.parametrize(
    ("args", "page_size", "reason"),
    [
        ([*AUTO, "--tokenizer-worker-num", "2"], PAGE, "use one, --tokenizer-worker-num 1"),
        ([*AUTO, "--disaggregation-mode", "prefill"], PAGE, "may have different windows"),
        (AUTO, 128, "no room for two pages of 128"),
    ],
)
def test_the_log_says_why_sglang_truncates(
    args: list[str], page_size: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []  # SGLang takes away the handlers of pytest.
    monkeypatch.setattr(truncation.logger, "warning", lambda text, *values: lines.append(text % values))
    assert opened(args, page_size) is None
    (line,) = lines
    assert reason in line


def opened(args: list[str], page_size: int) -> Truncation | None:
    scheduler = SimpleNamespace(
        server_args=server_args(*args),
        max_req_len=WINDOW - 1,
        max_req_input_len=LIMIT,
        world_group=SimpleNamespace(world_size=1),
    )
    linker = SimpleNamespace(
        truncation_rule=lambda window, limit: TruncationRule(window, limit, page_size, 0.5, 1)
    )
    cache = SimpleNamespace(linker=SimpleNamespace(), cache_linker=linker)
    return truncation.truncation_of(scheduler, cache)


def test_a_server_truncates_where_it_may() -> None:
    assert opened(AUTO, PAGE) == Truncation(RULE)
    assert opened([], PAGE) is None
