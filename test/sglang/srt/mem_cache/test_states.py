"""Which linker a hybrid model gets, what it goes together with, and which pool each of its layers reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.cached_attention.hybrid import form_of
from sglang.srt.mem_cache.cached_attention.layer_events import LayerEvents
from sglang.srt.mem_cache.cached_attention.linker import CachedAttentionLinker
from sglang.srt.mem_cache.cached_attention.lower_tiers import LowerTiers
from sglang.srt.mem_cache.cached_attention.mla_dedup import MlaDedupLinker
from sglang.srt.mem_cache.cached_attention.pools import UnsupportedModelError
from sglang.srt.mem_cache.cached_attention.ranks import Ranks
from sglang.srt.mem_cache.cached_attention.states import StatesLinker, StatesTreeLink, _kv_before
from sglang.srt.mem_cache.cached_attention.tree_link import TreeLink
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import _PendingOffload

from cached_attention.chain import Chain
from cached_attention.layout import DevicePool

FULL = {ComponentType.FULL}
HYBRID = {ComponentType.FULL, ComponentType.MAMBA}
ALONE: Any = SimpleNamespace(disaggregation_mode="null")


def test_the_model_decides_on_the_linker() -> None:
    for kind in (CachedAttentionLinker, StatesLinker):
        assert type(kind.__new__(CachedAttentionLinker, ALONE, components=HYBRID)) is StatesLinker
    plain = CachedAttentionLinker.__new__(CachedAttentionLinker, ALONE, components=FULL)
    assert type(plain) is CachedAttentionLinker
    assert type(MlaDedupLinker.__new__(MlaDedupLinker, ALONE, components=HYBRID)) is MlaDedupLinker


def test_states_are_not_broadcast() -> None:
    nothing: Any = None
    with pytest.raises(UnsupportedModelError, match=r"not broadcast\. Leave --cached-attention-mla-dedup out"):
        MlaDedupLinker(nothing, nothing, components=HYBRID)


def test_a_layer_waits_for_the_keys_and_values_up_to_it() -> None:
    assert _kv_before({1: 0, 4: 1}, 0) == [None, 0, 0, 0, 1]
    assert _kv_before({5: 0, 6: 1}, 5) == [0, 1]


def test_states_of_another_type_are_other_states() -> None:
    def pool(dtype: torch.dtype, *shape: int) -> DevicePool:
        return DevicePool([[torch.zeros(3, *shape, dtype=dtype)]], 1)

    forms = {
        form_of(pool(torch.float16, 4, 2)),
        form_of(pool(torch.bfloat16, 4, 2)),
        form_of(pool(torch.float16, 2, 4)),
    }
    assert len(forms) == 3


class Layer:
    def __init__(self, name: str, log: list[str]) -> None:
        self._name = name
        self._log = log

    def wait(self, stream: Any = None) -> None:
        self._log.append(self._name)


def test_the_forward_has_its_states_before_it_begins() -> None:
    log: list[str] = []
    linker = object.__new__(StatesLinker)
    linker._kv_before = [None, 0, 0, 1]
    linker.layer_done_counter = LayerEvents(4)
    states = SimpleNamespace(layers=[Layer("state 0", log), Layer("state 1", log)])
    linker.store = SimpleNamespace(start_tail_load=lambda batch, after: states)
    linker.on_cpu = True
    batch = linker.layer_done_counter.next_batch()
    linker._hand_out(batch, [Layer("kv 0", log), Layer("kv 1", log)])
    linker.layer_done_counter.set_consumer(-1)
    assert log == []
    linker.layer_done_counter.set_consumer(batch)
    assert log == ["state 1"]
    for layer in range(4):
        linker.layer_done_counter.wait_until(layer)
    assert log == ["state 1", "kv 0", "kv 0", "kv 1"]
    linker.layer_done_counter.discard(batch)
    linker.layer_done_counter.set_consumer(batch)
    assert len(log) == 4


class Tree:
    """A tree whose node 7 has a state, and what the link saves of it."""

    def __init__(self) -> None:
        self.locked: list[int] = []
        self.offloaded: list[list[Any]] = []
        self.link: Any = StatesTreeLink.__new__(StatesTreeLink)
        self.link._with_state = set()
        self.link.pending_offloads = []
        self.free, self.kv_is_kept = 20, True
        tree = SimpleNamespace(
            get_component_device_value=lambda node, kind: f"slot of {node}",
            build_external_linker_offload_transfers=lambda node: None if self.kv_is_kept else ["KV"],
        )
        slots = SimpleNamespace(
            mamba_allocator=SimpleNamespace(available_size=lambda: self.free),
            available_size=lambda: 2,
            mamba_initial_tracking_slots=2,
        )
        self.link.cache = SimpleNamespace(
            tree_core=tree,
            get_last_hash_value=lambda node: f"hash of {node}",
            inc_lock_ref=self.lock,
            mamba_evictable_size=lambda: 0,
            req_to_token_pool=slots,
        )
        self.link.cache_linker = SimpleNamespace(offload=self.offloaded.append)

    def lock(self, node: int) -> Any:
        self.locked.append(node)
        return SimpleNamespace(to_dec_params=lambda: "lock")

    def insert(self, state: Any = "slot", exists: bool = False) -> None:
        self.link.inserted(
            SimpleNamespace(mamba_value=state), SimpleNamespace(mamba_exist=exists, last_device_node=7)
        )


def test_a_state_that_comes_after_the_pages_of_its_node_is_saved_by_itself() -> None:
    tree = Tree()
    tree.insert()
    ((state,),) = tree.offloaded
    assert (state.name, state.device_indices, state.keys) == (PoolName.MAMBA, "slot of 7", ["hash of 7"])
    assert tree.link.pending_offloads == [(7, "lock", [])]
    assert tree.locked == [7]


def test_nothing_is_kept_from_requests_to_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests may yet run, of three slots each, one may go on, and one save runs."""
    tree = Tree()
    kept: list[list[Any]] = []
    monkeypatch.setattr(TreeLink, "_offload_node", lambda link, node, transfers: kept.append(transfers))
    tree.link.pending_offloads = ["a save"]
    tree.free = 8
    tree.insert()
    tree.link._offload_node(7, ["KV", "state"])
    assert (tree.offloaded, tree.locked, kept, tree.link._with_state) == ([], [], [], set())
    tree.free = 9
    tree.link._offload_node(7, ["KV"])
    assert tree.link._with_state == set()
    tree.link._offload_node(7, ["KV", "state"])
    assert kept == [["KV"], ["KV", "state"]]
    assert tree.link._with_state == {7}


