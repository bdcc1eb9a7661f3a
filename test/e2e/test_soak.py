"""Host memory that is always full: the server keeps serving, and nothing grows."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
from tqdm import tqdm

from benchmark.server import Server

REQUESTS = 2_000
PAGE_BYTES = 64 * 4 * 2 * 2 * 64 * 4
"""64 tokens x 4 layers x K and V x 2 heads x 64 dimensions x 4 bytes: the tiny model in float32."""


def resident_bytes(server: Server) -> int:
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    return sum(process.memory_info().rss for process in family if "scheduler" in process.name())


def test_two_thousand_requests_over_a_host_tier_of_64_pages(models: Any, start: Any, store_states: Any) -> None:
    words = random.Random(3)
    prompts = [words.choices(range(5, 1000), k=words.randint(60, 400)) for _ in range(REQUESTS)]
    with start(models(), "--max-total-tokens", "2048", host_size=str(64 * PAGE_BYTES), command=True) as server:
        sizes = []

        def ask(i: int) -> None:
            # Every third request returns to an earlier prompt.
            prompt = prompts[i] if i % 3 else prompts[max(0, i - words.randint(1, 20))]
            assert len(server.generate(prompt, 2)["output_ids"]) == 2
            if i % 100 == 99:
                sizes.append(resident_bytes(server))

        with ThreadPoolExecutor(12) as clients:
            list(tqdm(clients.map(ask, range(REQUESTS)), total=REQUESTS, desc="requests"))
        (state,) = store_states(server)
    assert state["host_pages"] == 64
    assert state["host_pages_used"] <= 64
    assert state["evicted"] > 1_000
    assert state["loaded"] > 0
    assert max(sizes[10:]) < 1.03 * sizes[9], f"resident bytes over the run: {sizes}"
