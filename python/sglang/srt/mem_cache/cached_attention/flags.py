"""Flags of the server; they have the same names as arguments of `sgl.Engine` and in `--config` files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from cached_attention.config import (
    DEFAULT_LOOK_AHEAD,
    DEFAULT_PAGE_SIZE,
    DEFAULT_SINK_PAGES,
    DEFAULT_TRUNCATION_RATIO,
    CachedAttentionConfig,
    ConfigError,
    Eviction,
    Wait,
    parse_duration,
    parse_share,
    parse_size,
)
from cached_attention.encryption import FORMS, KEY_VARIABLE, key_place, read_key
from cached_attention.free_memory import free_memory
from cached_attention.permissions import check_private
from cached_attention.tiers.disk_directory import DirectoryInUseError
from cached_attention.tiers.disk_ranks import wait_for_owners, was_used
from cached_attention.tiers.disk_space import disk_usage
from cached_attention.tiers.remote_address import parse_remote
from cached_attention.tiers.remote_client import check_installed

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
NODES = "nnodes"
REPLACED = 20.0
"""Seconds that a server waits for the end of the one before it, which takes up to 15."""
AUTO_TRUNCATE = "allow_auto_truncate"
"""SGLang's own argument, which both truncation flags require."""

EXCLUSIVE = {
    "enable_hierarchical_cache": "both keep KV in host memory",
    "disable_radix_cache": "the hierarchy lies under the radix cache",
    "enable_lmcache": "both keep KV outside the device",
    "enable_flexkv": "both keep KV outside the device",
    "enable_unified_cache_external_linker": "CachedAttention is a linker itself",
    "enable_unified_memory": "its pool does not lie in whole pages",
    "enable_pdmux": "its prefills do not wait for what is loaded",
    "dllm_algorithm": "its batches start no loads",
    "enable_pd_role_switch": "a server that decodes for others loads nothing",
    "radix_cache_backend": "CachedAttention brings its own radix cache",
}
"""Arguments of SGLang that conflict with ours, and why."""
DISAGGREGATION = "disaggregation_mode"
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


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("CachedAttention")
    group.add_argument(ENABLE.option, action="store_true", default=ENABLE.default, help=ENABLE.help)
    for flag in FLAGS[1:]:
        if flag.default is False:
            group.add_argument(flag.option, action="store_true", default=None, help=flag.help)
        else:
            group.add_argument(flag.option, type=str, default=None, help=flag.help)


def fold(values: MutableMapping[str, Any]) -> None:
    """Replace our arguments in `values` by the arguments of SGLang that carry them to every process.

    Raises:
        ConfigError: a value is wrong, or conflicts with another one.
    """
    given = {flag: values.pop(flag.name, None) for flag in FLAGS}
    if not given.pop(ENABLE):
        _refuse_lonely(given)
        return
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
    if values.get(DISAGGREGATION) == "decode":
        raise ConfigError(
            f"{ENABLE.option} cannot be used with {option_of(DISAGGREGATION)} decode (such a server "
            "loads nothing): give it to the servers that prefill."
        )
    _check_speculation(values.get(SPECULATION), given[MLA_DEDUP])
    if not values.get(AUTO_TRUNCATE):
        about_truncation = {flag: given[flag] for flag in (TRUNCATION_RATIO, SINK_PAGES)}
        _refuse_lonely(about_truncation, option_of(AUTO_TRUNCATE))
    config = _config({flag: flag.default if value is None else value for flag, value in given.items()})
    if config.disk_path is not None and int(values.get(NODES) or 1) == 1:  # Nodes may be one machine.
        _wait_for_owners(Path(config.disk_path))
    values["enable_unified_cache_external_linker"] = True
    values["unified_cache_external_linker_backend"] = "dynamic"
    module, linker = DEDUP_LINKER if given[MLA_DEDUP] else LINKER
    values["unified_cache_external_linker_config"] = {
        "linker": linker,
        "linker_module_path": module,
        "linker_extra_config": config.to_settings(),
    }
    if values.get("page_size") is None:
        values["page_size"] = DEFAULT_PAGE_SIZE


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