def test_a_state_waits_for_pages_that_could_not_be_saved() -> None:
    tree = Tree()
    tree.kv_is_kept = False
    tree.insert()
    assert tree.offloaded == []


def test_a_prompt_leaves_a_state_where_it_parts_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.mem_cache.cached_attention.states.mamba_checkpoint_grid", lambda page: 128)
    tree = Tree()
    tree.link.cache.page_size = 64
    branches = []
    for parting, on_device in ((0, None), (0, 256), (5, None), (5, 512), (1, None)):
        tree.link._parting = parting
        branches.append(tree.link._branch(on_device))
    assert branches == [None, 256, 256, 512, None]


class Kept:
    """A store with `known` pages of a prompt, states after `ends`, and prompts that go on after `partings`."""

    def __init__(self, *ends: int, partings: Sequence[int] = (), known: int = 10) -> None:
        self._ends = ends
        self._partings = partings
        self._known = known
        self.reserved: list[tuple[str, int]] = []
        self.arrived: list[int | None] = []

    def restorable_pages(self, chain: Chain) -> int:
        return self._known

    def held_ends(self, chain: Chain, pages: int, on_device: int = 0) -> Iterator[int]:
        return self.ends(chain, pages, on_device)

    def arrive(self, request: str, chain: Chain, on_device: int, end: int | None) -> None:
        self.arrived.append(end)

    def ends(self, chain: Chain, pages: int, on_device: int) -> Iterator[int]:
        return (end for end in self._ends if on_device < end <= pages)

    def reserve_tail(self, request: str, chain: Chain, end: int, on_device: int) -> None:
        self.reserved.append((request, end))

    def is_followed(self, key: bytes) -> bool:
        return key[0] in self._partings


