"""The tools that SGLang's users have already, and the examples, against our server."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmark.server import Server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(models: Any, start: Any) -> Iterator[Server]:
    with start(models(), "--max-total-tokens", "4096", host_size="300MB") as server:
        yield server


def run(*command: str | Path) -> str:
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_openai_client(server: Server) -> None:
    output = run(sys.executable, "examples/chat_openai.py", "--base-url", server.url)
    assert output.count("cached_tokens=") == 3


def test_frontend_program(server: Server) -> None:
    assert "summary: cached_tokens=" in run(sys.executable, "examples/frontend.py", "--base-url", server.url)


def test_top_says_what_a_server_without_metrics_lacks(server: Server) -> None:
    command = [str(Path(sys.executable).parent / "cached-attention"), "top", server.url, "--once"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1
    assert "--enable-metrics" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_bench_serving(server: Server) -> None:
    output = run("examples/bench_serving.sh", "--base-url", server.url, "--model-path", server.model)
    assert output.count("Serving Benchmark Result") == 2
    assert "Successful requests:                     16" in output


def test_bench_serving_under_its_old_name(server: Server) -> None:
    output = run(
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", server.url),
        *("--dataset-name", "random-ids", "--tokenize-prompt", "--num-prompts", "4", "--random-input-len", "64"),
        *("--random-output-len", "4", "--output-file", "/dev/null"),
        *("--model", server.model, "--tokenizer", server.model),
    )
    assert "Successful requests:                     4" in output