def _config(settings: Mapping[Flag, Any]) -> CachedAttentionConfig:
    available = free_memory()
    path, size = settings[DISK_PATH], settings[DISK_SIZE]
    if (path is None) != (size is None):
        raise ConfigError(f"{DISK_PATH.option} and {DISK_SIZE.option} belong together: give both or none.")
    directory = None if path is None else _disk_path(path)
    return CachedAttentionConfig(
        host_size=parse_size(HOST_SIZE.option, settings[HOST_SIZE], available),
        disk_path=None if directory is None else str(directory),
        disk_size=0 if directory is None else _disk_size(directory, size),
        encryption_key=_encryption_key(path or settings[REMOTE], settings[ENCRYPTION_KEY_FILE]),
        remote=_remote(settings[REMOTE], available),
        disk_min_uses=_whole_number(DISK_MIN_USES, settings[DISK_MIN_USES]),
        look_ahead=_whole_number(LOOK_AHEAD, settings[LOOK_AHEAD]),
        wait=Wait(_choice(WAIT, settings[WAIT], [choice.value for choice in Wait])),
        eviction=Eviction(_choice(EVICTION, settings[EVICTION], [choice.value for choice in Eviction])),
        ttl=parse_duration(TTL.option, settings[TTL]),
        truncation_ratio=parse_share(TRUNCATION_RATIO.option, settings[TRUNCATION_RATIO]),
        sink_pages=_whole_number(SINK_PAGES, settings[SINK_PAGES], least=0),
    )


def _encryption_key(encrypted: str | None, key_file: str | None) -> str | None:
    """Where the key is, after checking that it is valid. `encrypted`: what it encrypts; None: nothing."""
    if encrypted is None:
        if key_file is not None:
            raise ConfigError(
                f"{ENCRYPTION_KEY_FILE.option} has no effect without {DISK_PATH.option} or {REMOTE.option}: "
                f"add one of them."
            )
        return None
    place = key_place(ENCRYPTION_KEY_FILE.option, key_file)
    if place is not None:
        read_key(place)
    return place


def _disk_path(text: str) -> Path:
    """The directory, after checking that this process may use it."""
    if not text:
        raise ConfigError(f"{DISK_PATH.option} is empty: give a directory, or leave it out.")
    path = Path(text).expanduser().absolute()
    try:
        _check_directory(path)
    except OSError as error:
        raise ConfigError(f"{DISK_PATH.option}: {error}") from error
    return path


def _check_directory(path: Path) -> None:
    place = _existing(path)
    if not place.is_dir():
        raise NotADirectoryError(f"{path} cannot be made, because {place} is not a directory: give another path.")
    if path.exists():
        check_private(path)
    # A file system that is read-only because it has failed must not keep the server from starting.
    is_read_only = os.statvfs(place).f_flag & os.ST_RDONLY
    if not (is_read_only or os.access(place, os.W_OK | os.X_OK, effective_ids=True)):
        raise PermissionError(f"{place} cannot be written by this user: give another path, or change its owner.")


def _wait_for_owners(path: Path) -> None:
    """A server that is being replaced may still be writing its last pages."""
    try:
        wait_for_owners(path, REPLACED)
    except (OSError, DirectoryInUseError) as error:
        raise ConfigError(f"{DISK_PATH.option}: {error}") from error


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def _disk_size(path: Path, size: str) -> int:
    """Size limit in bytes. Files already in the directory count as free space: normally they are the store's.

    A directory that was used before may be given more than is free: the store makes do with what others leave.
    """
    file_system = psutil.disk_usage(str(_existing(path)))
    free = file_system.free + disk_usage(path)
    return parse_size(DISK_SIZE.option, size, free, file_system.total if was_used(path) else free)


def _remote(url: str | None, free_memory: int) -> str | None:
    if url is None:
        return None
    address = parse_remote(REMOTE.option, url, free_memory)
    check_installed(REMOTE.option)
    return address.url


def _whole_number(flag: Flag, text: str | int, least: int = 1) -> int:
    if not str(text).isdecimal() or int(text) < least:
        raise ConfigError(f"{flag.option} is {text!r}: give a whole number from {least}.")
    return int(text)


def _choice(flag: Flag, text: str, choices: Sequence[str]) -> str:
    if text not in choices:
        raise ConfigError(f"{flag.option} is {text!r}: give {' or '.join(choices)}.")
    return text


def _refuse_lonely(given: Mapping[Flag, Any], missing: str = ENABLE.option) -> None:
    lonely = [flag.option for flag, value in given.items() if value is not None]
    if lonely:
        raise ConfigError(f"{', '.join(lonely)} has no effect without {missing}: add it.")


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