@pytest.mark.parametrize(
    ("kept", "on_device", "end", "parting"),
    [
        (Kept(10, 4), 0, 10, 0),
        (Kept(7, 4), 0, 7, 0),
        (Kept(7, 4, partings=[9]), 0, 7, 10),
        (Kept(4), 10, 0, 0),
        (Kept(partings=[9]), 3, 0, 10),
        (Kept(4, partings=[4, 9]), 0, 4, 10),
    ],
    ids=["at the end", "before the end", "where others go on", "on the device", "none", "not all in host memory"],
)
def test_a_prompt_goes_on_from_the_last_state(kept: Kept, on_device: int, end: int, parting: int) -> None:
    tree = Tree()
    tree.link.cache.tp_world_size = 1
    tree.link.cache_linker = SimpleNamespace(store=kept)
    tree.link.ranks = Ranks(lambda rid, may_give_up: True)
    tree.link._parting = 0
    chain = Chain([bytes([page]) for page in range(10)])
    # In host memory; where there is more, its own next page is no other prompt's.
    pages = 5 if kept._partings == [4, 9] else 10
    assert tree.link._agree(SimpleNamespace(rid="request"), chain, pages, on_device) == end
    assert tree.link._parting == parting
    assert kept.reserved == ([("request", end)] if end else [])


def test_ranks_bring_up_a_state_that_all_of_them_have() -> None:
    """Each has a longer one that the other lacks."""
    tree, others = Tree(), {4, 9}

    def common(here: list[int], num_pages: int, device_hit_pages: int) -> int:
        assert num_pages == 10
        return max((end for end in here if end in others and end > device_hit_pages), default=0)

    tree.link._sync_restorable_prefix = common
    tree.link.ranks = Ranks(lambda rid, may_give_up: True)
    kept = Kept(10, 4)
    tree.link.cache.tp_world_size = 2
    tree.link.cache_linker = SimpleNamespace(store=kept)
    chain = Chain([bytes([page]) for page in range(10)])
    tree.link._arrive(SimpleNamespace(rid="request"), chain, 0)
    assert kept.arrived == [4]
    # On the device there is more than they have in common: that stays.
    tree.link._arrive(SimpleNamespace(rid="request"), chain, 6)
    assert kept.arrived == [4, 4]
    tree.link.cache.tp_world_size = 1
    tree.link._arrive(SimpleNamespace(rid="request"), chain, 0)
    assert kept.arrived == [4, 4, None]


class Disks:
    """A store, or that of its states, that says what becomes of its disk."""

    def __init__(self, name: str, log: list[str], has_disk: bool, trailing: Any = None) -> None:
        self._name = name
        self._log = log
        self.disk = object() if has_disk else None
        self.trailing = trailing
        self.remote = None

    def reset(self) -> None:
        self._log.append(f"reset {self._name}")
        if self.trailing is not None:
            self.trailing.reset()

    def replace_disk(self, open_disk: Any) -> None:
        self._log.append(f"replace {self._name}")

    def detach_disk(self) -> None:
        if self.disk is not None:
            self._log.append(f"detach {self._name}")
        if self.trailing is not None:
            self.trailing.detach_disk()


