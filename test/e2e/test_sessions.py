"""SGLang's streaming sessions, whose KV stays on the device between turns, beside conversations that leave it."""

from __future__ import annotations

import json
import random
from typing import Any

from benchmark.server import Server

STREAMING = ("--enable-streaming-session",)


class Session:
    """A client of a streaming session: it sends only what is new."""

    def __init__(self, server: Server) -> None:
        self._server = server
        opened = {"capacity_of_str_len": 100_000, "streaming": True}
        self.id = json.loads(server.post("/open_session", opened))

    def turn(self, tokens: list[int]) -> list[int]:
        return self._server.generate(tokens, 8, session_params={"id": self.id})["output_ids"]

    def close(self) -> None:
        self._server.post("/close_session", {"session_id": self.id})


def test_streaming_sessions_go_on(models: Any, start: Any, town: Any, answers: Any, matches: Any) -> None:
    words = random.Random(7)
    turns = [words.choices(range(5, 1000), k=count) for count in (300, 70, 90)]

    def hold(server: Server) -> list[list[int]]:
        session = Session(server)
        said = [session.turn(turn) for turn in turns]
        session.close()
        return said

    with start(models(), *STREAMING, "--max-total-tokens", "20000") as server:
        expected = hold(server)
    actual = town(4)
    with start(models(), *STREAMING, "--max-total-tokens", "2048", host_size="80MB") as server:
        session = Session(server)
        said = [session.turn(turns[0])]
        for turn in turns[1:]:
            actual.hold(server, 1, (2,))
            said.append(session.turn(turn))
        session.close()
        assert hold(server) == expected
    assert said == expected
    assert matches(actual, answers(conversations=30, turns=6))
    assert actual.cached("host") > 4 * 250
