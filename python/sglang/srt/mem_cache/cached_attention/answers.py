"""On a server that decodes for others: answers go to the remote store, where the next turn finds them.

SGLang looks nothing up on such a server, so nothing is loaded there. Prompts are saved where they were computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from .linker import CachedAttentionLinker
from .pools import refuse
from .tree_link import TreeLink

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import NodeId


class AnswersLinker(CachedAttentionLinker):
    """Host memory is only what the pages pass through on their way."""

    only_saves = True

    def __init__(
        self, server_args: Any, params: CacheInitParams, *, components: set[ComponentType], **options: Any
    ) -> None:
        if components & {ComponentType.MAMBA, ComponentType.SWA}:
            refuse(
                "a server that decodes for others saves no states or windows",
                "Start the servers that decode without the flag",
            )
        super().__init__(server_args, params, components=components, **options)

    def _policies(self) -> dict[str, Any]:
        # The pages before those of an answer are on another server.
        return super()._policies() | {"chain_pages": 1}


class AnswersTreeLink(TreeLink):
    """Skips the prompt of the request whose KV is inserted."""

    _prompt_pages = 0

    def checkpoints(self, req: Req) -> None:
        self._prompt_pages = len(req.origin_input_ids) // self.cache.page_size

    def _offload_node(self, node_id: NodeId, transfers: Sequence[PoolTransfer]) -> None:
        run = self.cache_linker.page_run(transfers[0])
        if run.first_page + len(run.keys) > self._prompt_pages:
            super()._offload_node(node_id, transfers)
