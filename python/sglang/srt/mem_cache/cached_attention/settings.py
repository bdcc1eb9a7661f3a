"""From the values of the flags to the settings that SGLang carries to every process."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from cached_attention.config import DEFAULT_PAGE_SIZE, CachedAttentionConfig, ConfigError, Eviction, Wait
from cached_attention.encryption import key_place, read_key
from cached_attention.free_memory import free_memory
from cached_attention.permissions import check_private
from cached_attention.tiers.disk_directory import BADLY_CHOSEN, DirectoryInUseError
from cached_attention.tiers.disk_ranks import wait_for_owners, was_used
from cached_attention.tiers.disk_space import disk_usage
from cached_attention.tiers.remote_address import parse_remote
from cached_attention.tiers.remote_client import check_installed
from cached_attention.units import parse_duration, parse_share, parse_size

from .conflicts import refuse_conflicts
from .flags import (
    DEDUP_LINKER,
    DISK_MIN_USES,
    DISK_PATH,
    DISK_SIZE,
    ENABLE,
    ENCRYPTION_KEY_FILE,
    EVICTION,
    FLAGS,
    HOST_SIZE,
    LINKER,
    LOOK_AHEAD,
    MLA_DEDUP,
    REMOTE,
    SINK_PAGES,
    TRUNCATION_RATIO,
    TTL,
    WAIT,
    Flag,
    is_enabled,
    option_of,
)

logger = logging.getLogger(__name__)

NODES = "nnodes"
REPLACED = 20.0
"""Seconds that a server waits for the end of the one before it, which takes up to 15."""
AUTO_TRUNCATE = "allow_auto_truncate"
"""SGLang's own argument, which both truncation flags require."""


def fold(values: MutableMapping[str, Any]) -> None:
    """Replace our arguments in `values` by the arguments of SGLang that carry them to every process.

    Raises:
        ConfigError: a value is wrong, or conflicts with another one.
    """
    given = {flag: values.pop(flag.name, None) for flag in FLAGS}
    if not given.pop(ENABLE):
        _refuse_lonely(given)
        return
    refuse_conflicts(values, given)
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
    if values.get("page_size") is None and not _backend_comes_first(values):
        values["page_size"] = DEFAULT_PAGE_SIZE


def _backend_comes_first(values: Mapping[str, Any]) -> bool:
    """Whether SGLang would choose a slower attention backend if it knew the page size before.

    On Hopper and Blackwell it does so for chains of drafts that are asked for. See `default_page_size`.
    """
    is_chain = values.get("speculative_eagle_topk") == 1
    # Without overlap SGLang decides by the page size how it keeps the states of hybrid models.
    return is_chain and values.get("attention_backend") is None and not values.get("disable_overlap_schedule")


def default_page_size(chosen: dict[str, int], values: Any) -> dict[str, int] | None:
    """What SGLang has `chosen` because no page size was given, with ours; None: nothing changes.

    Where it keeps states at the end of requests only, it takes no larger pages; such a model is refused later.
    """
    is_ours = chosen and is_enabled(values.unified_cache_external_linker_config)
    takes_any = values.mamba_radix_cache_strategy != "no_buffer"
    return {"page_size": DEFAULT_PAGE_SIZE} if is_ours and takes_any else None


def _config(settings: Mapping[Flag, Any]) -> CachedAttentionConfig:
    available = free_memory()
    path, size = settings[DISK_PATH], settings[DISK_SIZE]
    if (path is None) != (size is None):
        raise ConfigError(f"{DISK_PATH.option} and {DISK_SIZE.option} belong together: give both or none.")
    disk_path, disk_size = (None, 0) if path is None else disk_settings(path, size)
    return CachedAttentionConfig(
        host_size=parse_size(HOST_SIZE.option, settings[HOST_SIZE], available),
        disk_path=disk_path,
        disk_size=disk_size,
        encryption_key=encryption_key(path or settings[REMOTE], settings[ENCRYPTION_KEY_FILE]),
        remote=_remote(settings[REMOTE], available),
        disk_min_uses=_whole_number(DISK_MIN_USES, settings[DISK_MIN_USES]),
        look_ahead=_whole_number(LOOK_AHEAD, settings[LOOK_AHEAD]),
        wait=Wait(_choice(WAIT, settings[WAIT], [choice.value for choice in Wait])),
        eviction=Eviction(_choice(EVICTION, settings[EVICTION], [choice.value for choice in Eviction])),
        ttl=parse_duration(TTL.option, settings[TTL]),
        truncation_ratio=parse_share(TRUNCATION_RATIO.option, settings[TRUNCATION_RATIO]),
        sink_pages=_whole_number(SINK_PAGES, settings[SINK_PAGES], least=0),
    )


def encryption_key(encrypted: str | None, key_file: str | None) -> str | None:
    """Where the key is, after checking that it is valid; None: there is none.

    Args:
        encrypted: what it encrypts; None: nothing.
        key_file: None: it may be in the environment.

    Raises:
        ConfigError: the key is not valid, or has nothing to encrypt.
    """
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


def disk_settings(path: str, size: str) -> tuple[str, int]:
    """Directory and bytes of a disk tier.

    Raises:
        ConfigError: the directory cannot be used, or the size is wrong.
    """
    directory = _disk_path(path)
    return str(directory), _disk_size(directory, size)


def _disk_path(text: str) -> Path:
    """The directory, after checking that this process may use it."""
    if not text:
        raise ConfigError(f"{DISK_PATH.option} is empty: give a directory, or leave it out.")
    try:
        path = Path(text).expanduser().absolute()
        with _unless_disk_fails():
            _check_directory(path)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"{DISK_PATH.option}: {error}") from error
    return path


@contextmanager
def _unless_disk_fails() -> Iterator[None]:
    """Context for checks of the directory: a disk that fails must not keep a server from being started again."""
    try:
        yield
    except BADLY_CHOSEN:
        raise
    except OSError as error:
        logger.warning("%s: %s", DISK_PATH.option, error)


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
        with _unless_disk_fails():
            wait_for_owners(path, REPLACED)
    except (OSError, DirectoryInUseError) as error:
        raise ConfigError(f"{DISK_PATH.option}: {error}") from error


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())


def _disk_size(path: Path, size: str) -> int:
    """Size limit in bytes. Files already in the directory count as free space: normally they are the store's.

    A directory that was used before may be given more than is free: the store makes do with what others leave.
    """
    free = most = None
    with _unless_disk_fails():
        file_system = psutil.disk_usage(str(_existing(path)))
        free = file_system.free + disk_usage(path)
        most = file_system.total if was_used(path) else None
    if free is None:
        free, most = 0, sys.maxsize
    return parse_size(DISK_SIZE.option, size, free, most)


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
