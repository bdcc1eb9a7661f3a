from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from cached_attention.simulator.cost import Cost
from cached_attention.simulator.engine import Machine
from cached_attention.simulator.request import Request

PAGE = 16


@pytest.fixture
def make_requests() -> Callable[[Sequence[str]], list[Request]]:
    """A page per letter: equal words up to a letter are equal prefixes. A request per second."""

    def make(words: Sequence[str]) -> list[Request]:
        return [
            Request(
                name=str(place),
                arrival=float(place),
                keys=tuple(word[: end + 1].encode() for end in range(len(word))),
                prompt_pages=len(word),
                prompt=len(word) * PAGE + 1,
                output=4,
            )
            for place, word in enumerate(words)
        ]

    return make


@pytest.fixture
def words() -> list[str]:
    """Conversations that grow and return, with prefixes that many share."""
    source = random.Random(7)
    conversations = [source.choice("ab") for _ in range(12)]
    made = []
    for _ in range(400):
        number = min(len(conversations) - 1, int(source.expovariate(0.3)))
        conversations[number] += "".join(source.choices("abcdef", k=2))
        if len(conversations[number]) > 12:
            conversations[number] = source.choice("ab")
        made.append(conversations[number])
        source.shuffle(conversations)
    return made


@pytest.fixture
def machine() -> Machine:
    cost = Cost(page_bytes=1 << 20, disk_read=1e9, disk_write=1e9, batch=4)
    return Machine(cost, page_tokens=PAGE, host_pages=20)
