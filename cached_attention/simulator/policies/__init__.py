"""Policies by name."""

from __future__ import annotations

from cached_attention.index import PageIndex, Residency
from cached_attention.policy.demand import WaitingOrder
from cached_attention.policy.eviction import EvictionOrder
from cached_attention.simulator.policies.base import LeafOrder, MakeOrder, Policy
from cached_attention.simulator.policies.belady import Belady
from cached_attention.simulator.policies.fifo import ConversationsFirstInFirstOut, FirstInFirstOut
from cached_attention.simulator.policies.frequency import LeastFrequentlyUsed
from cached_attention.simulator.policies.nothing import KeepNothing
from cached_attention.simulator.policies.recency import LeastRecentlyUsed
from cached_attention.simulator.policies.s3fifo import S3Fifo
from cached_attention.simulator.policies.segmented import SegmentedLru
from cached_attention.simulator.policies.tail import TailOptimisedLru

__all__ = ["POLICIES", "LeafOrder", "MakeOrder", "Policy"]


def _online(name: str, label: str, order: MakeOrder, **traits: bool) -> Policy:
    return Policy(name, label, lambda _requests: order, **traits)


def _engine_order(index: PageIndex, tier: Residency, waiting: WaitingOrder, _capacity: int) -> EvictionOrder:
    """Without learning: LRU among pages that no waiting request needs."""
    return EvictionOrder(index, tier, waiting)


POLICIES = {
    policy.name: policy
    for policy in (
        _online("ours", "look-ahead, learnt", _engine_order, looks_ahead=True, fetches_ahead=True, learns=True),
        _online("ours-lru", "look-ahead, LRU", _engine_order, looks_ahead=True, fetches_ahead=True),
        _online("lru", "LRU", LeastRecentlyUsed),
        _online("sglang", "SGLang's LRU", LeastRecentlyUsed, refreshes=True),
        _online("fifo", "FIFO", FirstInFirstOut),
        _online("session-fifo", "FIFO of conversations", ConversationsFirstInFirstOut),
        _online("lfu", "LFU", LeastFrequentlyUsed),
        _online("slru", "SLRU", SegmentedLru),
        _online("s3-fifo", "S3-FIFO", S3Fifo),
        _online("t-lru", "T-LRU", TailOptimisedLru),
        _online("fetching-lru", "LRU, fetched ahead", LeastRecentlyUsed, fetches_ahead=True),
        _online("fetching-fifo", "FIFO, fetched ahead", ConversationsFirstInFirstOut, fetches_ahead=True),
        _online("none", "recompute", KeepNothing),
        Policy("optimum", "optimum", Belady.of),
    )
}
"""All policies that can be simulated; `lru` and `optimum` bound the gap that the others close."""
