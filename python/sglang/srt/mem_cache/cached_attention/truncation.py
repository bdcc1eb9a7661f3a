"""Truncation of over-long prompts with `--allow-auto-truncate`: the oldest tokens after the first pages are
dropped, and the others keep their KV.

SGLang drops the newest tokens, in the tokenizer process and again in the scheduler. Here the tokenizer process
drops nothing. Each scheduler truncates by the plan (`cached_attention.position.truncation`), which needs only the
prompt's length, or leaves it to SGLang if the model's keys cannot be moved. So only the scheduler knows how many
tokens were dropped: those that the client sent, less the `prompt_tokens` that the scheduler reports.

The kept tokens run in a namespace of their own: the request's `extra_key` and the page hash of the dropped tokens
and those before them. Conversations that dropped different tokens never share a page after the seam.

Output log probabilities, `n`, beams, grammars, LoRA adapters (part of the namespace) and `session_id` work as
usual. Options that refer to positions of the prompt are meaningless for a truncated one and are refused, see
`_POSITIONAL`; `input_embeds` never get here, because SGLang requires the radix cache to be off for them. A
session that SGLang itself assembles (`session_params`) is known in full only in the scheduler, and is refused
there. Embedding requests are truncated as SGLang does it.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.mem_cache.radix_cache import RadixKey

from cached_attention.chain import Chain
from cached_attention.index import PageKey
from cached_attention.position.truncation import TruncationPlan, TruncationRule

from .flags import is_enabled
from .ranks import all_agree
from .tree_link import RequestChain

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.server_args import ServerArgs

    from .linker import CachedAttentionLinker
    from .radix_cache import CachedAttentionRadixCache

logger = logging.getLogger(__name__)

TRUNCATED_TOKENS = "truncated_tokens"
"""Field of `meta_info`; absent if nothing was dropped."""
_GIVEN = "cached_attention_given_tokens"
"""Attribute of an over-long `GenerateReqInput`; its copies for parallel sampling have it too."""


class TruncatedPrompt:
    """A prompt from which tokens were dropped.

    Args:
        tokens: the whole prompt, as the client sent it.
        extra_key, cache_salt: the namespace of the whole prompt.
    """

    def __init__(
        self,
        rule: TruncationRule,
        plan: TruncationPlan,
        tokens: array[int],
        extra_key: str | None,
        cache_salt: str | None,
    ) -> None:
        self._rule = rule
        self._plan = plan
        self._tokens = tokens
        self._base = extra_key
        self._salt = cache_salt
        self._whole = RequestChain([], Chain())
        self.extra_key = self._namespace(plan)

    @property
    def dropped(self) -> int:
        """Number of dropped tokens."""
        return self._plan.dropped

    @property
    def kept(self) -> array[int]:
        return self._plan.keep(self._tokens)

    def _namespace(self, plan: TruncationPlan) -> str | None:
        """The `extra_key` of the tokens that `plan` keeps."""
        if not plan.dropped:
            return self._base
        end = plan.sink + plan.dropped
        self._whole.extend(self._key(self._tokens, self._base, end), self._rule.page_size)
        return f"{self._base or ''}|truncated:{self._whole.hashes[end // self._rule.page_size - 1]}"

    def _key(self, tokens: array[int], namespace: str | None, end: int) -> RadixKey:
        return RadixKey(tokens, namespace, limit=end, cache_salt=self._salt)

    def sources(self, pages: int) -> Iterator[Sequence[PageKey | None]]:
        """Where the first `pages` kept pages may have been computed before, see `TruncationRule.sources`."""
        return self._rule.sources(self._plan, pages, self._keys_under)

    def _keys_under(self, plan: TruncationPlan) -> Callable[[int], PageKey]:
        namespace, page_size = self._namespace(plan), self._rule.page_size
        known = RequestChain([], Chain()) if plan.dropped else self._whole
        tokens = plan.keep(self._tokens[: plan.dropped + self._rule.window])

        def key(page: int) -> PageKey:
            known.extend(self._key(tokens, namespace, (page + 1) * page_size), page_size)
            return known.chain.keys[page]

        return key


class Truncation(NamedTuple):
    """Truncates the prompts of one scheduler."""

    rule: TruncationRule

    def cut(self, tokens: array[int], extra_key: str | None, cache_salt: str | None) -> TruncatedPrompt | None:
        """The truncated prompt; None if the prompt fits."""
        plan = self.rule.plan(len(tokens))
        return TruncatedPrompt(self.rule, plan, tokens, extra_key, cache_salt) if plan.dropped else None

    def cut_request(self, req: Req) -> TruncatedPrompt | None:
        """Truncate the prompt of `req`; None if the prompt fits.

        A session's prompt is not truncated, because the next one would not continue it: the request is refused.
        """
        if req.session is not None:
            if (length := len(req.origin_input_ids)) >= self.rule.limit:
                req.set_finish_with_abort(_refusal(length, self.rule.limit, *_SESSION))
            return None
        prompt = self.cut(req.origin_input_ids, req.extra_key, req.cache_salt)
        if prompt is not None:
            req.origin_input_ids = req.origin_input_ids_unpadded = prompt.kept
            req.extra_key = prompt.extra_key
        return prompt


def truncation_of(scheduler: Scheduler, cache: CachedAttentionRadixCache) -> Truncation | None:
    """None if over-long prompts are left to SGLang; with `--allow-auto-truncate`, a line in the log says why."""
    if not scheduler.server_args.allow_auto_truncate:
        return None
    rule = _rule(scheduler, cache.cache_linker)
    if not all_agree(rule is not None, scheduler.world_group) or rule is None:
        return None
    logger.info(
        "CachedAttention: a prompt of %d tokens or more keeps the first %d and loses the oldest after them, "
        "in steps of %d.",
        *(rule.limit, rule.sink, rule.step),
    )
    return Truncation(rule)


def _rule(scheduler: Scheduler, linker: CachedAttentionLinker) -> TruncationRule | None:
    try:
        if reason := _left_to_sglang(scheduler.server_args):
            raise ValueError(reason)
        return linker.truncation_rule(scheduler.max_req_len + 1, scheduler.max_req_input_len)
    except ValueError as error:
        logger.warning("CachedAttention: no truncation, over-long prompts lose their newest tokens. %s", error)
        return None


def _left_to_sglang(args: ServerArgs) -> str | None:
    """Why a server with `args` must leave truncation to SGLang; None if it need not."""
    if args.tokenizer_worker_num > 1 or envs.SGLANG_RUST_SERVER.get():
        return "Several tokenizer processes, or one in Rust, cut them: use one, --tokenizer-worker-num 1."
    if args.disaggregation_mode != "null":
        return "Servers for prefill and for decoding (--disaggregation-mode) may have different windows."
    return None


def _takes_over(args: ServerArgs) -> bool:
    ours = is_enabled(args.unified_cache_external_linker_config)
    return ours and args.allow_auto_truncate and _left_to_sglang(args) is None


# In the tokenizer process

_SESSION = ("session_params", "send the conversation without a session")
_POSITIONAL: list[tuple[Callable[[Any], bool], str, str]] = [
    (lambda obj: obj.contains_mm_input(), "images, video or audio", "send less of the conversation"),
    (lambda obj: bool(obj.session_params), *_SESSION),
    (
        lambda obj: obj.return_logprob and obj.logprob_start_len >= 0,
        "log probabilities of the prompt",
        "leave logprob_start_len (or echo) out",
    ),
    (
        lambda obj: obj.return_hidden_states is True,
        "hidden states of the prompt",
        'ask for "last" only (OpenAI endpoints and sgl.Engine)',
    ),
    (lambda obj: obj.return_routed_experts, "return_routed_experts", "leave it out"),
    (lambda obj: obj.return_indexer_topk, "return_indexer_topk", "leave it out"),
    (lambda obj: obj.positional_embed_overrides is not None, "positional_embed_overrides", "leave it out"),
    (lambda obj: obj.multi_item_delimiter_indices is not None, "multi-item scoring", "score fewer items at once"),
    (lambda obj: obj.token_indices_to_pool is not None, "token_indices_to_pool", "leave it out"),
]


def _refusal(length: int, limit: int, what: str, remedy: str) -> str:
    return (
        f"The prompt has {length} tokens, and this server takes {limit - 1}; a longer one is truncated, but not "
        f"together with {what}: {remedy}, or send at most {limit - 1} tokens."
    )


def validate(
    original: Callable[..., None], manager: TokenizerManager, obj: Any, input_ids: list[int] | None
) -> None:
    """`TokenizerManager._validate_one_request`, without truncation.

    Raises:
        ValueError: SGLang's own reasons, or the prompt is too long for the request's other options.
    """
    limit = manager.max_req_input_len or manager.context_len
    fits = input_ids is None or len(input_ids) < limit
    if fits or not isinstance(obj, GenerateReqInput) or not _takes_over(manager.server_args):
        original(manager, obj, input_ids)
        return
    length = len(input_ids or ())
    for applies, what, remedy in _POSITIONAL:
        if applies(obj):
            raise ValueError(_refusal(length, limit, what, remedy))
    setattr(obj, _GIVEN, length)
    # The scheduler bounds max_new_tokens by what it keeps; everything else is checked as for a short prompt.
    original(manager, obj, (input_ids or [])[:1])


def tell(responses: AsyncGenerator[dict[str, Any]], obj: Any) -> AsyncIterator[dict[str, Any]] | None:
    """`responses` to `obj`, with the number of tokens dropped; None if none were."""
    given = getattr(obj, _GIVEN, None)
    return None if given is None else _told(responses, given)


async def _told(responses: AsyncGenerator[dict[str, Any]], given: int) -> AsyncIterator[dict[str, Any]]:
    async with aclosing(responses):
        async for response in responses:
            meta_info = response["meta_info"]
            if (meta_info.get("finish_reason") or {}).get("type") != "abort":
                meta_info[TRUNCATED_TOKENS] = given - meta_info["prompt_tokens"]
            yield response
