"""Clients that hold conversations with one server concurrently and behave like real clients."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from benchmark.load.wire import Wire
from benchmark.workload import Conversation, WorkloadShape, make_workload

HINT = "/cached_attention/hint"
SALTS = (None, None, None, "tenant-a")
"""Namespaces of conversations: most share one."""
OUTLOOKS: tuple[dict[str, Any], ...] = ({"expect_in_s": 2.0}, {"keep": True}, {"drop": True})
ABANDONED_ANSWER = 100
"""Tokens that a request asks for before it is aborted."""


@dataclass(frozen=True)
class Habits:
    """Habits of every client: probabilities of what it does before a turn."""

    abort: float = 0.15
    hint: float = 0.1
    system_prompts: int = 8
    """Conversations begin with one of this many system prompts, of `system_tokens` tokens each."""
    system_tokens: int = 128
    vocabulary: int = 1_024


class Crowd:
    """`clients` users of one server.

    Args:
        shape: shape of each conversation; `conversations` is 1.
    """

    def __init__(self, wire: Wire, shape: WorkloadShape, habits: Habits, clients: int, seed: int = 0) -> None:
        self.wire = wire
        self.shape = shape
        self.habits = habits
        self.may_ask = asyncio.Event()
        """While it is cleared, no client begins another turn."""
        self.may_ask.set()
        self.asking = 0
        """Clients that are waiting for an answer."""
        self.hints: list[dict[str, Any]] = []
        """All hints that were given."""
        self._seed = seed
        words = random.Random(seed)
        tokens = range(habits.vocabulary // 4, 3 * habits.vocabulary // 4)
        self._systems = [words.choices(tokens, k=habits.system_tokens) for _ in range(habits.system_prompts)]
        self._clients = [_Client(self, random.Random(f"{seed}/{number}")) for number in range(clients)]
        self._conversations = itertools.count()

    async def live(self, seconds: float) -> None:
        """Hold conversations; returns when the last turn begun within `seconds` is answered."""
        clock = self.wire.clock
        until = clock.now() + seconds
        async with asyncio.TaskGroup() as group:
            for client in self._clients:
                group.create_task(client.live(lambda: clock.now() < until))

    async def forget_hints(self) -> None:
        """Withdraw all hints, so that the server waits for nothing because of one."""
        for conversation in self.hints:
            await self.wire.call(HINT, conversation | {"drop": True})
        self.hints.clear()

    def begin(self) -> tuple[list[int], Conversation]:
        """A system prompt, and a conversation that no other client has."""
        number = next(self._conversations)
        (conversation,) = make_workload(self.shape, self._seed, number, self.habits.vocabulary)
        return list(self._systems[number % len(self._systems)]), conversation


class _Client:
    def __init__(self, crowd: Crowd, dice: random.Random) -> None:
        self._crowd, self._wire, self._dice = crowd, crowd.wire, dice
        self._latency = 1.0
        """Duration of the last answer in seconds."""

    async def live(self, goes_on: Callable[[], bool]) -> None:
        while goes_on():
            history, conversation = self._crowd.begin()
            salt = self._dice.choice(SALTS)
            for turn in conversation.turns:
                await asyncio.sleep(turn.think_s or self._dice.random())
                await self._crowd.may_ask.wait()
                if not goes_on():
                    return
                history += turn.tokens
                answer = await self._turn(history, salt)
                if answer is None:
                    break
                history += answer

    async def _turn(self, history: list[int], salt: str | None) -> list[int] | None:
        self._crowd.asking += 1
        try:
            if self._dice.random() < self._crowd.habits.abort:
                await self._change_my_mind(history, salt)
            if self._dice.random() < self._crowd.habits.hint:
                await self._hint(history, salt)
            started = time.monotonic()
            answer = await self._wire.ask(history, self._crowd.shape.output, cache_salt=salt)
            self._latency = time.monotonic() - started
            return answer
        finally:
            self._crowd.asking -= 1

    async def _change_my_mind(self, history: list[int], salt: str | None) -> None:
        """Send a request and abort it while it is queued, computed or answered."""
        rid = uuid.UUID(int=self._dice.getrandbits(128)).hex
        longer = [*history, *self._dice.choices(history, k=30)]
        request = asyncio.create_task(self._wire.give_up(longer, ABANDONED_ANSWER, rid=rid, cache_salt=salt))
        await asyncio.wait({request}, timeout=self._dice.uniform(0, 1.5) * self._latency)
        if not request.done() and self._dice.random() < 0.5:
            request.cancel()
            self._wire.ledger.aborts["connection closed"] += 1
        elif not request.done():
            await self._wire.call("/abort_request", {"rid": rid})
        with suppress(asyncio.CancelledError):
            await request

    async def _hint(self, history: list[int], salt: str | None) -> None:
        conversation = {"prompt": list(history), "cache_salt": salt}
        outlook = self._dice.choice(OUTLOOKS)
        await self._wire.call(HINT, conversation | outlook)
        if "drop" not in outlook:
            self._crowd.hints.append(conversation)
