"""Names of the store's pages in SGLang's KV events."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from sglang.srt.disaggregation.kv_events import BlockStored
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import compute_node_event_hash_values

from cached_attention.index import PageKey

TOKENS_REMEMBERED = 65_536
"""Number of pages whose tokens are reported, those of the latest requests; 64 tokens take 700 bytes."""
SWEPT = 2
"""Names that are checked per new name, to forget those that are no longer needed."""


Tokens = Sequence[int] | Sequence[tuple[int, int]]
"""Tokens of a page as SGLang's events report them: with EAGLE, each with the token after it."""


class BlockName(NamedTuple):
    """A page in SGLang's KV events."""

    block_hash: int
    """Signed, 64 bits."""
    cache_salt: str | None = None
    lora_name: str | None = None


@dataclass
class _Node:
    """The part of a tree node that upstream's recorder reads."""

    key: RadixKey | None
    parent: _Node | None
    hash_value: list[str] = field(default_factory=list)
    event_hash_value: list[str] | None = None


_ROOT = _Node(None, None)


class BlockNames:
    """Names pages as SGLang's own recorder names those on the device, so that a router can match both.

    Without a namespace, SGLang's block hash is the first 64 bits of our key. With one (`extra_key`, `cache_salt`,
    a LoRA adapter) it cannot be derived from the key, so the name is learnt from a request. Until then, a page
    that an earlier run of the server left on disk is named by the first 64 bits of its key.

    Args:
        is_known: whether the store knows a page; names of other pages are forgotten.
    """

    def __init__(self, params: CacheInitParams, is_known: Callable[[PageKey], bool]) -> None:
        self._page_size = params.page_size
        self._recorder = KVCacheEventRecorder(
            enabled=True,
            page_size=params.page_size,
            dynamo_format=params.dynamo_kv_event_format,
            lora_names=params.kv_event_lora_names,
        )
        self._is_known = is_known
        self._learnt: OrderedDict[PageKey, BlockName] = OrderedDict()
        """Names of pages in a namespace; swept in rotation."""
        self._namesakes: dict[int, list[PageKey]] = {}
        """Pages per block hash that several may have, because SGLang's hash leaves out the `extra_key`."""
        self._tokens: OrderedDict[PageKey, Tokens] = OrderedDict()

    def name(self, key: PageKey) -> BlockName:
        return self._learnt.get(key) or BlockName(block_hash(key))

    def tokens(self, key: PageKey) -> Tokens | None:
        """Tokens of the page; None if they are not remembered."""
        return self._tokens.get(key)

    def namesakes(self, key: PageKey) -> list[PageKey]:
        """Other pages that may have the same block hash."""
        if not self._namesakes:
            return []
        return [other for other in self._namesakes.get(self.name(key).block_hash, ()) if other != key]

    def learn(self, keys: Sequence[PageKey], prompt: RadixKey) -> list[PageKey]:
        """`keys` are the keys of the pages of `prompt`, from its start; returns the pages that this renames.

        Hashes nothing if nothing is new.
        """
        keys = keys[: len(prompt) // self._page_size]
        self._remember_tokens(keys, prompt)
        if prompt.extra_key is None and prompt.cache_salt is None:
            return []
        if not (missing := len(keys) - _first_unknown(keys, self._learnt)):
            return []
        self._sweep(SWEPT * missing)  # May forget some of `keys`, which are learnt again.
        first = _first_unknown(keys, self._learnt)
        node = self._node(prompt, first, len(keys))
        self._recorder.record_store(node)
        names = [name for event in self._recorder.take() for name in _names(event)]
        digests = map(bytes.fromhex, node.event_hash_value or ())
        named = zip(keys[first:], names, digests, strict=True)
        return [key for key, name, digest in named if self._call(key, name, digest)]

    def _remember_tokens(self, keys: Sequence[PageKey], prompt: RadixKey) -> None:
        tokens, size = prompt.token_ids, self._page_size
        for page in range(_first_unknown(keys, self._tokens), len(keys)):
            first, end = page * size, (page + 1) * size
            own = tokens[first:end]
            self._tokens[keys[page]] = list(pairwise(tokens[first : end + 1])) if prompt.is_bigram else own
        while len(self._tokens) > TOKENS_REMEMBERED:
            self._tokens.popitem(last=False)

    def _call(self, key: PageKey, name: BlockName, digest: bytes) -> bool:
        """`digest`: hash of the tokens without the `extra_key`, which is the key of that page in no namespace."""
        is_new = self.name(key).block_hash != name.block_hash
        self._learnt[key] = name
        if key != digest and block_hash(digest) == name.block_hash:
            namesakes = self._namesakes.setdefault(name.block_hash, [digest])
            if key not in namesakes:
                namesakes.append(key)
        return is_new

    def _node(self, prompt: RadixKey, first: int, end: int) -> _Node:
        """A node with the pages `first` to `end`, under one with the pages before them."""
        size, parent = self._page_size, _ROOT
        if first:
            parent = _Node(prompt[: first * size], _ROOT)
            parent.event_hash_value = compute_node_event_hash_values(parent, size)
        return _Node(prompt[first * size : end * size], parent)

    def _sweep(self, count: int) -> None:
        """Forget names that are no longer needed, among the `count` that were checked longest ago."""
        for _ in range(min(count, len(self._learnt))):
            key, name = self._learnt.popitem(last=False)
            if self._is_known(key):
                self._learnt[key] = name
            elif key in (namesakes := self._namesakes.get(name.block_hash, [])):
                namesakes.remove(key)
                if len(namesakes) == 1:
                    del self._namesakes[name.block_hash]


def _first_unknown(keys: Sequence[PageKey], known: Mapping[PageKey, object]) -> int:
    return next((page for page, key in enumerate(keys) if key not in known), len(keys))


def block_hash(digest: bytes) -> int:
    """SGLang's name in its events for the page with this hash."""
    return int.from_bytes(digest[:8], signed=True)


def _names(event: BlockStored) -> list[BlockName]:
    return [BlockName(block, event.cache_salt, event.lora_name) for block in event.block_hashes]
