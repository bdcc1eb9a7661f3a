"""Seeded multi-turn conversations: the same seed gives every configuration the same conversations."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkloadShape:
    """Sizes of a workload. Lengths are in tokens, `arrival_rate` is in conversations per second (0: all at once),
    `think_time_s` is the mean pause between an answer and the next turn.

    The first prompt of a conversation has `history + new` tokens, each later one adds the answer and `new` more.
    """

    conversations: int
    turns: int
    history: int
    new: int
    output: int
    arrival_rate: float = 0.0
    think_time_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("conversations", "turns", "new", "output"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("history", "arrival_rate", "think_time_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")

    @property
    def tokens_per_conversation(self) -> int:
        """Tokens of a conversation when its last answer is complete."""
        return self.history + self.turns * (self.new + self.output)

    @property
    def total_turns(self) -> int:
        return self.conversations * self.turns


@dataclass(frozen=True)
class Turn:
    """What the user adds in one turn: token ids, sent `think_s` seconds after the previous answer."""

    tokens: tuple[int, ...]
    think_s: float


@dataclass(frozen=True)
class Conversation:
    """Turns of one user who arrives `arrival_s` seconds after the start of the round."""

    index: int
    arrival_s: float
    turns: tuple[Turn, ...]


def make_workload(shape: WorkloadShape, seed: int, round_index: int, vocabulary: int) -> list[Conversation]:
    """Conversations with Poisson arrivals and exponential think times.

    Rounds of one seed share no conversation. Tokens come from the middle half of the `vocabulary`, because
    tokenizers keep their special tokens at its ends.
    """
    source = random.Random(f"{seed}/{round_index}")
    arrival = 0.0
    conversations = []
    for index in range(shape.conversations):
        conversations.append(Conversation(index, arrival, _turns(shape, source, vocabulary)))
        if shape.arrival_rate:
            arrival += source.expovariate(shape.arrival_rate)
    return conversations


def _turns(shape: WorkloadShape, source: random.Random, vocabulary: int) -> tuple[Turn, ...]:
    tokens = range(vocabulary // 4, 3 * vocabulary // 4)
    turns = []
    for index in range(shape.turns):
        length = shape.new if index else shape.history + shape.new
        think = source.expovariate(1 / shape.think_time_s) if index and shape.think_time_s else 0.0
        turns.append(Turn(tuple(source.choices(tokens, k=length)), think))
    return tuple(turns)
