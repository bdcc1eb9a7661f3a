"""What a server that decodes for others saves, and which models it is refused for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.cached_attention.answers import AnswersLinker, AnswersTreeLink
from sglang.srt.mem_cache.cached_attention.linker import CachedAttentionLinker, PathTransfer
from sglang.srt.mem_cache.cached_attention.lower_tiers import LowerTiers
from sglang.srt.mem_cache.cached_attention.pools import UnsupportedModelError
from sglang.srt.mem_cache.cached_attention.states import StatesLinker
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper

PAGE = 16
DECODE: Any = SimpleNamespace(disaggregation_mode="decode")


def request(prompt: int, retracted: bool = False) -> Any:
    return SimpleNamespace(origin_input_ids=range(prompt), retracted_stain=retracted)


def tree_link(is_eagle: bool = False) -> AnswersTreeLink:
    link = AnswersTreeLink.__new__(AnswersTreeLink)
    link.cache = SimpleNamespace(page_size=PAGE, tree_core=SimpleNamespace(is_eagle=is_eagle))
    link.cache_linker = object.__new__(AnswersLinker)
    link.cache_linker.has_draft = is_eagle
    return link


def node(first: int, pages: int) -> PathTransfer:
    hashes = [f"{number:064x}" for number in range(first + pages)]
    slots = torch.arange(pages * PAGE)
    return PathTransfer(PoolName.KV, None, slots, hashes[first:], prefix_hashes=hashes[:first])


@pytest.fixture
def offloaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Nodes that were handed to upstream's wrapper to be saved."""
    nodes: list[Any] = []
    monkeypatch.setattr(
        UnifiedCacheLinkerWrapper, "_offload_node", lambda _link, node_id, _transfers: nodes.append(node_id)
    )
    return nodes


@pytest.mark.parametrize(
    ("prompt", "saved"),
    [
        (5 * PAGE, ["answer"]),
        (5 * PAGE + 3, ["answer"]),  # The last page of the prompt ends with the first tokens of the answer.
        (PAGE - 1, ["before", "prompt", "answer"]),
        (0, ["before", "prompt", "answer"]),
    ],
)
def test_pages_of_the_prompt_are_not_saved(offloaded: list[Any], prompt: int, saved: list[str]) -> None:
    link = tree_link()
    link.checkpoints(request(prompt))
    for name, transfer in (("before", node(0, 3)), ("prompt", node(3, 2)), ("answer", node(5, 2))):
        link._offload_node(name, [transfer])
    assert offloaded == saved


@pytest.mark.parametrize(("prompt", "retracted", "saved"), [(5 * PAGE, False, [4, 5]), (5 * PAGE, True, [])])
def test_with_a_draft_model_the_last_page_of_the_prompt_may_belong_to_the_answer(
    offloaded: list[Any], prompt: int, retracted: bool, saved: list[int]
) -> None:
    """Where a token is named together with the next; and what was retracted has no KV of the draft model."""
    link = tree_link(is_eagle=True)
    link.checkpoints(request(prompt, retracted))
    for first in range(6):
        link._offload_node(first, [node(first, 1)])
    assert offloaded == saved


def test_after_an_update_of_the_weights_answers_stay_here() -> None:
    log: list[str] = []
    linker: Any = object.__new__(AnswersLinker)
    config: Any = SimpleNamespace(disk_path=None)
    identity: Any = SimpleNamespace(updated=lambda: None, shared_fingerprint=lambda: "name")
    linker._lower = [LowerTiers(config, identity, ".", int)]
    remote = SimpleNamespace(pause=lambda: log.append("pause"), serve=log.append)
    linker.store = SimpleNamespace(remote=remote, disk=None, reset=lambda: log.append("reset"))
    linker.layer_done_counter = SimpleNamespace(reset=lambda: None)
    linker.reset()
    linker.weights_changed()
    linker.reset()
    assert log == ["reset", "name", "pause", "reset"]


def test_sglang_gets_the_linker_of_its_kind_of_server() -> None:
    def made(mode: str, *components: ComponentType) -> type:
        args: Any = SimpleNamespace(disaggregation_mode=mode)
        return type(
            CachedAttentionLinker.__new__(
                CachedAttentionLinker, args, components={ComponentType.FULL, *components}
            )
        )

    assert made("decode") is AnswersLinker
    assert made("decode", ComponentType.MAMBA) is AnswersLinker
    assert made("prefill", ComponentType.MAMBA) is StatesLinker
    assert made("null") is made("prefill") is CachedAttentionLinker


@pytest.mark.parametrize("component", [ComponentType.MAMBA, ComponentType.SWA])
def test_states_and_windows_are_refused(component: ComponentType) -> None:
    nothing: Any = None
    with pytest.raises(UnsupportedModelError, match="decode without the flag"):
        AnswersLinker(DECODE, nothing, components={ComponentType.FULL, component}, extra_config={})
