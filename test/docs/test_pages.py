"""What the documentation says is what the code says."""

from __future__ import annotations

import ast
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from cached_attention.cli import app
from cached_attention.fingerprint import Fingerprint
from cached_attention.layout import DevicePool
from cached_attention.store import CachedAttentionStore
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.remote import RemoteTier
from cached_attention.tiers.remote_address import parse_remote
from docs import figures, flags

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def blocks(page: Path, language: str) -> list[str]:
    """The contents of the page's fenced blocks in `language`."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


# What is generated


def test_the_flags_page_is_up_to_date() -> None:
    assert flags.PAGE.read_text() == flags.render(), "run `python -m docs.flags`"


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figures_show_what_the_code_does(name: str) -> None:
    data_of, _ = figures.FIGURES[name]
    tree = ElementTree.parse(figures.DIRECTORY / f"{name}.svg")
    (description,) = tree.iter("{http://purl.org/dc/elements/1.1/}description")
    assert json.loads(description.text or "") == json.loads(json.dumps(data_of())), "run `python -m docs.figures`"


# What is quoted

PRINTF = re.compile(r"%[-+#0]?[\d.]*[sdrf]")
LETTERS = 12
"""A message of fewer letters of its own would match anything."""


def message_patterns() -> Iterator[re.Pattern[str]]:
    """One for each text in the source, with anything in place of what is filled in."""
    for folder in ("cached_attention", "python"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts = [_text(part) for part in parts]
                letters = "".join(text for text in texts if text)
                if any(texts) and sum(map(str.isalpha, PRINTF.sub("", letters))) >= LETTERS:
                    yield re.compile("".join(".+" if text is None else _pattern(text) for text in texts))


def _text(node: ast.AST) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _pattern(text: str) -> str:
    return ".+".join(map(re.escape, PRINTF.split(text)))


def test_every_quoted_message_is_in_the_source() -> None:
    quoted = [" ".join(block.split()) for block in blocks(DOCS / "messages.md", "text")]
    assert len(quoted) > 30
    patterns = list(message_patterns())
    unknown = [message for message in quoted if not any(one.fullmatch(message) for one in patterns)]
    assert not unknown


def test_a_message_that_is_not_in_the_source_is_noticed() -> None:
    assert not any(one.fullmatch("The cache is on fire: fetch water.") for one in message_patterns())


@pytest.mark.parametrize("block", blocks(DOCS / "sizing.md", "console"))
def test_the_plans_are_real(block: str) -> None:
    command, output = block.replace("\\\n", " ").split("\n", 1)
    assert command.startswith("$ cached-attention ")
    result = CliRunner().invoke(app, shlex.split(command)[2:], env={"COLUMNS": "100"})
    assert (result.exit_code, result.output) == (0, output)


def test_counters_in_the_operations_page_exist(tmp_path: Path) -> None:
    pool = DevicePool([[torch.zeros(8, 1, 4) for _ in "kv"]], 2)
    fingerprint = Fingerprint("m", "w", "float32", 2, pool.layout.component_bytes, {}, {})
    remote = RemoteTier(parse_remote("--remote", "mooncake://127.0.0.1:1"), 0, fingerprint)  # Nobody is there.
    store = CachedAttentionStore(pool, 1 << 16, DiskTier(tmp_path, fingerprint, 4 << 20), remote=remote)
    known = {"page_size", "page_bytes", *store.counters()}
    store.close()
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \|", (DOCS / "operations.md").read_text(), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named
    assert named <= known


def test_versions_are_those_of_the_package() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = [one for one in package["dependencies"] if one.startswith("sglang==")]
    version = pin.removeprefix("sglang==")
    pages = [*DOCS.glob("*.md"), *(ROOT / "deploy").iterdir()]
    named = {number for page in pages for number in re.findall(r"SGLang (0\.\d+\.\d+)", page.read_text())}
    assert named == {version}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_links_out_of_the_front_pages_lead_somewhere(name: str) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / name).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []
