"""What a server that decodes for others saves, and which models it is refused for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.cached_attention.answers import AnswersLinker, AnswersTreeLink
from sglang.srt.mem_cache.cached_attention.linker import CachedAttentionLinker, PathTransfer
from sglang.srt.mem_cache.cached_attention.pools import UnsupportedModelError
from sglang.srt.mem_cache.cached_attention.states import StatesLinker
from sglang.srt.mem_cache.hicache_storage import PoolName
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import UnifiedCacheLinkerWrapper

PAGE = 16
DECODE: Any = SimpleNamespace(disaggregation_mode="decode")


def node(first: int, pages: int) -> PathTransfer:
    hashes = [f"{number:064x}" for number in range(first + pages)]
    slots = torch.arange(pages * PAGE)
    return PathTransfer(PoolName.KV, None, slots, hashes[first:], prefix_hashes=hashes[:first])


@pytest.mark.parametrize(
    ("prompt", "saved"),
    [
        (5 * PAGE, ["answer"]),
        (5 * PAGE + 3, ["answer"]),  # The last page of the prompt ends with the first tokens of the answer.
        (PAGE - 1, ["before", "prompt", "answer"]),
        (0, ["before", "prompt", "answer"]),
    ],
)
def test_pages_of_the_prompt_are_not_saved(
    monkeypatch: pytest.MonkeyPatch, prompt: int, saved: list[str]
) -> None:
    offloaded: list[Any] = []
    monkeypatch.setattr(
        UnifiedCacheLinkerWrapper, "_offload_node", lambda _link, node_id, _transfers: offloaded.append(node_id)
    )
    link = AnswersTreeLink.__new__(AnswersTreeLink)
    link.cache = SimpleNamespace(page_size=PAGE)
    link.cache_linker = AnswersLinker.__new__(AnswersLinker, DECODE, components=set())
    request: Any = SimpleNamespace(origin_input_ids=range(prompt))
    link.checkpoints(request)
    for name, transfer in (("before", node(0, 3)), ("prompt", node(3, 2)), ("answer", node(5, 2))):
        link._offload_node(name, [transfer])
    assert offloaded == saved


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
