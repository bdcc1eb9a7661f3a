"""The client against a small server of its own that speaks SGLang's streaming protocol."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmark.client import play
from benchmark.server import ServerError
from benchmark.workload import Conversation, Turn

OUTPUT = 3
GAP_S = 0.02


class Handler(BaseHTTPRequestHandler):
    """Answers with the length of the prompt, counted up; refuses prompts that begin with 13."""

    incremental = False
    prompts: list[list[int]]
    in_flight: list[int]
    lock = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            self.prompts.append(body["input_ids"])
            self.in_flight.append(self.in_flight[-1] + 1)
        if body["input_ids"][0] == 13:
            self.send_error(400, "unlucky")
        else:
            self._stream(body["input_ids"])
        with self.lock:
            self.in_flight.append(self.in_flight[-1] - 1)

    def _stream(self, prompt: list[int]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        answer = [len(prompt) + i for i in range(OUTPUT)]
        for count in range(1, OUTPUT + 1):
            time.sleep(GAP_S)
            ids = answer[count - 1 : count] if self.incremental else answer[:count]
            self._send({"output_ids": ids, "meta_info": _meta(len(prompt), count)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, event: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _meta(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "cached_tokens": 2,
        "cached_tokens_details": {"device": 0, "host": 2},
        "finish_reason": {"type": "length"} if completion_tokens == OUTPUT else None,
    }


@pytest.fixture(params=[False, True], ids=["cumulative", "incremental"])
def server(request: pytest.FixtureRequest) -> Iterator[tuple[str, type[Handler]]]:
    handler = type("Fresh", (Handler,), {"incremental": request.param, "prompts": [], "in_flight": [0]})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", handler
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def conversation(index: int, *turns: tuple[int, ...]) -> Conversation:
    return Conversation(index, 0.0, tuple(Turn(tokens, 0.0) for tokens in turns))


def test_prompts_carry_the_answers_and_records_what_they_cost(server: tuple[str, type[Handler]]) -> None:
    url, handler = server
    done = play(url, [conversation(4, (1, 2), (3,))], OUTPUT, 1, configuration="x", round_index=7)
    assert handler.prompts == [[1, 2], [1, 2, 2, 3, 4, 3]]
    assert (done.configuration, done.index, len(done.turns)) == ("x", 7, 2)
    first, second = done.turns
    assert (first.conversation, first.turn, second.turn) == (4, 0, 1)
    assert second.output_ids == (6, 7, 8)
    assert (second.prompt_tokens, second.cached) == (6, {"host": 2})
    assert GAP_S <= first.ttft_s <= first.e2e_s - 2 * GAP_S * 0.5
    assert len(first.itl_s) == OUTPUT - 1
    assert sum(first.itl_s) == pytest.approx(first.e2e_s - first.ttft_s)
    assert second.start_s >= first.start_s + first.e2e_s
    assert done.wall_s >= second.start_s + second.e2e_s


@pytest.mark.parametrize("cap", [1, 3])
def test_concurrency_is_capped(server: tuple[str, type[Handler]], cap: int) -> None:
    url, handler = server
    done = play(url, [conversation(i, (1, i)) for i in range(9)], OUTPUT, cap)
    assert max(handler.in_flight) == cap
    assert [turn.conversation for turn in done.turns] == list(range(9))


def test_a_refusal_says_what_the_server_said(server: tuple[str, type[Handler]]) -> None:
    with pytest.raises(ServerError, match=r"(?s)400.*unlucky"):
        play(server[0], [conversation(0, (1,)), conversation(1, (13,))], OUTPUT, 2)


def test_an_absent_server_is_an_error() -> None:
    with pytest.raises(ServerError, match="dropped a request of 1 tokens"):
        play("http://127.0.0.1:9", [conversation(0, (1,))], OUTPUT, 1)
