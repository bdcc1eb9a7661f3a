"""Facts to remember: a name and its code, stated in a text and asked for later."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

# fmt: off
NAMES = (
    " Ada", " Alan", " Barbara", " Brian", " Claude", " Dana", " Dennis", " Donald",
    " Edsger", " Emmy", " Fran", " Grace", " Guido", " Hedy", " Ida", " James",
    " John", " Karen", " Ken", " Leslie", " Linus", " Mary", " Niklaus", " Ole",
    " Peter", " Radia", " Robin", " Sophie", " Stephen", " Tim", " Vint", " Whitfield",
)
# fmt: on
CODES = tuple(f" {1_000 + 73 * number}" for number in range(100))
OPENING = "\nThe code of"
CLOSING = ".\n"
WORDS = (OPENING, *NAMES, *CODES)
"""Strings that must be one token each, so that recalling a fact takes one look back and no spelling."""


@dataclass(frozen=True)
class Facts:
    """Builds statements such as "The code of Ada 1219." from tokens."""

    opening: tuple[int, ...]
    names: tuple[int, ...]
    codes: tuple[int, ...]
    closing: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Facts:
        words = tokenizer.get_vocab()
        return cls(
            opening=tuple(tokenizer.encode(OPENING).ids),
            names=tuple(words[name] for name in NAMES),
            codes=tuple(words[code] for code in CODES),
            closing=tuple(tokenizer.encode(CLOSING).ids),
        )

    @property
    def tokens(self) -> int:
        """Length of a statement."""
        return len(self.opening) + 2 + len(self.closing)

    @property
    def question_tokens(self) -> int:
        """Length of a statement up to and including the name, after which the code is asked for."""
        return len(self.opening) + 1

    def statement(self, name: int, code: int) -> list[int]:
        """Tokens that state the `code`-th code of the `name`-th name."""
        return [*self.opening, self.names[name], self.codes[code], *self.closing]

    def draw(self, source: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """`count` different names, each with a code."""
        names = source.choice(len(self.names), count, replace=False)
        return [
            (int(name), int(code))
            for name, code in zip(names, source.choice(len(self.codes), count), strict=True)
        ]

    def mixed_into(self, text: np.ndarray, source: np.random.Generator, facts: int, asked: int) -> np.ndarray:
        """`text` with `facts` statements at random places, each repeated `asked` times later; as long as before.

        A reader can know the code in every repetition.
        """
        statements = [fact for fact in self.draw(source, facts) for _ in range(1 + asked)]
        source.shuffle(statements)
        room = len(text) - len(statements) * self.tokens
        places = np.sort(source.integers(1, room, len(statements)))
        parts: list[np.ndarray] = []
        for piece, fact in zip(np.split(text[:room], places), [*statements, None], strict=True):
            parts.append(piece)
            if fact is not None:
                parts.append(np.array(self.statement(*fact), dtype=text.dtype))
        return np.concatenate(parts)
