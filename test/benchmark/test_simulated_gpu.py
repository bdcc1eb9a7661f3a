"""What needs a GPU, on a simulated one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.simulated_gpu.environment import with_gpu

ROOT = Path(__file__).parents[2]
LATE = 2_000
"""Microseconds at most."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Python with the simulated GPU."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**environment, **with_gpu(LATE)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_tests_that_need_a_gpu_pass() -> None:
    files = ("test/cached_attention/transfer", "test/sglang/srt/mem_cache/test_layer_events.py")
    done = run("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^11 passed, \d+ deselected", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("experiment", ["kernels", "overlap"])
def test_experiments_for_gpus_run(tmp_path: Path, experiment: str) -> None:
    done = run("-m", "benchmark.gpu", experiment, "--shape", "tiny", "--output", str(tmp_path))
    assert done.returncode in (0, 1), done.stdout + done.stderr
    exact = r"(bytes that differ after save|hits whose logits differ).*: 0 \(<= 0\) pass"
    assert re.search(exact, done.stdout), done.stdout + done.stderr


def test_a_transfer_that_is_not_waited_for_is_seen() -> None:
    """Else nothing here could fail."""
    program = """
import torch
there = torch.zeros(4, device="cuda")
from cached_attention.transfer.cuda_stream import CudaStream
from cached_attention.transfer.streams import Priority
stream = CudaStream(there.device, "load", Priority.HIGH)
missed = 0
for i in range(1, 40):
    ready = torch.cuda.current_stream().record_event()
    stream.wait(ready)
    (event,) = stream.run([lambda: there.copy_(torch.full((4,), float(i)).pin_memory(), non_blocking=True)])
    missed += there.sum().item() != 4 * i
    event.synchronize()
    assert there.sum().item() == 4 * i
print("missed", missed)
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0


def test_a_graph_runs_again_what_it_recorded_on_several_streams() -> None:
    program = """
import torch
x, side, done = torch.zeros(4, device="cuda"), torch.cuda.Stream(), torch.cuda.Event(external=True)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x * 2
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        z = y + 1
    torch.cuda.current_stream().wait_stream(side)
    done.record()
    z += x
for i in range(5):
    x.fill_(i)
    graph.replay()
    done.synchronize()
    print(*y.tolist(), *z.tolist())
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    expected = [" ".join(4 * [f"{2.0 * i}"] + 4 * [f"{3.0 * i + 1}"]) for i in range(5)]
    assert done.stdout.splitlines() == expected


@pytest.mark.parametrize(
    "forbidden",
    ["x.sum().item()", "x.cpu()", "torch.cuda.current_stream().wait_event(before)", "before.wait()"],
)
def test_a_graph_refuses_what_a_gpu_cannot_record(forbidden: str) -> None:
    program = f"""
import torch
x = torch.zeros(4, device="cuda")
before = torch.cuda.current_stream().record_event()
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        y = x + 1
        {forbidden}
except RuntimeError as error:
    print("refused")
print(*(x + 1).tolist())
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["refused", "1.0 1.0 1.0 1.0"]
