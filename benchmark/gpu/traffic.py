"""Requests whose history is in the intended tier, and long answers generated while other prompts arrive."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from benchmark.client import Round, TurnRecord, play
from benchmark.workload import Conversation, Turn, WorkloadShape, make_workload

DEVICE, HOST, RECOMPUTE = "device hit", "host hit", "recompute"


@dataclass(frozen=True)
class FirstToken:
    """TTFT, in seconds, of one request that had the server to itself."""

    kind: str
    new: int
    prompt_tokens: int
    cached: dict[str, int]
    """Prompt tokens by the tier they came from."""
    ttft_s: float


class Prompts:
    """Sends prompts to the server at `url`, one at a time, and reports where their history was.

    Args:
        pool: tokens that its device holds; computing that many evicts everything else from it.
    """

    def __init__(self, url: str, vocabulary: int, pool: int, page_size: int, seed: int) -> None:
        self._url, self._pool, self._page_size = url, pool, page_size
        self._vocabulary = range(vocabulary // 4, 3 * vocabulary // 4)
        self._random = random.Random(seed)

    def first_tokens(self, history: int, new: int) -> Iterator[FirstToken]:
        """One device hit, one host hit, and the prompts computed in between."""
        words = self._words(history)
        _, on_device = self._turns(words, self._words(new))
        yield self._note(DEVICE, new, on_device)
        for _ in range(self._pool // history + 1):
            (fresh,) = self._turns(self._words(history + new))
            yield self._note(RECOMPUTE, new, fresh)
        (in_host,) = self._turns(words + self._words(new))
        yield self._note(HOST, new, in_host)

    def _words(self, count: int) -> tuple[int, ...]:
        return tuple(self._random.choices(self._vocabulary, k=count))

    def _turns(self, *turns: tuple[int, ...]) -> Sequence[TurnRecord]:
        conversation = Conversation(0, 0.0, tuple(Turn(words, 0.0) for words in turns))
        return play(self._url, [conversation], output_tokens=1, concurrency=1).turns

    def _note(self, kind: str, new: int, turn: TurnRecord) -> FirstToken:
        """`kind` is what was intended; if the history was elsewhere, another kind is recorded."""
        whole = (turn.prompt_tokens - new - 1) // self._page_size * self._page_size
        tier = {DEVICE: "device", HOST: "host"}.get(kind)
        as_meant = turn.cached.get(tier, 0) >= whole if tier else not turn.cached
        kind = kind if as_meant else f"not a {kind}"
        return FirstToken(kind, new, turn.prompt_tokens, turn.cached, turn.ttft_s)


@dataclass(frozen=True)
class Mixture:
    """Long answers, and new prompts that arrive while they are generated."""

    answers: WorkloadShape
    arrivals: WorkloadShape

    def play(self, url: str, name: str, index: int, seed: int, vocabulary: int) -> Round:
        """Records of the long answers; the server computes, and saves, the other prompts meanwhile."""
        shapes = (self.answers, self.arrivals)
        rounds = [make_workload(shape, seed + 1 + i, index, vocabulary) for i, shape in enumerate(shapes)]
        with ThreadPoolExecutor(2) as pool:
            answers, arrivals = (
                pool.submit(
                    play,
                    url,
                    conversations,
                    shape.output,
                    shape.conversations,
                    configuration=name,
                    round_index=index,
                )
                for shape, conversations in zip(shapes, rounds, strict=True)
            )
            arrivals.result()
            return answers.result()
