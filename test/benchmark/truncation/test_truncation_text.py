from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmark.truncation.fact import CODES, NAMES, WORDS, Facts
from benchmark.truncation.text import (
    Document,
    begin_of,
    cut_conversations,
    default_roots,
    read_documents,
    token_stream,
    train_tokenizer,
)

SENTENCE = "The page that was used longest ago leaves first, and its tail leaves before its head.\n"


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [Document(f"{n}.txt", SENTENCE * (30 + n), held_out=n % 2 == 0) for n in range(4)]


@pytest.fixture(scope="module")
def tokenizer(documents: list[Document]) -> Tokenizer:
    return train_tokenizer(documents, 512, WORDS)


def test_the_text_of_python_is_there() -> None:
    assert default_roots()[0].joinpath("json", "__init__.py").exists()


def test_files_are_read_in_order_once_and_only_text(tmp_path: Path) -> None:
    text = SENTENCE * 30
    for name, content in {
        "b/second.md": text + "b",
        "a.txt": text + "a",
        "copy.txt": text + "a",
        "short.txt": SENTENCE,
        "numbers.txt": "0x20, 0x21\n" * 300,
        "site-packages/other.py": text + "other",
        "picture.png": text + "picture",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.txt").write_bytes((text + "é").encode("latin-1"))
    assert [document.name for document in read_documents([tmp_path])] == ["a.txt", "b/second.md"]


def test_some_documents_are_held_out_always_the_same(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number}.txt").write_text(SENTENCE * 30 + str(number))
    held_out = {document.name for document in read_documents([tmp_path]) if document.held_out}
    assert 3 <= len(held_out) <= 45
    for path in sorted(tmp_path.iterdir())[::2]:
        path.unlink()
    left = {document.name for document in read_documents([tmp_path])}
    assert {document.name for document in read_documents([tmp_path]) if document.held_out} == held_out & left


def test_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    for text in (SENTENCE, "    def öffnen(self):\n\t0x1F # ✓ <begin>x", " Ada 1000."):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() <= 512


def test_names_and_codes_are_one_token_each(tokenizer: Tokenizer) -> None:
    assert len(set(NAMES)) == 32
    assert len(set(CODES)) == 100
    for word in WORDS:
        assert len(tokenizer.encode(word).ids) == 1


def test_a_stream_is_all_documents_each_after_a_begin(tokenizer: Tokenizer, documents: list[Document]) -> None:
    stream = token_stream(tokenizer, documents)
    begins = np.flatnonzero(stream == begin_of(tokenizer))
    parts = np.split(stream, begins)[1:]
    assert [tokenizer.decode(part[1:].tolist()) for part in parts] == [document.text for document in documents]


def test_conversations_are_held_out_text_without_overlap(tokenizer: Tokenizer, documents: list[Document]) -> None:
    text = cut_conversations(tokenizer, documents, tokens=40, each=3)
    assert text.tokens.shape == (6, 40)
    assert text.documents.tolist() == [0, 0, 0, 1, 1, 1]
    assert (text.tokens[:, 0] == begin_of(tokenizer)).all()
    first = tokenizer.decode(text.tokens[:3, 1:].ravel().tolist())
    assert documents[0].text.startswith(first)
    assert cut_conversations(tokenizer, documents, tokens=100_000, each=3).tokens.shape == (0, 100_000)


def test_facts_are_mixed_into_a_text(tokenizer: Tokenizer) -> None:
    facts = Facts.of(tokenizer)
    source = np.random.default_rng(0)
    filler = np.zeros(300, dtype=np.int64)
    filler[0] = begin_of(tokenizer)
    for _ in range(20):
        mixed = facts.mixed_into(filler, source, facts=5, asked=2)
        assert mixed.shape == filler.shape
        assert mixed[0] == filler[0]
        places = np.flatnonzero(np.isin(mixed, facts.names))
        told = [(mixed[place], mixed[place + 1]) for place in places]
        assert len(told) == 15
        # Each name has one code, whenever it is told.
        assert len(set(told)) == len({name for name, _ in told}) == 5
    assert tokenizer.decode(facts.statement(0, 1)) == "\nThe code of Ada 1073.\n"
