"""How long do returning users wait? Drives conversations against SGLang over HTTP and reports.

Against a server that is already running:

    python -m benchmark.multiturn --base-url http://127.0.0.1:30000

Stock SGLang, CachedAttention and a device that holds everything, started and compared in one run:

    python -m benchmark.multiturn --compare --model-path out/model

What does CachedAttention cost if nothing can be reused?

    python -m benchmark.multiturn --compare --workload zero-hit --configurations stock,cached-attention
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from benchmark.client import Round
from benchmark.configuration import configurations, fitting_pools
from benchmark.figure import save_multiturn, save_zero_hit
from benchmark.fleet import Fleet, Plan, run_rounds
from benchmark.report import mismatch_lines, multiturn_table, write_json, zero_hit_table
from benchmark.server import DIRECT, ServerError
from benchmark.summary import agreement, by_configuration, summarise
from benchmark.workload import WorkloadShape


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--base-url", help="server that runs already")
    target.add_argument("--compare", action="store_true", help="start and compare the --configurations")
    parser.add_argument(
        "--workload",
        choices=("multiturn", "zero-hit"),
        default="multiturn",
        help="zero-hit: one turn per conversation, all at once, medians over the rounds",
    )
    _add_shape(parser)
    parser.add_argument("--rounds", type=int, default=2, help="each with conversations of its own")
    parser.add_argument("--concurrency", type=int, default=2, help="requests in flight at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, help="tokens; default: as the model's config says")
    parser.add_argument("--output", type=Path, default=Path("out/multiturn"), help="of .json and .png")
    _add_comparison(parser)
    args = parser.parse_args(arguments)
    if args.rounds < 1 or args.concurrency < 1:
        parser.error("--rounds and --concurrency must be at least 1")
    return args


def _add_shape(parser: argparse.ArgumentParser) -> None:
    shape = parser.add_argument_group("workload", "lengths in tokens")
    shape.add_argument("--conversations", type=int, default=8)
    shape.add_argument("--turns", type=int, default=4, help="per conversation; the first is the cold one")
    shape.add_argument("--history", type=int, default=1_500, help="length of what precedes the first question")
    shape.add_argument("--new", type=int, default=48, help="what the user adds in a turn")
    shape.add_argument("--out", type=int, default=16, help="length of an answer")
    shape.add_argument("--arrival-rate", type=float, default=4.0, help="conversations per second; 0: all at once")
    shape.add_argument("--think-time", type=float, default=4.0, help="mean seconds between answer and next turn")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    compare = parser.add_argument_group("comparison", "with --compare")
    compare.add_argument("--model-path", type=Path, default=Path("out/model"))
    compare.add_argument(
        "--configurations",
        default="stock,cached-attention,device",
        help="the first is the reference; also, where there is a GPU: hicache",
    )
    compare.add_argument(
        "--device-fraction",
        type=float,
        default=0.3,
        help="part of a round's tokens that the small device pool holds",
    )
    compare.add_argument("--host-gb", type=int, default=4, help="size of the host tier")
    compare.add_argument("--page-size", type=int, default=64, help="tokens per page, for every configuration")
    compare.add_argument("--server-args", default="", help="more arguments for every server, in one string")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    try:
        rounds = _compare(args) if args.compare else _drive(args)
    except (ServerError, ValueError) as failure:
        print(f"multiturn: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    _report(args, rounds)
    return 0


def _shape(args: argparse.Namespace) -> WorkloadShape:
    shape = WorkloadShape(
        conversations=args.conversations,
        turns=args.turns,
        history=args.history,
        new=args.new,
        output=args.out,
        arrival_rate=args.arrival_rate,
        think_time_s=args.think_time,
    )
    # Each prompt once, with the server always busy: what counts is throughput.
    return replace(shape, turns=1, arrival_rate=0.0) if args.workload == "zero-hit" else shape


def _drive(args: argparse.Namespace) -> list[Round]:
    if args.vocabulary is None:
        args.vocabulary = vocabulary_of(_model_of(args.base_url))
    return run_rounds({"server": args.base_url}, _plan(args, _shape(args)))


def _model_of(base_url: str) -> str:
    try:
        with DIRECT.open(f"{base_url.rstrip('/')}/model_info", timeout=60) as response:
            return str(json.load(response)["model_path"])
    except OSError as failure:
        raise ServerError(f"{base_url} does not say which model it serves: {failure}") from failure


def _compare(args: argparse.Namespace) -> list[Round]:
    shape = _shape(args)
    check_context(shape, args.model_path)
    args.vocabulary = args.vocabulary or vocabulary_of(str(args.model_path))
    pools = fitting_pools(shape, args.concurrency, args.device_fraction, args.host_gb, args.page_size)
    chosen = configurations(args.configurations.split(","), pools, shlex.split(args.server_args))
    for one in chosen:
        print(f"{one.name}: {shlex.join(one.args)}")
    with Fleet(args.model_path, chosen, logs=args.output.parent / "logs") as fleet:
        return run_rounds(fleet.urls, _plan(args, shape))


def _plan(args: argparse.Namespace, shape: WorkloadShape) -> Plan:
    return Plan(shape, args.rounds, args.seed, args.concurrency, args.vocabulary)


def vocabulary_of(model: str) -> int:
    """Vocabulary size according to the model's config."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(model).get_text_config().vocab_size)


def check_context(shape: WorkloadShape, model: Path) -> None:
    """ValueError if a conversation of `shape` outgrows the context window of the model."""
    from transformers import AutoConfig

    context = AutoConfig.from_pretrained(str(model)).get_text_config().max_position_embeddings
    if shape.tokens_per_conversation >= context:
        raise ValueError(
            f"a conversation reaches {shape.tokens_per_conversation} tokens, but {model} takes {context}; "
            "lower --history, --turns, --new or --out"
        )


def _report(args: argparse.Namespace, rounds: list[Round]) -> None:
    groups = by_configuration(rounds)
    reference = next(iter(groups))
    first_measured = 0 if args.workload == "zero-hit" or args.turns == 1 else 1
    summaries = [summarise(group, first_measured) for group in groups.values()]
    agreements = [agreement(group, groups[reference]) for name, group in groups.items() if name != reference]
    console = Console()
    if args.workload == "zero-hit":
        console.print(zero_hit_table(rounds))
        save_zero_hit(args.output.with_suffix(".png"), rounds)
    else:
        console.print(multiturn_table(summaries, agreements))
        save_multiturn(args.output.with_suffix(".png"), rounds, summaries)
    for line in mismatch_lines(agreements):
        console.print(line)
    write_json(args.output.with_suffix(".json"), vars(args), rounds, summaries=summaries, agreements=agreements)
    console.print(f"saved {args.output.with_suffix('.json')} and {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    # The servers run in process groups of their own: exit in a way that stops them.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    sys.exit(main())
