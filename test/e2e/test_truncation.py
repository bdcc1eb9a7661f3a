"""Prompts that outgrew the context window, and conversations that go on beyond it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from benchmark.server import Server, ServerError

WINDOW, PAGE = 1024, 64
LIMIT = WINDOW - 6
"""SGLang takes prompts shorter than this."""
STEP = WINDOW // 2
OURS = {"host_size": "200MB"}
AUTO = "--allow-auto-truncate"
POOL = ("--max-total-tokens", "8192")


@pytest.fixture(scope="module")
def server(models: Any, start: Any) -> Iterator[Server]:
    hidden_states = ("--return-hidden-states-mode", "full")
    with start(models(context=WINDOW), AUTO, *POOL, *hidden_states, **OURS) as server:
        yield server


@pytest.fixture
def words(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.nodeid)


def prompt(words: random.Random, length: int) -> list[int]:
    return words.choices(range(5, 1000), k=length)


def dropped(length: int) -> int:
    return -(-max(0, length - LIMIT + 1) // STEP) * STEP


def kept(tokens: list[int]) -> list[int]:
    return tokens[:PAGE] + tokens[PAGE + dropped(len(tokens)) :] if dropped(len(tokens)) else tokens


def answer(server: Server, tokens: list[int], count: int) -> list[int]:
    """What the server says to a prompt that fits, from an empty cache."""
    server.flush_cache()
    return server.generate(tokens, count)["output_ids"]


def test_the_answer_is_that_to_the_kept_tokens(server: Server, words: random.Random) -> None:
    for length in [LIMIT - 1, LIMIT, LIMIT + 1, WINDOW, LIMIT + STEP - 8, LIMIT + STEP, 20 * WINDOW]:
        tokens = prompt(words, length)
        server.flush_cache()
        reply = server.generate(tokens, 8)
        assert reply["meta_info"].get("truncated_tokens", 0) == dropped(length)
        assert reply["meta_info"]["prompt_tokens"] == length - dropped(length) < LIMIT
        assert reply["output_ids"] == answer(server, kept(tokens), 8)


def test_any_length_and_any_answer_fit(server: Server, words: random.Random) -> None:
    def ask(_: int) -> tuple[int, int, dict[str, Any]]:
        length, count = words.randrange(1, 20 * WINDOW), words.choice([0, 1, 40, WINDOW])
        return length, count, server.generate(prompt(words, length), count)["meta_info"]

    with ThreadPoolExecutor(4) as clients:
        for length, count, meta_info in clients.map(ask, range(24)):
            assert meta_info.get("truncated_tokens", 0) == dropped(length)
            room = WINDOW - 2 - (length - dropped(length))
            assert meta_info["completion_tokens"] == min(count, room)


def test_text_batches_samples_and_streams(server: Server, words: random.Random) -> None:
    text = " ".join(words.choices(["baba", "zuzi", "hiju"], k=1800))
    expected = server.generate(text, 6)
    told = expected["meta_info"]["truncated_tokens"]
    assert told % STEP == 0
    assert told >= 2 * STEP
    long, short = server.generate([text, "baba"], 6)
    assert (long["output_ids"], long["meta_info"]["truncated_tokens"]) == (expected["output_ids"], told)
    assert "truncated_tokens" not in short["meta_info"]
    for sample in server.generate(text, 6, sampling_params={"n": 2}):
        assert (sample["output_ids"], sample["meta_info"]["truncated_tokens"]) == (expected["output_ids"], told)
    events = stream(server, "/generate", {"text": text, "sampling_params": greedy(6), "stream": True})
    assert [event["meta_info"]["truncated_tokens"] for event in events] == [told] * len(events)
    assert events[-1]["output_ids"] == expected["output_ids"]


def greedy(count: int) -> dict[str, Any]:
    return {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}


def stream(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    events = [line.removeprefix("data: ") for line in server.post(path, body).split("\n\n") if line.strip()]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


OPENAI = {"model": "model", "temperature": 0, "ignore_eos": True}


WITH_USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def told(response: dict[str, Any], where: str = "metadata") -> int | None:
    """What an OpenAI response, or a chunk of a stream, says of dropped tokens."""
    return (response.get(where) or {}).get("truncated_tokens")


def test_completions(server: Server, words: random.Random) -> None:
    tokens = prompt(words, 1700)
    expected = server.generate(tokens, 6)
    body = {**OPENAI, "prompt": tokens, "max_tokens": 6}
    reply = json.loads(server.post("/v1/completions", body))
    assert reply["choices"][0]["text"] == expected["text"]
    assert told(reply) == told(reply, "usage") == dropped(1700) == expected["meta_info"]["truncated_tokens"]
    assert reply["usage"]["prompt_tokens"] == 1700 - dropped(1700)
    chunks = stream(server, "/v1/completions", {**body, "stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected["text"]
    assert [told(chunk) for chunk in chunks] == [None] * (len(chunks) - 1) + [dropped(1700)]


def test_completions_of_several_prompts(server: Server, words: random.Random) -> None:
    """The usage counts the tokens dropped from each prompt once, as it does those that stay."""
    lengths = [100, 1700, 1100]
    prompts = [prompt(words, length) for length in lengths]
    body = {**OPENAI, "prompt": prompts, "max_tokens": 6, "n": 2}
    reply = json.loads(server.post("/v1/completions", body))
    of_all = sum(map(dropped, lengths))
    assert told(reply) == told(reply, "usage") == of_all
    assert reply["usage"]["prompt_tokens"] == sum(lengths) - of_all
    *chunks, usage = stream(server, "/v1/completions", {**body, **WITH_USAGE})
    ends = {chunk["choices"][0]["index"]: told(chunk) for chunk in chunks if chunk["choices"][0]["finish_reason"]}
    assert ends == {
        2 * i + sample: dropped(length) or None for i, length in enumerate(lengths) for sample in (0, 1)
    }
    assert told(usage, "usage") == of_all
    assert usage["usage"]["prompt_tokens"] == sum(lengths) - of_all


def test_chat(server: Server, words: random.Random) -> None:
    """A conversation of many messages; the template's special tokens are one token each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(server.model)
    messages = [
        {"role": role, "content": " " + " ".join(words.choices(["baba", "zuzi", "hiju"], k=150))}
        for role in ["system", *["user", "assistant"] * 7, "user"]
    ]
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    expected = server.generate(tokens, 6)
    assert expected["output_ids"] == answer(server, kept(tokens), 6)
    body = {**OPENAI, "messages": messages, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    reply = json.loads(server.post("/v1/chat/completions", body))
    assert reply["choices"][0]["message"]["content"] == expected["text"]
    assert told(reply) == told(reply, "usage") == dropped(len(tokens)) > 0
    assert len(reply["choices"][0]["logprobs"]["content"]) == 6
    *chunks, usage = stream(server, "/v1/chat/completions", {**body, **WITH_USAGE})
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == expected["text"]
    assert [told(chunk) for chunk in chunks] == [None] * (len(chunks) - 1) + [dropped(len(tokens))]
    assert usage["usage"]["prompt_tokens"] == len(kept(tokens))
    assert told(usage, "usage") == dropped(len(tokens))
    short = stream(server, "/v1/chat/completions", {**body, **WITH_USAGE, "messages": messages[:2]})
    assert not any("truncated_tokens" in json.dumps(chunk) for chunk in short)


def test_a_frontend_program(server: Server) -> None:
    import sglang as sgl

    @sgl.function
    def chat(s: Any, history: str) -> None:
        s += sgl.user(history)
        s += sgl.assistant(sgl.gen("answer", max_tokens=6, temperature=0))

    state = chat.run(history="baba zuzi " * 900, backend=sgl.RuntimeEndpoint(server.url))
    assert len(state["answer"]) > 0
    assert state.get_meta_info("answer")["truncated_tokens"] > 0


def test_log_probabilities_of_the_answer_are_right(server: Server, words: random.Random) -> None:
    tokens = prompt(words, 1600)
    fields = {"return_logprob": True, "top_logprobs_num": 2}
    actual = server.generate(tokens, 4, **fields)["meta_info"]
    server.flush_cache()
    expected = server.generate(kept(tokens), 4, **fields)["meta_info"]
    for logprobs, wanted in zip(actual["output_token_logprobs"], expected["output_token_logprobs"], strict=True):
        assert logprobs == pytest.approx(wanted, abs=1e-4)


def test_hidden_states_of_the_answer_are_right(server: Server, words: random.Random) -> None:
    """Asked for where SGLang takes "last"; `/generate` over HTTP takes a bool only."""
    tokens = prompt(words, 1600)
    states = []
    for sent in (tokens, kept(tokens)):
        server.flush_cache()
        body = {**OPENAI, "prompt": sent, "max_tokens": 4, "return_hidden_states": "last"}
        states.append(json.loads(server.post("/v1/completions", body))["choices"][0]["hidden_states"])
    torch.testing.assert_close(torch.tensor(states[0]), torch.tensor(states[1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("/generate", {"return_logprob": True, "logprob_start_len": 0}, "log probabilities of the prompt"),
        (
            "/generate",
            {"return_logprob": True, "logprob_start_len": 1500, "top_logprobs_num": 2},
            "log probabilities of the prompt",
        ),
        ("/generate", {"return_hidden_states": True}, "hidden states of the prompt"),
        ("/generate", {"session_params": {"id": "none"}}, "session_params"),
        ("/v1/completions", {**OPENAI, "echo": True, "logprobs": 1}, "log probabilities of the prompt"),
    ],
)
def test_what_cannot_be_right_is_refused(
    server: Server, words: random.Random, path: str, fields: dict[str, Any], message: str
) -> None:
    field = "input_ids" if path == "/generate" else "prompt"
    with pytest.raises(ServerError, match=f"answered 400: .*has 1600 tokens, .*1017; .*{message}"):
        server.post(path, {field: prompt(words, 1600), **fields})


def test_a_session_that_outgrows_the_window_is_refused(server: Server, words: random.Random) -> None:
    session = json.loads(server.post("/open_session", {"capacity_of_str_len": 100_000}))
    first = server.generate(prompt(words, 900), 4, session_params={"id": session})
    follow = {"id": session, "rid": first["meta_info"]["id"]}
    refusal = r"answered 400: .*has 1[01]\d\d tokens, .*not together with session"
    with pytest.raises(ServerError, match=refusal):
        server.generate(prompt(words, 200), 4, session_params=follow)
    server.post("/close_session", {"session_id": session})


def test_embeddings_as_a_prompt_are_refused_by_sglang(server: Server) -> None:
    """Of any length: they want the radix cache off, which is where CachedAttention lives."""
    for length in (8, 1600):
        with pytest.raises(ServerError, match=r"answered 400: .*disable_radix_cache is False"):
            server.post("/generate", {"input_embeds": [[0.0] * 64] * length})


def test_tenants_do_not_see_each_other(server: Server, words: random.Random) -> None:
    tokens = prompt(words, 1600)
    server.generate(tokens, 4, extra_key="alice")
    assert server.generate(tokens, 4, extra_key="bob")["meta_info"]["cached_tokens"] == 0
    assert server.generate(tokens, 4, cache_salt="salt")["meta_info"]["cached_tokens"] == 0
    other = [*tokens[:400], tokens[400] ^ 1, *tokens[401:]]
    assert server.generate(other, 4, extra_key="alice")["meta_info"]["cached_tokens"] == 0
    again = server.generate(tokens, 4, extra_key="alice")["meta_info"]["cached_tokens"]
    assert again >= len(kept(tokens)) - PAGE


def test_a_hint_names_what_is_kept(server: Server, words: random.Random) -> None:
    tokens = prompt(words, 1600)
    server.generate(tokens, 4)
    reply = json.loads(server.post("/cached_attention/hint", {"prompt": tokens, "keep": True}))
    assert reply["tokens"] == len(tokens)


def test_a_model_whose_keys_cannot_be_moved_is_served_as_by_sglang(
    models: Any, start: Any, words: random.Random
) -> None:
    scaling = {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0, "rope_theta": 10_000.0}}
    ntk = ("--json-model-override-args", json.dumps(scaling), AUTO, "--context-length", str(WINDOW), *POOL)
    tokens = prompt(words, 1600)
    with start(models(context=WINDOW), *ntk, **OURS) as server:
        meta_info = server.generate(tokens, 3)["meta_info"]
        assert server.log.read_text().count("no truncation, over-long prompts lose their newest tokens") == 1
        assert (meta_info["prompt_tokens"], meta_info["truncated_tokens"]) == (LIMIT, 1600 - LIMIT)
        # SGLang bounds the answer by the prompt's length before the cut: no room is left.
        assert meta_info["completion_tokens"] == 0
        assert len(server.generate(tokens[: LIMIT - 1], 3)["output_ids"]) == 3


def test_the_pool_may_be_smaller_than_the_window(models: Any, start: Any, words: random.Random) -> None:
    pool = 512
    tokens = prompt(words, 700)
    with start(models(context=WINDOW), AUTO, "--max-total-tokens", str(pool), **OURS) as server:
        reply = server.generate(tokens, 4)
        assert reply["meta_info"]["truncated_tokens"] == pool // 2
        assert reply["output_ids"] == answer(server, tokens[:PAGE] + tokens[PAGE + pool // 2 :], 4)


# What needs the pages of an overflowed conversation to be found at their old positions

TURNS, NEW, ANSWER = 12, 160, 30


def test_a_conversation_that_overflows_goes_on_at_the_price_of_its_new_tokens(
    server: Server, words: random.Random, settled: Any
) -> None:
    """12 turns, 3 overflows; each turn after the first finds what it keeps, and stores only what is new."""
    server.flush_cache()
    history: list[int] = []
    overflows = pages_before = 0
    for turn in range(TURNS):
        before = len(history)
        history += prompt(words, NEW)
        overflowed = dropped(len(history)) > dropped(before)
        overflows += overflowed
        reply = server.generate(history, ANSWER)
        if turn:
            known = before - dropped(len(history))
            # The last token of the answer was never computed.
            reusable = (known - 1) // PAGE * PAGE
            assert reply["meta_info"]["cached_tokens"] >= 0.9 * reusable, f"turn {turn}"
        history += reply["output_ids"]
        pages = settled(server)["host_pages_used"]
        assert pages - pages_before <= (NEW + ANSWER) // PAGE + 2, f"turn {turn}"
        pages_before = pages
    assert overflows == 3
