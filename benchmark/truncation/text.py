"""Text that every machine with Python has: the standard library's sources and the documentation beside it."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN = "<begin>"
SUFFIXES = (".py", ".rst", ".md", ".txt")
# Installed packages differ between machines, and tables of character codes are not text.
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "encodings"}
SHORTEST = 2_000
LONGEST = 400_000
# Least share of letters in the first `SAMPLE` characters of a file.
LETTERS = 0.55
SAMPLE = 10_000
HELD_OUT_SHARE = 0.06


@dataclass(frozen=True)
class Document:
    """The text of one file; `held_out`: used for evaluation only."""

    name: str
    text: str
    held_out: bool


def default_roots() -> list[Path]:
    """Python's standard library, and the system's documentation if there is any."""
    roots = (Path(sysconfig.get_paths()["stdlib"]), Path("/usr/share/doc"))
    return [root for root in roots if root.is_dir()]


def read_documents(roots: Iterable[Path]) -> list[Document]:
    """All text under `roots`, in the order of the names below them; equal texts once, whole files only.

    The name of a file decides whether it is held out, so a file that changes stays on the same side.
    """
    documents, seen = [], set()
    for root in roots:
        for path in sorted(_files(root), key=lambda path: path.relative_to(root).as_posix()):
            text = _text(path)
            digest = hashlib.sha256(text.encode()).digest()
            if text and digest not in seen:
                seen.add(digest)
                name = path.relative_to(root).as_posix()
                documents.append(Document(name, text, _fraction(name) < HELD_OUT_SHARE))
    return documents


def train_tokenizer(documents: Iterable[Document], vocabulary: int, whole: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE of `vocabulary` tokens, including `BEGIN` and the strings in `whole`."""
    tokenizer = Tokenizer(models.BPE())
    # A space belongs to the word after it, a run of spaces is one token, and every digit is a token of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(whole),
        special_tokens=[BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.add_tokens(list(whole))
    return tokenizer


def begin_of(tokenizer: Tokenizer) -> int:
    """The token that starts every text."""
    return int(tokenizer.get_vocab()[BEGIN])


def token_stream(tokenizer: Tokenizer, documents: Sequence[Document]) -> np.ndarray:
    """`[tokens]`, uint16: the documents one after another, each after a `BEGIN`."""
    begin = begin_of(tokenizer)
    encoded = tokenizer.encode_batch([document.text for document in documents])
    parts = [np.array([begin, *one.ids], dtype=np.uint16) for one in encoded]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)


@dataclass(frozen=True)
class Conversations:
    """Sections of held-out text, `tokens`: `[conversations, tokens]`, int64, each starting with `BEGIN`."""

    tokens: np.ndarray
    documents: np.ndarray
    """`[conversations]`, int64: the document that each is from."""


def cut_conversations(
    tokenizer: Tokenizer, documents: Sequence[Document], tokens: int, each: int
) -> Conversations:
    """Up to `each` conversations of `tokens` from the start of every held-out document that is long enough."""
    begin = begin_of(tokenizer)
    held_out = [document.text for document in documents if document.held_out]
    rows, origins = [], []
    for number, encoded in enumerate(tokenizer.encode_batch(held_out)):
        places = range(0, len(encoded.ids) - tokens + 2, tokens - 1)[:each]
        rows += [[begin, *encoded.ids[place : place + tokens - 1]] for place in places]
        origins += [number] * len(places)
    return Conversations(np.array(rows, dtype=np.int64).reshape(-1, tokens), np.array(origins, dtype=np.int64))


def _files(root: Path) -> Iterable[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED and not name.startswith("config-")]
        yield from (Path(folder, name) for name in names if name.endswith(SUFFIXES))


def _text(path: Path) -> str:
    """The text of a file; empty if it is too short, too long, or hardly text."""
    try:
        if not SHORTEST <= path.stat().st_size <= LONGEST:
            return ""
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
    sample = text[:SAMPLE]
    return text if sum(map(str.isalpha, sample)) >= LETTERS * len(sample) else ""


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
