"""Flags of the server; they have the same names as arguments of `sgl.Engine` and in `--config` files."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from cached_attention.config import (
    DEFAULT_LOOK_AHEAD,
    DEFAULT_PAGE_SIZE,
    DEFAULT_SINK_PAGES,
    DEFAULT_TRUNCATION_RATIO,
    Eviction,
    Wait,
)
from cached_attention.encryption import FORMS, KEY_VARIABLE

PACKAGE = "sglang.srt.mem_cache.cached_attention"
LINKER = (f"{PACKAGE}.linker", "CachedAttentionLinker")
DEDUP_LINKER = (f"{PACKAGE}.mla_dedup", "MlaDedupLinker")


class Flag(NamedTuple):
    name: str
    default: Any
    help: str

    @property
    def option(self) -> str:
        return option_of(self.name)


def option_of(name: str) -> str:
    """Command-line name of an argument."""
    return "--" + name.replace("_", "-")


ENABLE = Flag(
    "enable_cached_attention",
    False,
    "Keep the KV cache of conversations in a hierarchy of device, host memory and disk (CachedAttention). "
    f"Sets --page-size to {DEFAULT_PAGE_SIZE} unless it is given.",
)
HOST_SIZE = Flag(
    "cached_attention_host_size",
    "0.5",
    "Host memory for KV, all ranks of this machine together: a size such as 64GB, or a share of the memory that "
    "is free at start-up such as 0.5 (default: 0.5).",
)
DISK_PATH = Flag(
    "cached_attention_disk_path",
    None,
    "Directory of the disk tier, on a local disk. Every page is written to it once, and survives a restart. One "
    "server at a time.",
)
DISK_SIZE = Flag(
    "cached_attention_disk_size",
    None,
    "Upper limit for the directory, all ranks of this machine together: a size such as 2TB, or a share of the "
    "disk space that is free at start-up such as 0.5. Required with --cached-attention-disk-path.",
)
ENCRYPTION_KEY_FILE = Flag(
    "cached_attention_encryption_key_file",
    None,
    "Encrypt what is written to --cached-attention-disk-path and what --cached-attention-remote shares, with "
    f"AES-256-GCM and the key in this file: {FORMS}, mode 0600. Or set ${KEY_VARIABLE}.",
)
REMOTE = Flag(
    "cached_attention_remote",
    None,
    "Share conversations with other servers through a Mooncake store: mooncake://HOST:PORT of its master, with "
    "the options segment=SIZE (memory of this machine that is lent to the store, 4GB by default), "
    "protocol=tcp|rdma, device=NAME, metadata=URL, host=ADDRESS (of this machine).",
)
DISK_MIN_USES = Flag(
    "cached_attention_disk_min_uses",
    1,
    "Write a page to disk after this many uses; with 2 or more, prompts that are never continued are not written "
    "(default: 1).",
)
LOOK_AHEAD = Flag(
    "cached_attention_look_ahead",
    DEFAULT_LOOK_AHEAD,
    "Number of queued requests whose pages are fetched from disk to host memory before they run; 1 fetches for "
    f"the next one only (default: {DEFAULT_LOOK_AHEAD}).",
)
WAIT = Flag(
    "cached_attention_wait",
    Wait.MEASURED.value,
    "How long a queued request waits for pages on their way from disk: measured, only while loading is expected "
    "to be faster than recomputing, or complete, until all have arrived. 5 seconds at most in either case "
    "(default: measured).",
)
EVICTION = Flag(
    "cached_attention_eviction",
    Eviction.LEARNT.value,
    "Order in which pages that no queued request needs are evicted from host memory: learnt, latest expected "
    "next use first wherever that finds more than LRU, or lru, least recently used first. The disk always evicts "
    "the least recently used (default: learnt).",
)
MLA_DEDUP = Flag(
    "cached_attention_mla_dedup",
    False,
    "Keep one copy of an MLA model's pages instead of one per tensor-parallel rank: the first rank loads them "
    "and broadcasts each layer to the others.",
)
TTL = Flag(
    "cached_attention_ttl",
    "1h",
    "Drop pages that were not used for this long, from host memory and disk: 1h, 30m, 90s; 0 keeps them as long "
    "as there is room (default: 1h).",
)
TRUNCATION_RATIO = Flag(
    "cached_attention_truncation_ratio",
    DEFAULT_TRUNCATION_RATIO,
    "With --allow-auto-truncate: a prompt that is longer than the context window loses its oldest tokens in "
    f"steps of this fraction of the window (default: {DEFAULT_TRUNCATION_RATIO}).",
)
SINK_PAGES = Flag(
    "cached_attention_sink_pages",
    DEFAULT_SINK_PAGES,
    "With --allow-auto-truncate: number of pages at the start of a prompt that are kept when it is truncated "
    f"(default: {DEFAULT_SINK_PAGES}).",
)
FLAGS = (
    ENABLE,
    HOST_SIZE,
    DISK_PATH,
    DISK_SIZE,
    ENCRYPTION_KEY_FILE,
    REMOTE,
    DISK_MIN_USES,
    LOOK_AHEAD,
    WAIT,
    EVICTION,
    MLA_DEDUP,
    TTL,
    TRUNCATION_RATIO,
    SINK_PAGES,
)


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("CachedAttention")
    group.add_argument(ENABLE.option, action="store_true", default=ENABLE.default, help=ENABLE.help)
    for flag in FLAGS[1:]:
        if flag.default is False:
            group.add_argument(flag.option, action="store_true", default=None, help=flag.help)
        else:
            group.add_argument(flag.option, type=str, default=None, help=flag.help)


def is_enabled(linker_config: dict[str, Any] | None) -> bool:
    """Whether `ServerArgs.unified_cache_external_linker_config` is ours."""
    modules = [module for module, _ in (LINKER, DEDUP_LINKER)]
    return linker_config is not None and linker_config.get("linker_module_path") in modules


def has_disk(linker_config: dict[str, Any] | None) -> bool:
    """Whether `ServerArgs.unified_cache_external_linker_config` is ours and configures a disk tier."""
    return (
        linker_config is not None
        and is_enabled(linker_config)
        and linker_config["linker_extra_config"]["disk_path"] is not None
    )
