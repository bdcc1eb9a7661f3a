"""Are facts remembered after truncation, by where they were stated?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from benchmark.truncation.fact import Facts
from benchmark.truncation.plan import Plan

Place = Literal["sink", "kept", "dropped"]
PER_BLOCK = 5
"""Most statements and questions in one step."""
PLACES: tuple[Place, ...] = get_args(Place)


@dataclass(frozen=True)
class Question:
    """A question in `conversation`, after `truncations`: the code of its fact is the token after `position`."""

    place: Place
    truncations: int
    conversation: int
    position: int


@dataclass(frozen=True)
class Quiz:
    """Conversations `[conversations, tokens]`, int64, with facts stated in the text and asked for later."""

    conversations: np.ndarray
    questions: tuple[Question, ...]

    def chosen(self, place: Place, truncations: int | None = None) -> np.ndarray:
        """`[conversations, tokens - 1]`, bool: where the next token is the code of a fact."""
        where = np.zeros((len(self.conversations), self.conversations.shape[1] - 1), dtype=bool)
        for one in self.questions:
            if one.place == place and truncations in (None, one.truncations):
                where[one.conversation, one.position] = True
        return where


def make_quiz(conversations: np.ndarray, plan: Plan, facts: Facts, source: np.random.Generator) -> Quiz:
    """Overwrite parts of `conversations` with facts and questions.

    The tokens that arrive between two truncations hold one fact that is asked for after the next truncation, when
    it is among the kept tokens, and one that is asked for after the second next, when it has just been dropped.
    The fact in the sink is asked for once per conversation, after a truncation that differs between
    conversations: otherwise its repetition would be what is remembered.
    """
    room = plan.step - plan.sink
    if plan.window != 2 * plan.step or plan.sink <= facts.tokens or room < PER_BLOCK * facts.tokens:
        raise ValueError(
            f"{plan}: the quiz needs a step of half the window, a sink of more than {facts.tokens} tokens, and "
            f"{PER_BLOCK * facts.tokens} more tokens in a step"
        )
    if conversations.shape[1] < 3 * plan.step:
        raise ValueError(f"the quiz needs conversations of {3 * plan.step} tokens, got {conversations.shape[1]}")
    written = conversations.copy()
    questions = [
        question
        for number, conversation in enumerate(written)
        for question in _Writer(conversation, plan, facts, source).write(number)
    ]
    return Quiz(written, tuple(questions))


class _Writer:
    """Writes the facts of one conversation into it, block by block of `plan.step` tokens."""

    def __init__(self, conversation: np.ndarray, plan: Plan, facts: Facts, source: np.random.Generator) -> None:
        self._tokens = conversation
        self._plan = plan
        self._facts = facts
        self._source = source
        self._blocks = len(conversation) // plan.step

    def write(self, number: int) -> list[Question]:
        """Write all facts and questions; returns the questions. Block b is read after b - 1 truncations."""
        in_sink, *facts = self._facts.draw(self._source, 2 * self._blocks + 1)
        self._put(1, in_sink)
        kept, dropped = facts[0::2], facts[1::2]
        asks_of_sink = 2 + number % (self._blocks - 2)
        questions = []
        for block in range(self._blocks):
            slots = self._slots(block)
            self._put(next(slots), kept[block])
            self._put(next(slots), dropped[block])
            if block >= 1:
                questions.append(self._ask("kept", number, block, next(slots), kept[block - 1]))
            if block >= 2:
                questions.append(self._ask("dropped", number, block, next(slots), dropped[block - 2]))
            if block == asks_of_sink:
                questions.append(self._ask("sink", number, block, next(slots), in_sink))
        return questions

    def _slots(self, block: int) -> Iterator[int]:
        """Where statements may start in a block, in random order: in the part of it that is kept once."""
        first, last = (
            block * self._plan.step + self._plan.sink,
            (block + 1) * self._plan.step - self._facts.tokens,
        )
        return iter(self._source.permutation(np.arange(first, last + 1, self._facts.tokens)).tolist())

    def _put(self, place: int, fact: tuple[int, int]) -> None:
        self._tokens[place : place + self._facts.tokens] = self._facts.statement(*fact)

    def _ask(self, place: Place, number: int, block: int, at: int, fact: tuple[int, int]) -> Question:
        self._put(at, fact)
        return Question(place, block - 1, number, at + self._facts.question_tokens - 1)
