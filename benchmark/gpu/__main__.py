"""Runs one experiment and reports for each bound whether it holds.

    python -m benchmark.gpu kernels
    python -m benchmark.gpu server --shape llama-2-13b --parts first-token

Without a GPU every experiment runs on a tiny model, to show that it works: its numbers are no claim. Writes
OUTPUT/EXPERIMENT.json, and OUTPUT/table.md with one line per experiment; an experiment that is ended early writes
what it has.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, ModuleType

import torch
from rich.console import Console

from benchmark.gpu.outcome import NOT_A_CLAIM, Outcome
from benchmark.gpu.room import HostMemory, NoRoomError
from benchmark.gpu.setting import SHAPES, Setting
from benchmark.server import ServerError

EXPERIMENTS = ("kernels", "overlap", "server", "truncate", "disk")
EXPECTED = (ServerError, NoRoomError, OSError)
"""Failures whose message says all that there is to say."""


def parse(arguments: Sequence[str] | None = None) -> Setting:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU where there is one")
    parser.add_argument("--shape", choices=SHAPES, help="default: llama-3-8b on a GPU, tiny without")
    parser.add_argument("--parts", default="", help="of the experiment, separated by commas; default: all")
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), help="directory of the results")
    parser.add_argument("--scratch", type=Path, help="directory of logs, models and pages; default: OUTPUT")
    args = parser.parse_args(arguments)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = args.shape or ("tiny" if device == "cpu" else "llama-3-8b")
    parts = tuple(filter(None, args.parts.split(",")))
    known = getattr(_experiment(args.experiment), "PARTS", ())
    if not set(parts) <= set(known):
        parser.error(f"--parts is {args.parts!r}; {args.experiment} has {', '.join(known) or 'none'}")
    return Setting(args.experiment, device, shape, args.output, args.scratch or args.output, parts)


def _experiment(name: str) -> ModuleType:
    return importlib.import_module(f"benchmark.gpu.{name}")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every bound was measured and holds, or if there is no GPU for the bounds to apply to."""
    setting = parse(arguments)
    outcome = Outcome(setting.name, setting.device)
    experiment = _experiment(setting.experiment)
    try:
        if setting.on_gpu:
            _check_host_memory(HostMemory.now(experiment.pinned_bytes(setting)), outcome)
        experiment.run(setting, outcome)
    except BaseException as failure:
        outcome.notes.append(f"ended early: {_reason(failure)}")
        outcome.save(setting.output)
        if not isinstance(failure, EXPECTED):
            raise
        print(f"{setting.name}: {failure}", file=sys.stderr)
        return 1
    path = outcome.save(setting.output)
    _report(outcome, path)
    return 0 if outcome.passed or not outcome.is_claim else 1


def _check_host_memory(memory: HostMemory, outcome: Outcome) -> None:
    outcome.host_memory = memory._asdict()
    print(memory)
    memory.require()


def _reason(failure: BaseException) -> str:
    if isinstance(failure, SystemExit):
        return f"stopped, status {failure.code}"
    return str(failure) if isinstance(failure, EXPECTED) else f"{type(failure).__name__}: {failure}"


def _report(outcome: Outcome, path: Path) -> None:
    console = Console(soft_wrap=True, highlight=False)
    if not outcome.is_claim:
        console.print(NOT_A_CLAIM)
    for line in (*outcome.verdicts, *outcome.notes):
        console.print(f"  {line}")
    console.print(f"saved {path} and {path.with_name('table.md')}")


def _stop(number: int, _frame: FrameType | None) -> None:
    """The servers run in process groups of their own: exit in a way that stops them."""
    # `timeout` may send it twice, and the second must not end the stopping.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cached_attention").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
