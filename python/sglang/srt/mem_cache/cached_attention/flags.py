"""Flags of the server, the same names as `sgl.Engine` arguments and in `--config` files."""

from __future__ import annotations

import argparse
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import psutil

from cached_attention.config import DEFAULT_PAGE_SIZE, CachedAttentionConfig, ConfigError, parse_size

LINKER_MODULE = "sglang.srt.mem_cache.cached_attention.linker"
LINKER_CLASS = "CachedAttentionLinker"


class Flag(NamedTuple):
    name: str
    default: Any
    help: str

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


ENABLE = Flag(
    "enable_cached_attention",
    False,
    "Keep the KV cache of conversations in a hierarchy of device, host memory and disk (CachedAttention). "
    f"Sets --page-size to {DEFAULT_PAGE_SIZE} unless it is given.",
)
HOST_SIZE = Flag(
    "cached_attention_host_size",
    "0.5",
    "Host memory for conversations, over all ranks on this machine: a size such as 64GB, or a share of the "
    "memory that is free at start-up such as 0.5 (default: 0.5).",
)
FLAGS = (ENABLE, HOST_SIZE)

_EXCLUSIVE = {
    "enable_hierarchical_cache": "both keep KV in host memory",
    "disable_radix_cache": "the hierarchy lies under the radix cache",
    "enable_lmcache": "both keep KV outside the device",
    "enable_flexkv": "both keep KV outside the device",
    "enable_unified_cache_external_linker": "CachedAttention is a linker itself",
    "enable_unified_memory": "its pool does not lie in whole pages",
    "radix_cache_backend": "CachedAttention brings its own radix cache",
    "speculative_algorithm": "the draft model's KV is not in the hierarchy",
}


def add_cli_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("CachedAttention")
    group.add_argument(ENABLE.option, action="store_true", default=ENABLE.default, help=ENABLE.help)
    group.add_argument(HOST_SIZE.option, type=str, default=None, help=HOST_SIZE.help)


def fold(values: MutableMapping[str, Any]) -> None:
    """Replace our arguments in `values` by the arguments of SGLang that carry them to every process.

    Raises:
        ConfigError: a value is wrong, or contradicts another one.
    """
    given = {flag: values.pop(flag.name, None) for flag in FLAGS}
    if not given.pop(ENABLE):
        _refuse_lonely(given)
        return
    for name, reason in _EXCLUSIVE.items():
        if values.get(name):
            option = Flag(name, None, "").option
            raise ConfigError(f"{ENABLE.option} cannot be used with {option} ({reason}): leave one of them out.")
    available = psutil.virtual_memory().available
    host_size = HOST_SIZE.default if given[HOST_SIZE] is None else given[HOST_SIZE]
    config = CachedAttentionConfig(host_size=parse_size(HOST_SIZE.option, host_size, available))
    values["enable_unified_cache_external_linker"] = True
    values["unified_cache_external_linker_backend"] = "dynamic"
    values["unified_cache_external_linker_config"] = {
        "linker": LINKER_CLASS,
        "linker_module_path": LINKER_MODULE,
        "linker_extra_config": config.to_settings(),
    }
    if values.get("page_size") is None:
        values["page_size"] = DEFAULT_PAGE_SIZE


def _refuse_lonely(given: MutableMapping[Flag, Any]) -> None:
    lonely = [flag.option for flag, value in given.items() if value is not None]
    if lonely:
        raise ConfigError(f"{', '.join(lonely)} has no effect without {ENABLE.option}: add it.")


def is_enabled(linker_config: dict[str, Any] | None) -> bool:
    """Whether `ServerArgs.unified_cache_external_linker_config` is ours."""
    return linker_config is not None and linker_config.get("linker_module_path") == LINKER_MODULE