def linker_of(kv: Disks, has_changed: bool) -> Any:
    """Linker of the store `kv` and the one of its states."""
    config: Any = SimpleNamespace(disk_path="/somewhere")
    identity: Any = SimpleNamespace(has_changed=lambda: has_changed)
    linker: Any = object.__new__(StatesLinker)
    linker.store = kv
    linker._lower = [LowerTiers(config, identity, name, int) for name in ("kv", "states")]
    linker.layer_done_counter = LayerEvents(1)
    return linker


@pytest.mark.parametrize("has_kv", [True, False])
@pytest.mark.parametrize("has_states", [True, False])
@pytest.mark.parametrize("has_changed", [True, False])
def test_whichever_disk_is_missing_both_stores_forget_and_leave_theirs(
    has_kv: bool, has_states: bool, has_changed: bool
) -> None:
    log: list[str] = []
    states = Disks("states", log, has_states)
    linker = linker_of(Disks("kv", log, has_kv, states), has_changed)
    linker.reset()
    assert ("replace kv" in log, "reset kv" in log) == (has_changed or not has_kv, has_kv and not has_changed)
    assert log[-1] == ("replace states" if has_changed or not has_states else "reset states")
    log.clear()
    linker._pause_lower_tiers()
    assert ("detach kv" in log, "detach states" in log) == (has_kv, has_states)


def test_a_disk_that_fails_during_a_reset_is_left_alone() -> None:
    """Opened again at once, it would hold up the scheduler once more."""
    log: list[str] = []
    states = Disks("states", log, has_disk=True)
    states.reset = lambda: setattr(states, "disk", None)  # type: ignore[method-assign]
    linker = linker_of(Disks("kv", log, has_disk=True, trailing=states), has_changed=False)
    linker.reset()
    assert log == ["reset kv"]


def test_a_state_that_was_saved_with_its_pages_or_is_not_new_is_not_saved_again() -> None:
    tree = Tree()
    tree.insert(exists=True)
    tree.insert(state=None)
    tree.link._with_state.add(7)
    tree.insert()
    assert tree.offloaded == []
    tree.insert()
    assert len(tree.offloaded) == 1


def test_ranks_that_lost_much_of_a_prompt_still_have_the_rest_in_common() -> None:
    """Each tells of its last ends only: these are ends that all ranks have the pages of."""
    tree = Tree()
    tree.link.cache.tp_world_size = 2
    tree.link.ranks = Ranks(lambda rid, may_give_up: True, lambda numbers: numbers.clamp_(max=100))
    told: list[int] = []
    tree.link._sync_restorable_prefix = lambda here, num_pages, device_hit_pages: told.extend(here) or 0
    tree.link.cache_linker = SimpleNamespace(store=Kept(*range(1000, 0, -1), known=1000))
    chain = Chain([bytes(2)] * 1000)
    tree.link._parting = 0
    tree.link._agree(SimpleNamespace(rid="request"), chain, 1000, 0)
    assert told == list(range(100, 36, -1))
    told.clear()
    tree.link._arrive(SimpleNamespace(rid="request"), chain, 40)
    assert told == [*range(100, 40, -1), *range(100, 36, -1)]


def test_a_split_node_is_marked_by_the_save_of_its_pages() -> None:
    """Which may come after one of a state only."""
    tree = Tree()
    tree.link.pending_offloads = [_PendingOffload(7, "lock", []), _PendingOffload(7, "lock", [7])]
    tree.link.replace_pending_offload_node(7, 7, [8, 7])
    assert [save.publish_node_ids for save in tree.link.pending_offloads] == [[], [8, 7]]
    tree.link.replace_pending_offload_node(7, 8, [9, 8])
    assert [save.publish_node_ids for save in tree.link.pending_offloads] == [[], [7, 9, 8]]
    tree.link.replace_pending_offload_node(6, 8, [10, 8])
    assert [save.publish_node_ids for save in tree.link.pending_offloads] == [[], [7, 9, 8]]
