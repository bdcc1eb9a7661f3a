"""Command lines in the documentation are taken by the programs that they name."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import prepare_server_args

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SERVER = "sglang.launch_server"


def commands(program: str) -> list[str]:
    """Everything on the pages that starts with `python -m PROGRAM`, in code blocks and within a sentence."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        found += re.findall(rf"^    (?:\w+=\S+ )*(python -m {program}.*)$", text, re.MULTILINE)
        found += re.findall(rf"(?<!`)`(python -m {program}[^`]*)`", text)
    return sorted({" ".join(command.partition("  #")[0].split()) for command in found})


class _Parsed(BaseException):
    """The parser was content: nothing else shall run."""


@pytest.mark.parametrize("command", commands(r"benchmark\.\w+"))
def test_benchmarks_take_their_arguments(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(*args: Any) -> Any:
        parse(*args)
        raise _Parsed

    _, _, module, *arguments = shlex.split(command)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    # A sentence names the program alone, where it stands for all that it does.
    arguments = arguments or ["--help"]
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises((_Parsed, SystemExit)) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.type is _Parsed or (arguments == ["--help"] and end.value.code == 0)


def test_every_benchmark_is_on_the_benchmarks_page() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text() + (ROOT / "docs" / "truncation.md").read_text()
    parts = {"opening"}  # Started by `tiers` in a process of its own.
    scripts = {
        path.stem for path in (ROOT / "benchmark").glob("*.py") if '__name__ == "__main__"' in path.read_text()
    }
    assert scripts - parts <= set(re.findall(r"benchmark\.(\w+)", page)) | {"multiturn"}


@pytest.mark.parametrize("command", commands(re.escape(SERVER)))
def test_servers_take_their_arguments(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that has the memory and the disk."""
    load_plugins()
    usage = psutil.disk_usage("/")._replace(free=10**14)
    monkeypatch.setattr("sglang.srt.mem_cache.cached_attention.settings.free_memory", lambda: 10**13)
    monkeypatch.setattr(psutil, "disk_usage", lambda _path: usage)
    monkeypatch.setattr(os, "access", lambda *_, **__: True)
    args = prepare_server_args(shlex.split(command)[3:])
    assert args.enable_unified_cache_external_linker


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    pages = "\n".join(page.read_text() for page in PAGES)
    for target in set(re.findall(r"(?:^    |`)make (\w+)", pages, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
