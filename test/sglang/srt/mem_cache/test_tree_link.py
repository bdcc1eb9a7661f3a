"""A request's pages are hashed once, and as upstream hashes them."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from sglang.srt.mem_cache.cached_attention import tree_link
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str

from cached_attention.chain import Chain

PAGE = 16


def key(tokens: int) -> RadixKey:
    return RadixKey(array("q", range(tokens)), extra_key="tenant")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens hashed per call."""
    calls: list[int] = []

    def counting(tokens: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(tokens))
        return get_storage_hash_str(tokens, *args, **kwargs)

    monkeypatch.setattr(tree_link, "get_storage_hash_str", counting)
    return calls


def test_only_new_pages_are_hashed(hashed: list[int]) -> None:
    request = tree_link.RequestChain([], Chain())
    for length in (40, 40, 47, 200, 100, 207, 208):
        request.extend(key(length), PAGE)
    assert hashed == [32, 160, 16]
    assert request.hashes == get_storage_hash_str(key(208), None, page_size=PAGE)
    assert [page.hex() for page in request.chain.keys] == request.hashes


def test_the_namespace_seeds_the_chain() -> None:
    ours, theirs = tree_link.RequestChain([], Chain()), tree_link.RequestChain([], Chain())
    ours.extend(key(64), PAGE)
    theirs.extend(RadixKey(array("q", range(64)), extra_key="another"), PAGE)
    assert not set(ours.hashes) & set(theirs.hashes)


def test_with_eagle_a_page_is_named_by_the_token_after_it_as_well() -> None:
    request, tokens = tree_link.RequestChain([], Chain()), array("q", range(2 * PAGE + 1))
    request.extend(RadixKey(tokens[: 2 * PAGE], is_bigram=True), PAGE)
    assert len(request.hashes) == 1
    request.extend(RadixKey(tokens, is_bigram=True), PAGE)
    assert request.hashes == get_storage_hash_str(RadixKey(tokens, is_bigram=True), None, page_size=PAGE)
    assert len(request.hashes) == 2
