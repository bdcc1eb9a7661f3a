"""Reads held-out conversations with every method, and measures what each loses."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from tqdm import tqdm

from benchmark.truncation.fact import Facts
from benchmark.truncation.method import METHODS, REFERENCE, Method, truncate_tokens
from benchmark.truncation.model import LanguageModel
from benchmark.truncation.plan import Plan
from benchmark.truncation.quote import quoting
from benchmark.truncation.recall import PLACES, make_quiz
from benchmark.truncation.score import Interval, Predictions, Resampling, predict
from benchmark.truncation.text import Conversations

SHORTEST_CONTEXT = 32


@dataclass(frozen=True)
class Quality:
    """How well a method predicts after some truncations (None: after one or more)."""

    method: str
    truncations: int | None
    predictions: int
    perplexity: Interval
    ratio: Interval
    """Ratio to TT's perplexity on the same tokens."""
    accuracy: Interval
    agreement: Interval
    """How often the most likely next token is the same as TT's."""


@dataclass(frozen=True)
class Recall:
    """How often a method knows the code of a fact, by where the fact was stated."""

    method: str
    place: str
    truncations: int | None
    questions: int
    accuracy: Interval


@dataclass(frozen=True)
class ContextUse:
    """Perplexity of the same tokens with a context of `window` / 2 to `window` tokens."""

    window: int
    perplexity: Interval


@dataclass(frozen=True)
class PositionUse:
    """Perplexity of the tokens at positions `start` to `end` of a conversation, with everything before them."""

    start: int
    end: int
    perplexity: Interval


@dataclass(frozen=True)
class Findings:
    conversations: int
    documents: int
    qualities: tuple[Quality, ...]
    recalls: tuple[Recall, ...]
    context_uses: tuple[ContextUse, ...]
    position_uses: tuple[PositionUse, ...]
    quoting: tuple[Quality, ...]
    """The same text made to repeat parts of itself, so that much of it is only known from earlier parts."""
    quoting_context_uses: tuple[ContextUse, ...]

    def quality(self, method: str, truncations: int | None = None) -> Quality:
        return next(one for one in self.qualities if (one.method, one.truncations) == (method, truncations))

    def recall(self, method: str, place: str, truncations: int | None = None) -> Recall:
        wanted = (method, place, truncations)
        return next(one for one in self.recalls if (one.method, one.place, one.truncations) == wanted)


def run(model: LanguageModel, facts: Facts, text: Conversations, plan: Plan, seed: int) -> Findings:
    """Measure everything about `model` and `plan` with the conversations in `text`."""
    resampling = Resampling(text.documents, seed)
    quiz = make_quiz(text.tokens, plan, facts, np.random.default_rng(seed))
    windows = _doubling(SHORTEST_CONTEXT, model.shape.window)
    quotes = np.random.default_rng(seed)
    quoted = np.stack([quoting(conversation, quotes) for conversation in text.tokens])
    with closing(_Reader(model, len(text.tokens) * (3 * len(METHODS) + 2 * len(windows)))) as reader:
        read = {name: reader.read(name, text.tokens, plan, method) for name, method in METHODS.items()}
        answered = {name: reader.read(name, quiz.conversations, plan, method) for name, method in METHODS.items()}
        copied = {name: reader.read(name, quoted, plan, method) for name, method in METHODS.items()}
        narrow, copied_narrow = (
            {
                # The one-token sink is the beginning that every trained window has.
                window: reader.read(f"context {window}", tokens, Plan(window, window // 2, 1), truncate_tokens)
                for window in windows
            }
            for tokens in (text.tokens, quoted)
        )
    counts = [None, *sorted(set(read[REFERENCE].truncations.ravel().tolist()))]
    return Findings(
        conversations=len(text.tokens),
        documents=len(np.unique(text.documents)),
        qualities=tuple(_quality(name, read, count, resampling) for name in METHODS for count in counts),
        recalls=tuple(
            Recall(name, place, count, int(chosen.sum()), resampling.mean(answered[name].right, chosen))
            for name in METHODS
            for place in PLACES
            for count in counts
            if (chosen := quiz.chosen(place) & _after(answered[name], count)).any()
        ),
        context_uses=tuple(_context_uses(narrow, model.shape.window, resampling)),
        position_uses=tuple(_position_uses(narrow[model.shape.window], model.shape.window, resampling)),
        quoting=tuple(_quality(name, copied, None, resampling) for name in METHODS),
        quoting_context_uses=tuple(_context_uses(copied_narrow, model.shape.window, resampling)),
    )


class _Reader:
    """Reads with one method after another, under one progress bar."""

    def __init__(self, model: LanguageModel, conversations: int) -> None:
        self._model = model
        self._progress = tqdm(total=conversations, desc="reading", unit="conversation")

    def read(self, name: str, conversations: np.ndarray, plan: Plan, method: Method) -> Predictions:
        self._progress.set_postfix_str(name)
        return predict(self._model, conversations, plan, method, self._progress.update)

    def close(self) -> None:
        self._progress.close()


def _quality(name: str, read: dict[str, Predictions], truncations: int | None, resampling: Resampling) -> Quality:
    mine, reference = read[name], read[REFERENCE]
    chosen = _after(mine, truncations)
    return Quality(
        name,
        truncations,
        int(chosen.sum()),
        resampling.perplexity(mine.losses, chosen),
        resampling.perplexity_ratio(mine.losses, reference.losses, chosen),
        resampling.mean(mine.right, chosen),
        resampling.mean(mine.best == reference.best, chosen),
    )


def _after(predictions: Predictions, truncations: int | None) -> np.ndarray:
    return predictions.truncations > 0 if truncations is None else predictions.truncations == truncations


def _context_uses(narrow: dict[int, Predictions], longest: int, resampling: Resampling) -> Iterable[ContextUse]:
    for window, predictions in narrow.items():
        late = np.zeros(predictions.losses.shape, dtype=bool)
        # From here on every window is full, the longest at least half.
        late[:, longest // 2 :] = True
        yield ContextUse(window, resampling.perplexity(predictions.losses, late))


def _position_uses(wide: Predictions, longest: int, resampling: Resampling) -> Iterable[PositionUse]:
    for start, end in pairwise([0, *_doubling(SHORTEST_CONTEXT, longest)]):
        chosen = np.zeros(wide.losses.shape, dtype=bool)
        chosen[:, start:end] = True
        yield PositionUse(start, end, resampling.perplexity(wide.losses, chosen))


def _doubling(first: int, last: int) -> list[int]:
    return [first << power for power in range((last // first).bit_length())]
