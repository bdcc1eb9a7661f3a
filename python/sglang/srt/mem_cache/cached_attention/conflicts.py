"""What the server's other arguments must not be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cached_attention.config import ConfigError

from .flags import DISK_PATH, ENABLE, MLA_DEDUP, REMOTE, Flag, option_of

EXCLUSIVE = {
    "enable_hierarchical_cache": "both keep KV in host memory",
    "hicache_storage_backend": "it is HiCache's",
    "disable_radix_cache": "the hierarchy lies under the radix cache",
    "enable_lmcache": "both keep KV outside the device",
    "enable_flexkv": "both keep KV outside the device",
    "enable_unified_cache_external_linker": "CachedAttention is a linker itself",
    "enable_unified_memory": "its pool does not lie in whole pages",
    "enable_pdmux": "its prefills do not wait for what is loaded",
    "dllm_algorithm": "its batches start no loads",
    "enable_pd_role_switch": "a server that decodes for others loads nothing",
    "disaggregation_decode_enable_offload_kvcache": "both save answers",
    "radix_cache_backend": "CachedAttention brings its own radix cache",
}
"""Arguments of SGLang that conflict with ours, and why."""
DISAGGREGATION = "disaggregation_mode"
DECODE_CACHE = "disaggregation_decode_enable_radix_cache"
RETRACTION = "disaggregation_decode_retraction_backup"
HOST_RECEIVE = "disaggregation_decode_host_receive_threshold"
ELASTIC = "elastic_ep_backend"
SPECULATION = "speculative_algorithm"
WITH_DRAFT = ("EAGLE", "EAGLE3", "NEXTN", "STANDALONE")
"""Algorithms of speculative decoding with a draft model, whose KV is kept with that of the target model."""
WITHOUT_DRAFT = "NGRAM"
UNDIVIDED = {
    "pp_size": "stages would decide one by one what they can restore",
    "dcp_size": "a page would be spread over ranks",
    "attn_cp_size": "a page would be spread over ranks",
}
"""Arguments of SGLang that must be 1, and why."""


def refuse_conflicts(values: Mapping[str, Any], given: Mapping[Flag, Any]) -> None:
    """Check SGLang's own arguments, together with what was `given` for ours; None: nothing.

    Raises:
        ConfigError: one cannot be used together with ours.
    """
    for name, reason in EXCLUSIVE.items():
        if values.get(name):
            raise ConfigError(
                f"{ENABLE.option} cannot be used with {option_of(name)} ({reason}): leave one of them out."
            )
    for name, reason in UNDIVIDED.items():
        if int(values.get(name) or 1) > 1:
            raise ConfigError(
                f"{ENABLE.option} cannot be used with {option_of(name)} {values[name]} ({reason}): leave it out."
            )
    if given[REMOTE] and values.get(ELASTIC):
        raise ConfigError(
            f"{REMOTE.option} cannot be used with {option_of(ELASTIC)} (a rank that joins later cannot agree "
            "with the others on what they share): leave one of them out."
        )
    if values.get(DISAGGREGATION) == "decode":
        _check_decoding(values, given)
    _check_speculation(values.get(SPECULATION), given[MLA_DEDUP])


def _check_decoding(values: Mapping[str, Any], given: Mapping[Flag, Any]) -> None:
    decoding = f"{option_of(DISAGGREGATION)} decode"
    needed = {REMOTE.option: given[REMOTE], option_of(DECODE_CACHE): values.get(DECODE_CACHE)}
    if missing := [option for option, value in needed.items() if not value]:
        raise ConfigError(
            f"{ENABLE.option} with {decoding} needs {' and '.join(missing)} (such a server loads nothing, it "
            f"saves answers for others): add {'them' if missing[1:] else 'it'}, or leave {ENABLE.option} out."
        )
    threshold = values.get(HOST_RECEIVE)
    taken = {
        f"{option_of(RETRACTION)} host_pool": values.get(RETRACTION) == "host_pool",
        f"{option_of(HOST_RECEIVE)} below 1": threshold is not None and float(threshold) < 1,
    }
    for option, is_given in taken.items():
        if is_given:
            raise ConfigError(
                f"{ENABLE.option} cannot be used with {option} (its cache would take the place of this one): "
                "leave it out."
            )
    for flag in (DISK_PATH, MLA_DEDUP):
        if given[flag]:
            raise ConfigError(
                f"{flag.option} cannot be used with {decoding} (such a server loads nothing): give it to the "
                "servers that prefill."
            )


def _check_speculation(algorithm: str | None, mla_dedup: bool | None) -> None:
    if algorithm is None:
        return
    option = option_of(SPECULATION)
    if algorithm.upper() not in (*WITH_DRAFT, WITHOUT_DRAFT):
        raise ConfigError(
            f"{ENABLE.option} cannot be used with {option} {algorithm}: give {', '.join(WITH_DRAFT)} or "
            f"{WITHOUT_DRAFT}, or leave it out."
        )
    if mla_dedup and algorithm.upper() in WITH_DRAFT:
        raise ConfigError(
            f"{MLA_DEDUP.option} cannot be used with {option} {algorithm} (the draft model's KV is not "
            "broadcast): leave one of them out."
        )
