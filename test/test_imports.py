"""Which part may know which other: the rules of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(part: str) -> Iterator[tuple[Path, str]]:
    """Absolute names of the modules that the files of `part` import, wherever in the file."""
    for path in sorted((ROOT / part).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield path, node.module


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [
        ("cached_attention", ("sglang", "sglang_cached_attention", "benchmark")),
        ("python", ("benchmark",)),
        ("cached_attention/policy", ("torch", "os", "pathlib", "threading")),
        ("cached_attention/simulator", ("torch",)),
    ],
)
def test_a_part_does_not_import(part: str, forbidden: tuple[str, ...]) -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path, module in imported(part)
        if any(is_below(module, package) for package in forbidden)
    ]
    assert found == []


def test_policies_know_the_index_alone() -> None:
    allowed = ("cached_attention.policy", "cached_attention.index")
    found = {
        module
        for _, module in imported("cached_attention/policy")
        if is_below(module, "cached_attention") and not any(is_below(module, known) for known in allowed)
    }
    assert found == set()


def test_the_simulator_runs_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; import cached_attention.simulator.engine"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
