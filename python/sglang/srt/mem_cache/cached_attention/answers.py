"""On a server that decodes for others: answers go to the remote store, where the next turn finds them.

SGLang looks nothing up on such a server, so nothing is loaded there. Prompts are saved where they were computed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hicache_storage import PoolTransfer
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

from .linker import CachedAttentionLinker
from .pools import draft_pools, refuse
from .tree_link import TreeLink

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.unified_cache.unified_tree_core_interface import NodeId


logger = logging.getLogger(__name__)


class AnswersLinker(CachedAttentionLinker):
    """Host memory is only what the pages pass through on their way."""

    only_saves = True
    kv_chain_pages = 1  # The pages before those of an answer are on another server.
    _weights_have_changed = False

    def __init__(
        self, server_args: Any, params: CacheInitParams, *, components: set[ComponentType], **options: Any
    ) -> None:
        if components & {ComponentType.MAMBA, ComponentType.SWA}:
            refuse(
                "a server that decodes for others saves no states or windows",
                "Start the servers that decode without the flag",
            )
        super().__init__(server_args, params, components=components, **options)
        self.has_draft = bool(draft_pools(params))

    @property
    def _may_share(self) -> bool:
        # The prompts came from servers that may not have the new weights yet: nobody says when all have.
        return super()._may_share and not self._weights_have_changed

    def weights_changed(self) -> None:
        super().weights_changed()
        if not self._weights_have_changed:
            logger.warning("CachedAttention: weights were updated; answers are not saved until a restart.")
        self._weights_have_changed = True


class AnswersTreeLink(TreeLink):
    """Skips the prompt of the request whose KV is inserted."""

    cache_linker: AnswersLinker
    _prompt_pages = 0

    def checkpoints(self, req: Req) -> None:
        if req.retracted_stain and self.cache_linker.has_draft:
            # SGLang has kept the KV of the target model only.
            self._prompt_pages = sys.maxsize
            return
        # With EAGLE, a token of the prompt is named together with the one after it.
        self._prompt_pages = (len(req.origin_input_ids) - self.cache.tree_core.is_eagle) // self.cache.page_size

    def _offload_node(self, node_id: NodeId, transfers: Sequence[PoolTransfer]) -> None:
        run = self.cache_linker.page_run(transfers[0])
        if run.first_page + len(run.keys) > self._prompt_pages:
            super()._offload_node(node_id, transfers)
