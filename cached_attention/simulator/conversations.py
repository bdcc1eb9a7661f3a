"""Conversations as in the paper's evaluation: users read and think before they answer."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import dataclass, field

from cached_attention.index import PageKey
from cached_attention.simulator.request import Request


@dataclass(frozen=True)
class Shape:
    """What the paper states of its ShareGPT workload (section 4.1), and, marked as such, what it does not.

    Sessions have 5.75 turns on average, 73% more than one; 47% exceed 2,048 tokens and 30% exceed 4,096. Turns
    beyond the first are geometric, and tokens per turn are lognormal over the sessions, with both parameters
    derived from the two shares.
    """

    sessions: int = 9000
    rate: float = 1.0
    """Sessions started per second, Poisson."""
    multi_turn: float = 0.73
    turns: float = 5.75
    log_tokens: float = 6.231
    """Mean of the logarithm of the tokens per turn, question and answer together."""
    log_spread: float = 1.1
    context: int = 4096
    """Tokens; when it is exceeded, the oldest half of the conversation is dropped (section 3.4)."""
    think: float = 60.0
    """Mean seconds from an answer to the next question, exponential. Not stated."""
    answer: float = 0.6
    """Share of a turn's tokens. Not stated."""


@dataclass
class _Session:
    number: int
    left: int
    """Turns left."""
    tokens: int
    """Tokens per turn."""
    turn: int = 0
    length: int = 0
    """Tokens of the history that are within the context window."""
    keys: list[PageKey] = field(default_factory=list)
    made: int = 0
    """Pages made so far, used to name them."""


class Conversations:
    """A closed loop: the next turn of a session arrives some time after the previous answer.

    Truncation drops the oldest half of the history, and what is kept stays valid (section 3.4: positions are
    decoupled). Because only the amount matters here, the first half of the pages stands for what is kept.

    Args:
        page_tokens: tokens per page.
        seed: for everything that is random; the sessions do not depend on how they are served.
    """

    def __init__(self, shape: Shape, page_tokens: int, seed: int = 0) -> None:
        self._shape = shape
        self._page_tokens = page_tokens
        self._arrivals: list[tuple[float, int, _Session]] = []
        self._sessions: dict[str, _Session] = {}
        self._order = itertools.count()
        self._random = random.Random(seed)
        self._seed = seed
        self._total = 0
        now = 0.0
        for number in range(shape.sessions):
            now += self._random.expovariate(shape.rate)
            session = self._new_session(number)
            self._total += session.left
            self._push(now, session)

    def _new_session(self, number: int) -> _Session:
        shape = self._shape
        turns = 1
        if self._random.random() < shape.multi_turn:
            more = (shape.turns - 1) / shape.multi_turn
            turns += math.ceil(math.log(1 - self._random.random()) / math.log(1 - 1 / more))
        tokens = self._random.lognormvariate(shape.log_tokens, shape.log_spread)
        return _Session(number, max(1, turns), max(8, round(min(tokens, shape.context / 2))))

    def _push(self, when: float, session: _Session) -> None:
        heapq.heappush(self._arrivals, (when, next(self._order), session))

    def __len__(self) -> int:
        return self._total

    def next_arrival(self) -> float:
        return self._arrivals[0][0] if self._arrivals else math.inf

    def due(self, now: float, waiting: int) -> Request | None:
        if self.next_arrival() > now:
            return None
        when, _, session = heapq.heappop(self._arrivals)
        request = self._ask(session, when)
        self._sessions[request.name] = session
        return request

    def _ask(self, session: _Session, now: float) -> Request:
        answer = max(1, round(session.tokens * self._shape.answer))
        question = max(1, session.tokens - answer)
        while session.length + question + answer > self._shape.context:
            self._truncate(session)
        history, prompt = session.length, session.length + question
        session.length = prompt + answer
        while len(session.keys) < session.length // self._page_tokens:
            session.keys.append(session.number.to_bytes(4, "big") + session.made.to_bytes(4, "big"))
            session.made += 1
        return Request(
            name=f"{session.number}-{session.turn}",
            arrival=now,
            keys=tuple(session.keys),
            prompt_pages=prompt // self._page_tokens,
            prompt=prompt,
            output=answer,
            history=history,
            turn=session.turn,
        )

    def _truncate(self, session: _Session) -> None:
        session.length //= 2
        del session.keys[session.length // self._page_tokens :]

    def answered(self, request: Request, now: float) -> None:
        session = self._sessions.pop(request.name)
        session.left -= 1
        session.turn += 1
        if session.left:
            thinking = random.Random(f"{self._seed} {session.number} {session.turn}")
            self._push(now + thinking.expovariate(1 / self._shape.think), session)
