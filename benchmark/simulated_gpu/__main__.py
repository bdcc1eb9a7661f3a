"""Runs Python with a simulated GPU: `python -m benchmark.simulated_gpu ARGUMENTS OF PYTHON`."""

import os
import sys

from benchmark.simulated_gpu.environment import with_gpu

if __name__ == "__main__":
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {**os.environ, **with_gpu()})
