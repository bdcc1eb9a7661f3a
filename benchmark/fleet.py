"""Servers of all compared configurations, running at the same time and driven one at a time, in rounds."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from tqdm import tqdm

from benchmark.client import Round, play
from benchmark.configuration import Configuration
from benchmark.server import Server, stop_all
from benchmark.workload import WorkloadShape, make_workload

WARM_UP_ROUND = -1
# In a file or a pipe every redraw of a progress bar is a line: write few of them.
IS_TERMINAL = sys.stderr.isatty()
REDRAW_S = 0.1 if IS_TERMINAL else 15.0


@dataclass(frozen=True)
class Plan:
    """What every configuration runs: the workload, its seed and number of rounds, requests in flight, and the
    vocabulary size of the model."""

    shape: WorkloadShape
    rounds: int
    seed: int
    concurrency: int
    vocabulary: int


class Fleet:
    """One running server per configuration; leaving the context stops them all.

    They start one after another, because each measures free memory. ServerError if one fails.
    """

    def __init__(
        self, model: Path, configurations: Sequence[Configuration], logs: Path, timeout_s: float = 600
    ) -> None:
        self.model = model
        self.configurations = configurations
        self.logs = logs
        self.timeout_s = timeout_s
        self._servers: list[Server] = []

    def __enter__(self) -> Self:
        self.urls: dict[str, str] = {}
        try:
            with tqdm(self.configurations, desc="starting servers", unit="server") as bar:
                for configuration in bar:
                    bar.set_postfix_str(configuration.name)
                    self.urls[configuration.name] = self._start(configuration, bar).url
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def flush(self) -> None:
        """Every server forgets every cached token, in all of its tiers. ServerError if one refuses."""
        for server in self._servers:
            server.flush_cache()

    def log(self, name: str) -> Path:
        """Log of the server of the configuration `name`."""
        return self.logs / f"{name}.log"

    def _stop(self) -> None:
        servers, self._servers = self._servers, []
        stop_all(servers)

    def _start(self, configuration: Configuration, bar: tqdm[Configuration]) -> Server:
        log = self.log(configuration.name)
        server = Server(self.model, configuration.args, log=log, timeout_s=self.timeout_s)
        self._servers.append(server)
        return server.wait_ready(bar.refresh if IS_TERMINAL else lambda: None)


def run_rounds(urls: dict[str, str], plan: Plan) -> list[Round]:
    """Play every round of `plan` on every server of `urls` (by configuration), after an unrecorded warm-up.

    Configurations alternate within a round and change their order from round to round, so that noise of the
    machine affects all alike. In a round all of them get the same conversations, which occur in no other round.
    """
    turns = plan.shape.total_turns * plan.rounds * len(urls)
    results = []
    with tqdm(total=turns, desc="turns", unit="turn", mininterval=REDRAW_S) as bar:
        for url in urls.values():
            bar.set_postfix_str("warming up")
            _warm_up(url, plan)
        for index, name in schedule(list(urls), plan.rounds):
            bar.set_postfix_str(f"round {index + 1}/{plan.rounds}, {name}")
            results.append(_play_round(urls[name], plan, name, index, bar))
    return results


def schedule(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, configuration) in execution order: each round starts with the next configuration."""
    for index in range(rounds):
        first = index % len(names)
        for name in (*names[first:], *names[:first]):
            yield index, name


def _play_round(url: str, plan: Plan, name: str, index: int, bar: tqdm[object]) -> Round:
    conversations = make_workload(plan.shape, plan.seed, index, plan.vocabulary)
    output, concurrency = plan.shape.output, plan.concurrency
    return play(url, conversations, output, concurrency, configuration=name, round_index=index, progress=bar)


def _warm_up(url: str, plan: Plan) -> None:
    shape = replace(plan.shape, conversations=1, turns=min(2, plan.shape.turns), think_time_s=0.0)
    conversations = make_workload(shape, plan.seed, WARM_UP_ROUND, plan.vocabulary)
    play(url, conversations, shape.output, concurrency=1)
