"""A crowd and an operator at a small server, and what they find where it does wrong."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from benchmark.load.crowd import HINT, Crowd, Habits
from benchmark.load.ledger import Ledger
from benchmark.load.reference import Comparison, compare
from benchmark.load.trouble import DiskTrouble
from benchmark.load.watch import Watch
from benchmark.load.wire import Wire
from benchmark.workload import WorkloadShape

SHAPE = WorkloadShape(conversations=1, turns=3, history=20, new=5, output=4, think_time_s=0.02)
HOUR = 3_600.0
HABITS = Habits(abort=0.3, hint=0.3, system_prompts=2, system_tokens=8)


async def happened(ledger: Ledger, watch: Watch) -> None:
    deadline = time.monotonic() + 60
    while not (
        len(ledger.answers) > 60
        and {"aborted", "connection closed"} <= set(ledger.aborts)
        and ledger.statuses[HINT, 202] > 5
        and len(watch.samples) > 2
    ):
        assert time.monotonic() < deadline, ledger
        await asyncio.sleep(0.05)


@pytest.fixture
def load(serving: Any, tmp_path: Path) -> Any:
    """Runs 20 clients until all has happened that they and an operator do, with a flush in between."""

    def load(server: Any) -> Ledger:
        async def run() -> Ledger:
            async with serving(server) as url, Wire(url, Ledger()) as wire:
                crowd = Crowd(wire, SHAPE, HABITS, 20)
                watch = Watch(os.getpid(), crowd, DiskTrouble(tmp_path / "rule", 9, 9), 0.1)
                looking = asyncio.create_task(watch.run())
                clients = asyncio.create_task(crowd.live(HOUR))
                await happened(wire.ledger, watch)
                await watch.flush()
                wire.clock.lost = -HOUR
                await clients
                looking.cancel()
                await crowd.forget_hints()
                await watch.rest()
            assert watch.flushed == 1
            assert all(sample.rss for sample in watch.samples)
            return wire.ledger

        return asyncio.run(run())

    return load


@pytest.fixture
def compared(serving: Any) -> Any:
    def compared(ledger: Ledger, reference: Any) -> Comparison:
        async def run() -> Comparison:
            async with serving(reference) as url:
                return await compare(url, ledger.kept)

        return asyncio.run(run())

    return compared


def test_of_a_good_server_nothing_is_said(load: Any, compared: Any, stand_in: Any) -> None:
    server = stand_in()
    ledger = load(server)
    assert len(ledger.answers) > 50
    assert not ledger.failures
    assert ledger.server_errors == 0
    assert server.flushes > 0
    assert ledger.aborts["aborted"] > 0
    assert ledger.aborts["connection closed"] > 0
    assert all(0 < answer.ttft <= answer.e2e for answer in ledger.answers)
    result = compared(ledger, stand_in())
    assert result.compared == len(ledger.kept) == -(-len(ledger.answers) // 10)
    assert not result.wrong
    assert result.ties == 0


def test_hints_are_taken_back_at_the_end(load: Any, stand_in: Any) -> None:
    server = stand_in()
    load(server)
    last = {(*hint["prompt"], hint["cache_salt"]): "drop" in hint for hint in server.hints}
    assert len(last) > 5
    assert all(last.values())


def test_wrong_tokens_are_found(load: Any, compared: Any, stand_in: Any) -> None:
    ledger = load(stand_in(spoil=lambda number: "token" if number % 2 else ""))
    assert not ledger.failures
    result = compared(ledger, stand_in())
    assert result.wrong
    assert "1 nats more likely" in result.wrong[0]


def test_a_token_that_is_as_likely_is_a_tie(load: Any, compared: Any, stand_in: Any) -> None:
    ledger = load(stand_in(spoil=lambda number: "token"))
    result = compared(ledger, stand_in(gap=1e-6))
    assert not result.wrong
    assert result.ties == result.compared > 0


def test_a_503_within_a_stream_is_counted(load: Any, stand_in: Any) -> None:
    ledger = load(stand_in(spoil=lambda number: "503" if number == 9 else ""))
    assert ledger.server_errors == 1


def test_a_dropped_connection_is_a_failure(load: Any, stand_in: Any) -> None:
    ledger = load(stand_in(spoil=lambda number: "cut" if number == 9 else ""))
    assert ledger.failures.total() == 1
    assert "lost" in next(iter(ledger.failures))


def test_damage_is_a_failure(load: Any, stand_in: Any) -> None:
    ledger = load(stand_in(damage="a slot leaked"))
    assert set(ledger.failures) == {"damage: a slot leaked"}


def test_no_request_goes_into_a_connection_that_the_server_closes() -> None:
    """As a server does that finds a connection idle for too long while the next request is under way."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        await reader.read(1)
        writer.close()

    async def run() -> Ledger:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            async with Wire(f"http://127.0.0.1:{port}", Ledger()) as wire:
                for _ in range(3):
                    assert await wire.call("/abort_request", {"rid": "1"}) == (200, "ok")
        return wire.ledger

    assert not asyncio.run(run()).failures
