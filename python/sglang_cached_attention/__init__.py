"""Entry points, and the place of the fork's packages in SGLang's own tree.

Importing this module makes them importable by their names in that tree, for example
`sglang.srt.mem_cache.cached_attention`. They are installed below this package and not below `sglang`: SGLang may
be a source checkout, as in the images `lmsysorg/sglang`, and Python would take a directory `sglang` in
site-packages for all of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from types import ModuleType

ADDED = ("sglang.srt.mem_cache.cached_attention", "sglang.srt.platforms.plain_cpu")


class _Overlay(MetaPathFinder):
    """Finds the packages in `ADDED`; what is inside of them is found by their own paths."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in ADDED:
            return None
        installed = find_spec(f"{__name__}.{fullname.rpartition('.')[2]}")
        if installed is None or installed.origin is None:
            return None
        return spec_from_file_location(
            fullname, installed.origin, submodule_search_locations=installed.submodule_search_locations
        )


sys.meta_path.append(_Overlay())


def activate_plugin() -> None:
    """Entry point of group `sglang.srt.plugins`."""
    from sglang.srt.mem_cache.cached_attention.plugin import activate

    activate()


def activate_platform() -> str | None:
    """Entry point of group `sglang.srt.platforms`."""
    from sglang.srt.platforms.plain_cpu import activate

    return activate()
