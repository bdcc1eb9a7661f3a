from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from cached_attention.simulator.conversations import Conversations, Shape
from cached_attention.simulator.cost import Cost
from cached_attention.simulator.engine import Machine, Simulation
from cached_attention.simulator.policies import POLICIES
from cached_attention.simulator.request import Outcome, Request
from cached_attention.simulator.workload import OnTime, Saturated

Make = Callable[[Sequence[str]], list[Request]]
CYCLE = [f"{letter}xyz" for letter in "abcdefgh"] * 6


def hits(outcome: Outcome) -> int:
    return sum(one.hits.pages for one in outcome.served)


def test_requests_run_in_the_order_of_the_queue(make_requests: Make, words: list[str], machine: Machine) -> None:
    requests = make_requests(words)
    outcome = Simulation(machine, POLICIES["ours"], Saturated(requests, 10), requests).run()
    assert [one.request.name for one in outcome.served] == [request.name for request in requests]
    assert all(one.queue == 10 for one in outcome.served[:-10])
    assert all(one.request.arrival <= one.started < one.first_token for one in outcome.served)
    starts = [one.started for one in outcome.served]
    assert starts == sorted(starts)


def test_looking_ahead_keeps_part_of_a_cycle_of_which_lru_keeps_nothing(
    make_requests: Make, machine: Machine
) -> None:
    requests = make_requests(CYCLE)
    found = {
        name: hits(Simulation(machine, POLICIES[name], Saturated(requests, 8), requests).run())
        for name in ("ours-lru", "lru", "optimum")
    }
    assert found["lru"] == 0
    assert found["optimum"] >= found["ours-lru"] >= 0.8 * found["optimum"] > 0


def test_prefills_and_decoding_take_what_the_cost_says(make_requests: Make, machine: Machine) -> None:
    (request,) = make_requests(["abc"])
    outcome = Simulation(machine, POLICIES["lru"], OnTime([request])).run()
    (served,) = outcome.served
    cost = machine.cost
    assert served.ttft == pytest.approx(cost.prefill(request.prompt, 0))
    assert outcome.busy == pytest.approx(served.ttft + (request.output - 1) * cost.decode(1))


def test_a_device_that_keeps_turns_is_asked_first(make_requests: Make, machine: Machine) -> None:
    requests = make_requests(["abc", "abcd"])
    requests = [replace(one, arrival=100.0 * place) for place, one in enumerate(requests)]
    outcome = Simulation(replace(machine, device_pages=2), POLICIES["lru"], OnTime(requests)).run()
    assert outcome.served[1].hits.device == 2
    assert outcome.served[1].hits.host == 1


def test_pages_come_back_from_the_disk_while_their_request_waits(make_requests: Make, machine: Machine) -> None:
    disk = replace(machine.cost, disk_read=1e11, disk_write=1e11)
    machine = replace(machine, cost=disk, host_pages=28, disk_pages=1000)
    requests = [replace(one, arrival=60.0 * (place // 8)) for place, one in enumerate(make_requests(CYCLE))]
    simulation = Simulation(machine, POLICIES["ours"], OnTime(requests))
    outcome = simulation.run()
    simulation.store.check_invariants()
    returning = outcome.served[8:]
    assert sum(one.hits.pages for one in returning) > 0.9 * sum(one.request.prompt_pages for one in returning)
    assert sum(one.hits.ahead + one.hits.disk for one in returning) > 0
    assert outcome.written_pages >= 32


@pytest.mark.parametrize("policy", ["ours", "ours-lru", "lru", "fetching-lru", "fetching-fifo", "slru", "t-lru"])
def test_conversations_end_under_every_policy_with_full_tiers(policy: str) -> None:
    cost = Cost(prefill_token=2e-4, page_bytes=1 << 26, disk_read=2e9, disk_write=2e9, batch=4)
    machine = Machine(cost, page_tokens=128, host_pages=60, disk_pages=300, ttl=200.0)
    workload = Conversations(Shape(sessions=60, rate=2.0, think=5.0), page_tokens=128)
    simulation = Simulation(machine, POLICIES[policy], workload)
    outcome = simulation.run()
    simulation.store.check_invariants()
    assert len(outcome.served) == len(workload)
    assert simulation.store.pages.in_host.pages <= 60
    assert simulation.store.pages.on_disk.pages <= 300
    assert math.isfinite(outcome.seconds)


def test_longest_prefix_first(make_requests: Make, machine: Machine) -> None:
    requests = make_requests(["ab", "xy", "abc"])
    requests[1] = replace(requests[1], arrival=0.001)
    requests[2] = replace(requests[2], arrival=0.002)
    outcome = Simulation(replace(machine, schedule="lpm"), POLICIES["lru"], OnTime(requests)).run()
    assert [one.request.name for one in outcome.served] == ["0", "2", "1"]
