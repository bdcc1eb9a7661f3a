"""Which linker a model with sliding windows gets, which pool its layers read, and what is saved of them."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchResult
from sglang.srt.mem_cache.cached_attention.hybrid import HybridTreeLink
from sglang.srt.mem_cache.cached_attention.layer_events import LayerEvents
from sglang.srt.mem_cache.cached_attention.linker import CachedAttentionLinker, PathTransfer
from sglang.srt.mem_cache.cached_attention.mla_dedup import MlaDedupLinker
from sglang.srt.mem_cache.cached_attention.pools import UnsupportedModelError
from sglang.srt.mem_cache.cached_attention.states import StatesLinker
from sglang.srt.mem_cache.cached_attention.tree_link import TreeLink
from sglang.srt.mem_cache.cached_attention.windows import WindowsLinker, WindowsTreeLink
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import ExternalCacheHitMarker
from sglang.srt.mem_cache.utils import get_storage_hash_str

from cached_attention.chain import PageRun

WINDOWED = {ComponentType.FULL, ComponentType.SWA}
PAGE = 64
ALONE: Any = SimpleNamespace(disaggregation_mode="null")


def hashes(count: int) -> list[str]:
    return [f"{page:064x}" for page in range(count)]


def test_the_model_decides_on_the_linker() -> None:
    for kind in (CachedAttentionLinker, WindowsLinker):
        assert type(kind.__new__(CachedAttentionLinker, ALONE, components=WINDOWED)) is WindowsLinker
    both = {*WINDOWED, ComponentType.MAMBA}
    # Which refuses it, see `pools.device_pool`.
    assert type(CachedAttentionLinker.__new__(CachedAttentionLinker, ALONE, components=both)) is StatesLinker


def test_windows_are_not_broadcast() -> None:
    nothing: Any = None
    with pytest.raises(UnsupportedModelError, match=r"windows are not broadcast\. Leave --cached-attention-mla-"):
        MlaDedupLinker(nothing, nothing, components=WINDOWED)


class Layer:
    def __init__(self, name: str, log: list[str]) -> None:
        self._name = name
        self._log = log

    def wait(self, stream: Any = None) -> None:
        self._log.append(self._name)


def test_each_layer_waits_for_what_it_reads() -> None:
    log: list[str] = []
    linker: Any = object.__new__(WindowsLinker)
    linker._kv_cache = SimpleNamespace(layers_mapping={1: (0, False), 3: (1, False), 0: (0, True), 2: (1, True)})
    assert linker._order_layers() == 4
    linker._kv_cache.layers_mapping[5] = (2, False)
    with pytest.raises(UnsupportedModelError, match="neither full attention nor a window"):
        linker._order_layers()
    linker.layer_done_counter = LayerEvents(4)
    linker.on_cpu = True
    windows = SimpleNamespace(layers=[Layer("window 0", log), Layer("window 1", log)])
    linker.store = SimpleNamespace(start_tail_load=lambda batch, after: windows)
    batch = linker.layer_done_counter.next_batch()
    linker._hand_out(batch, [Layer("kv 0", log), Layer("kv 1", log)])
    linker.layer_done_counter.set_consumer(batch)
    assert log == []
    for layer in range(4):
        linker.layer_done_counter.wait_until(layer)
    assert log == ["window 0", "kv 0", "window 1", "kv 1", "window 1"], "and with the last layer for all"


@pytest.mark.parametrize(
    ("prefix", "own", "kept", "parent", "first"),
    [
        (3, 4, 2, 4, 5),
        (3, 4, 4, 2, 3),
        (0, 4, 3, 0, 1),
        (0, 4, 4, None, 0),
    ],
    ids=["of the end", "of the whole node", "of the end of a prompt", "of a whole prompt"],
)
def test_the_windows_of_a_node_are_its_last_pages(
    prefix: int, own: int, kept: int, parent: int | None, first: int
) -> None:
    linker: Any = object.__new__(WindowsLinker)
    linker.on_cpu = True
    saved: list[tuple[PageRun | None, Any, PageRun]] = []
    linker.store = SimpleNamespace(save=lambda *save: saved.append(save))
    keys, slots = hashes(prefix + own), torch.arange(kept * PAGE)
    node = PathTransfer(PoolName.KV, None, torch.arange(own * PAGE), keys[prefix:], prefix_hashes=keys[:prefix])
    whole = PoolTransfer(PoolName.KV, None, torch.arange((prefix + own) * PAGE), keys)
    windows = PoolTransfer(PoolName.SWA, None, slots, keys[-kept:])
    expected = PageRun(
        None if parent is None else bytes.fromhex(keys[parent]),
        first,
        list(map(bytes.fromhex, keys[-kept:])),
        slots,
    )
    # Also where the store had lost what comes before, and gets the whole path.
    for kv in (node, whole):
        assert linker.offload([kv, windows])
        (kv_run, _, run) = saved.pop()
        assert kv_run is not None
        assert run == expected
    assert linker.offload([node])
    assert saved.pop()[2] is None


@pytest.mark.parametrize(("pages", "known", "tokens"), [(5, 0, 128), (1, 0, 64), (5, 640, 640)])
def test_a_hit_takes_as_many_slots_of_windows_as_it_needs(
    monkeypatch: pytest.MonkeyPatch, pages: int, known: int, tokens: int
) -> None:
    link: Any = WindowsTreeLink.__new__(WindowsTreeLink)
    link.cache = SimpleNamespace(page_size=PAGE)
    link.cache_linker = SimpleNamespace(span=2)
    link.hit_markers = {}
    monkeypatch.setattr(TreeLink, "match", lambda link, key, req, result: result)

    nothing: Any = None
    request: Any = SimpleNamespace(rid="request")
    result = MatchResult(nothing, nothing, nothing, nothing, swa_host_hit_length=known)
    assert link.match(nothing, request, result) == result
    link.hit_markers["request"] = ExternalCacheHitMarker(hashes(pages), 0)
    assert link.match(nothing, request, result).swa_host_hit_length == tokens


def test_a_prompt_leaves_a_window_where_it_parts_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    link: Any = WindowsTreeLink.__new__(WindowsTreeLink)
    link.cache, link.hit_markers = SimpleNamespace(page_size=PAGE), {}
    nothing: Any = None
    request: Any = SimpleNamespace(rid="request")

    def match(parting: int, on_device: int | None) -> int | None:
        def match_pages(link: Any, key: Any, req: Any, result: MatchResult) -> MatchResult:
            link._parting = parting
            return result

        monkeypatch.setattr(TreeLink, "match", match_pages)
        result = MatchResult(nothing, nothing, nothing, nothing, swa_branching_seqlen=on_device)
        return link.match(nothing, request, result).swa_branching_seqlen

    assert match(0, None) is None
    assert match(0, 256) == 256
    assert match(5, None) == 320
    assert match(5, 512) == 512


@pytest.mark.parametrize(("window", "span", "chain"), [(95, 2, 16), (128, 2, 16), (129, 3, 16), (8191, 128, 128)])
def test_a_window_is_whole_pages(monkeypatch: pytest.MonkeyPatch, window: int, span: int, chain: int) -> None:
    monkeypatch.setattr("sglang.srt.mem_cache.cached_attention.windows.window_pool", lambda params: "pool")
    linker: Any = object.__new__(WindowsLinker)
    assert linker._trailing_pool(SimpleNamespace(swa_retain_window=window, page_size=PAGE)) == "pool"
    assert (linker.span, linker.chain_pages) == (span, chain)


class Tree:
    """A prompt of six pages in two nodes, the last of them of two, with windows in slots 1000 further on."""

    def __init__(self) -> None:
        self.key = RadixKey(array("q", range(6 * PAGE)), None)
        self.hashes = get_storage_hash_str(self.key, None, page_size=PAGE)
        self.offloaded: list[list[Any]] = []
        self.link: Any = WindowsTreeLink.__new__(WindowsTreeLink)
        self.link.pending_offloads = []
        self.link.cache_linker = SimpleNamespace(span=2, offload=self.offloaded.append)
        core = SimpleNamespace(get_prefix_hash_values=lambda node: self.hashes[:4], is_eagle=False)
        allocator = SimpleNamespace(translate_loc_from_full_to_swa=lambda slots: slots + 1000)
        self.link.cache = SimpleNamespace(
            page_size=PAGE,
            tree_core=core,
            token_to_kv_pool_allocator=allocator,
            path_device_indices=lambda node: torch.arange(6 * PAGE),
            inc_lock_ref=lambda node: SimpleNamespace(to_dec_params=lambda: "lock"),
        )

    def insert(self, *adopted: tuple[int, int], saved: int = 0) -> None:
        params: Any = SimpleNamespace(key=self.key, track_adopted_ranges=False)
        ranges = {ComponentType.SWA: list(adopted)} if adopted else None
        with self.link.inserting(params):
            self.link._saved_tokens += saved
        assert params.track_adopted_ranges
        self.link.inserted(params, SimpleNamespace(last_device_node=7, adopted_ranges=ranges))


@pytest.mark.parametrize(
    ("start", "saved", "first"), [(0, 0, 4), (0, PAGE, 4), (5 * PAGE, 0, 5), (4 * PAGE + 1, 0, 5)]
)
def test_windows_that_come_after_the_pages_of_their_nodes_are_saved_by_themselves(
    start: int, saved: int, first: int
) -> None:
    tree = Tree()
    tree.insert((0, 10), (start, 6 * PAGE), saved=saved)
    ((windows,),) = tree.offloaded
    assert (windows.name, windows.keys) == (PoolName.SWA, tree.hashes[first:])
    assert windows.prefix_hashes == tree.hashes[:first]
    assert windows.device_indices.tolist() == list(range(1000 + first * PAGE, 1000 + 6 * PAGE))
    assert tree.link.pending_offloads == [(7, "lock", [])]
    linker: Any = object.__new__(WindowsLinker)
    run = linker._trailing_run(None, windows)
    assert (run.parent, run.first_page) == (bytes.fromhex(tree.hashes[first - 1]), first)


def test_windows_are_not_saved_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = Tree()
    tree.insert()
    tree.insert((0, 6 * PAGE), saved=2 * PAGE)
    tree.insert((5 * PAGE, 6 * PAGE), saved=PAGE)
    # Not the end of what was inserted: nobody goes on from there.
    tree.insert((0, 5 * PAGE))
    assert tree.offloaded == []
    monkeypatch.setattr(HybridTreeLink, "_offload_node", lambda link, node, transfers: None)
    tree.link._saved_tokens = 0
    windows = SimpleNamespace(device_indices=torch.arange(PAGE))
    tree.link._offload_node(7, ["KV", windows])
    tree.link._offload_node(8, ["KV"])
    assert tree.link._saved_tokens == PAGE
