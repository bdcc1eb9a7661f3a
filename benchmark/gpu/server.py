"""What does a user get from real servers: stock SGLang that recomputes, stock SGLang with HiCache, and ours?

Parts, in this order: `multiturn`, `zero-hit` (nothing can be reused), `decode` (gaps between the tokens of long
answers while other prompts are computed and saved), `first-token` (a device hit, a host hit and a miss, one
request at a time, on our server), `equality` (our answers, token for token, against a server whose device holds
everything; on a GPU once without and once with CUDA graphs of prefills). All servers forget what they cached
before each part.

Weights are random (--load-format dummy), except for `equality`, whose model is small and made so that every
answer depends on all of its context. Servers that are compared run at the same time and alternate; if the GPU
cannot hold all of them, ours is compared with a few of the others at a time.

Notes say how our server moves pages. If HiCache cannot use one of its kernels, its bounds are not measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from tqdm import tqdm

from benchmark.client import Round
from benchmark.configuration import Pools, configurations, fitting_pools
from benchmark.fleet import Fleet, Plan, run_rounds, schedule
from benchmark.gpu.bound import Bound
from benchmark.gpu.loads import LOADS, PAGE, Load
from benchmark.gpu.outcome import Outcome
from benchmark.gpu.room import NoRoomError
from benchmark.gpu.server_log import slow_kernels, ways
from benchmark.gpu.setting import Setting
from benchmark.gpu.traffic import DEVICE, HOST, RECOMPUTE, FirstToken, Prompts
from benchmark.model import make_model
from benchmark.multiturn import vocabulary_of
from benchmark.summary import agreement, by_configuration, paired_ratios, summarise, total_throughput
from benchmark.workload import WorkloadShape

OURS, STOCK, HICACHE, LARGE = "cached-attention", "stock", "hicache", "device"
MULTITURN, ZERO_HIT, DECODE, FIRST_TOKEN, EQUALITY = PARTS = (
    "multiturn",
    "zero-hit",
    "decode",
    "first-token",
    "equality",
)
SEED = 0
START_S = 300.0
SAMPLES = 3
"""Of each hit, per length."""
BESIDE = 6 << 30
"""Bytes of GPU memory that a server needs besides weights and KV: context, CUDA graphs, activations."""
LONG_TALKS = WorkloadShape(6, 3, history=1_500, new=48, output=24)
SHORT_TALKS = WorkloadShape(3, 2, history=300, new=16, output=8)
"""For `equality`, on a GPU and without: the device holds half of them, so they return from host memory."""
EXACT_ATTENTION = "triton"
"""FlashInfer has no modules for the small model's heads until it compiles them."""
EQUALITY_HOST_GB = 2
PREFILL_GRAPHS = (
    "--cuda-graph-backend-prefill=breakable",
    *("--cuda-graph-bs-prefill", "64", "128", "256", "512", "2048"),
)
"""SGLang's default for prefills, but with a few sizes (in tokens) instead of 58, whose capture takes a minute."""

TTFT = Bound("TTFT of returning turns to HiCache's", 1.0)
THROUGHPUT = Bound("multi-turn throughput to HiCache's", 1.0, at_least=True)
IDLE = Bound("throughput to stock's with nothing to reuse", 0.98, at_least=True)
GAP = Bound("gap between tokens while saving to stock's, the higher of mean and median", 1.03)
EQUAL = Bound("answers that differ from a large device pool's", 0, unit="")
EQUAL_IN_GRAPHS = Bound("answers that differ from a large device pool's, prefills in CUDA graphs", 0, unit="")
TELLING = Bound("answers that are unlike all others", 0.9, at_least=True, unit="")


def run(setting: Setting, outcome: Outcome) -> None:
    load = LOADS[setting.shape_name]
    try:
        if _is_timed(setting):
            compare(setting, load, outcome)
        if setting.runs(EQUALITY):
            compare_answers(setting, outcome)
        if setting.runs(EQUALITY) and setting.is_real_gpu:
            compare_answers(setting, outcome, in_graphs=True)
    finally:
        _add_what_is_missing(setting, load, outcome)


def pinned_bytes(setting: Setting) -> int:
    """Ours and HiCache run at the same time."""
    servers = [OURS, *others(setting)]
    host_gb = LOADS[setting.shape_name].host_gb * (2 if HICACHE in servers else 1)
    return 10**9 * (host_gb if _is_timed(setting) else EQUALITY_HOST_GB)


def _is_timed(setting: Setting) -> bool:
    return any(map(setting.runs, (MULTITURN, ZERO_HIT, DECODE, FIRST_TOKEN)))


def _add_what_is_missing(setting: Setting, load: Load, outcome: Outcome) -> None:
    """Add the bounds of requested parts that could not be measured."""
    bounds = {
        FIRST_TOKEN: (load.first_token,),
        MULTITURN: (TTFT, THROUGHPUT),
        ZERO_HIT: (IDLE,),
        DECODE: (GAP,),
        EQUALITY: (EQUAL, *([EQUAL_IN_GRAPHS] if setting.is_real_gpu else []), TELLING),
    }
    judged = {verdict.bound for verdict in outcome.verdicts}
    wanted = [bound for part in filter(setting.runs, PARTS) for bound in bounds[part]]
    outcome.add(*(bound.judge(None) for bound in wanted if bound not in judged))


def compare(setting: Setting, load: Load, outcome: Outcome) -> None:
    """Run all parts that measure time."""
    pools = load.pools()
    for number, names in enumerate(groups(others(setting), room(setting, pools))):
        chosen = configurations(names, pools, setting.server_args)
        outcome.notes += [f"{one.name}: {' '.join(one.args)}" for one in chosen]
        logs = setting.scratch / "logs" / setting.name / str(number)
        with Fleet(setting.model(load.context), chosen, logs, START_S) as fleet:
            outcome.notes += ways(fleet.log(OURS))
            measure_in_turns(setting, load, fleet, outcome)
            if number == 0 and setting.runs(FIRST_TOKEN):
                fleet.flush()
                measure_first_tokens(setting, load, pools, fleet.urls[OURS], outcome)


def others(setting: Setting) -> list[str]:
    """Configurations that ours is compared with in the parts that run. HiCache needs a real GPU."""
    hicache = [HICACHE] if setting.is_real_gpu and setting.runs(MULTITURN) else []
    return [STOCK, *hicache] if any(map(setting.runs, (MULTITURN, ZERO_HIT, DECODE))) else []


def groups(others: Sequence[str], most: int) -> list[list[str]]:
    """Groups of at most `most` servers that compare ours with each of `others`.

    Raises:
        NoRoomError: `most` is too small for a comparison.
    """
    if most < min(len(others), 1) + 1:
        raise NoRoomError(
            f"the device holds {most} of these servers: use a GPU with more memory, or a smaller shape."
        )
    size = max(1, most - 1)
    return [[*others[first : first + size], OURS] for first in range(0, len(others), size)] or [[OURS]]


def room(setting: Setting, pools: Pools) -> int:
    """Number of servers that fit on the device."""
    if not setting.is_real_gpu:
        return len(PARTS)
    free, _ = torch.cuda.mem_get_info()
    return int(free // (setting.weight_bytes + pools.small_device * setting.kv_bytes + BESIDE))


def measure_in_turns(setting: Setting, load: Load, fleet: Fleet, outcome: Outcome) -> None:
    """Each part begins with empty caches: else ours would evict what an earlier part left, and stock would not.

    The warm-up of each part is not measured, and follows.
    """
    urls = fleet.urls
    plan = Plan(load.multiturn, load.rounds, SEED, load.concurrency, setting.shape.vocabulary)
    if setting.runs(MULTITURN) and len(urls) > 1:
        fleet.flush()
        judge_multiturn(run_rounds(urls, plan), outcome, slow_kernels(fleet.log(HICACHE)))
        outcome.save(setting.output)
    pair = {name: urls[name] for name in (STOCK, OURS) if name in urls}
    if len(pair) < 2:
        return
    if setting.runs(ZERO_HIT):
        fleet.flush()
        judge_zero_hit(run_rounds(pair, replace(plan, shape=load.zero_hit, rounds=2 * load.rounds)), outcome)
        outcome.save(setting.output)
    if setting.runs(DECODE):
        fleet.flush()
        turns = list(schedule(list(pair), 2 * load.rounds))
        judge_gaps(
            [
                load.mixture.play(pair[name], name, index, SEED, plan.vocabulary)
                for index, name in tqdm(turns, "answers while others arrive", unit="round")
            ],
            outcome,
        )
        outcome.save(setting.output)


def measure_first_tokens(setting: Setting, load: Load, pools: Pools, url: str, outcome: Outcome) -> None:
    prompts = Prompts(url, setting.shape.vocabulary, pools.small_device, PAGE, SEED)
    # Warm-up: compiling at first use must not count. One length is enough: what is compiled depends on dtypes and
    # heads. What cuBLAS loads for one shape makes its first sample slow; of three, that is not the median.
    list(prompts.first_tokens(load.history, load.news[0]))
    samples = [
        sample
        for new in tqdm(load.news, "first tokens", unit="length")
        for _ in range(SAMPLES if setting.on_gpu else 1)
        for sample in prompts.first_tokens(load.history, new)
    ]
    outcome.rows += [{"part": FIRST_TOKEN, **asdict(sample)} for sample in samples]
    outcome.add(load.first_token.judge(worst_first_token(samples, load)))
    outcome.save(setting.output)


def worst_first_token(samples: Sequence[FirstToken], load: Load) -> float | None:
    """The number that the bound is about, from medians; None if a history was never in the intended tier."""
    numbers = []
    for new in load.news:
        times = [
            [one.ttft_s for one in samples if (one.kind, one.new) == (kind, new)]
            for kind in (DEVICE, HOST, RECOMPUTE)
        ]
        if not all(times):
            return None
        device, host, recompute = map(statistics.median, times)
        numbers.append(1 - host / recompute if load.first_token.at_least else host / device)
    return min(numbers) if load.first_token.at_least else max(numbers)


def judge_multiturn(rounds: Sequence[Round], outcome: Outcome, handicaps: Sequence[str] = ()) -> None:
    """`handicaps`: why HiCache is slower here than it can be; if there are any, it is not compared with."""
    group = by_configuration(rounds)
    summaries = {name: summarise(of_one) for name, of_one in group.items()}
    outcome.rows += [{"part": MULTITURN, **asdict(summary)} for summary in summaries.values()]
    outcome.rows += [_row(MULTITURN, one) for one in rounds]
    if STOCK in group:
        ratio = summaries[OURS].ttft.mean / summaries[STOCK].ttft.mean
        outcome.notes.append(f"TTFT of returning turns to stock's: {ratio:.3f}x")
    if HICACHE in group and handicaps:
        outcome.notes += [f"not compared with HiCache, which runs without its kernel: {one}" for one in handicaps]
    elif HICACHE in group:
        outcome.add(TTFT.judge(summaries[OURS].ttft.mean / summaries[HICACHE].ttft.mean))
        outcome.add(THROUGHPUT.judge(statistics.median(paired_ratios(group[OURS], group[HICACHE]))))


def judge_zero_hit(rounds: Sequence[Round], outcome: Outcome) -> None:
    group = by_configuration(rounds)
    outcome.rows += [_row(ZERO_HIT, one) for one in rounds]
    outcome.add(IDLE.judge(statistics.median(paired_ratios(group[OURS], group[STOCK]))))


def judge_gaps(rounds: Sequence[Round], outcome: Outcome) -> None:
    """Both servers meanwhile compute the same prompts; only ours saves them. The first round does not count."""
    group = by_configuration(one for one in rounds if one.index)
    gaps = {name: [_gaps(one) for one in of_one] for name, of_one in group.items()}
    outcome.rows += [_row(DECODE, one) | {"gap_s": _spread(_gaps(one))} for one in rounds]
    ratios = [
        statistics.median(
            middle(ours) / middle(stock) for ours, stock in zip(gaps[OURS], gaps[STOCK], strict=True)
        )
        for middle in (statistics.mean, statistics.median)
    ]
    outcome.add(GAP.judge(max(ratios)))


def _gaps(one: Round) -> list[float]:
    return [gap for turn in one.turns for gap in turn.itl_s]


def _spread(gaps: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(gaps, n=100)
    return {"mean": statistics.mean(gaps), "p50": cuts[49], "p99": cuts[98]}


def _row(part: str, one: Round) -> dict[str, Any]:
    turns = [{key: value for key, value in asdict(turn).items() if key != "itl_s"} for turn in one.turns]
    return {
        "part": part,
        "configuration": one.configuration,
        "round": one.index,
        "wall_s": one.wall_s,
        "tokens_per_s": total_throughput(one),
        "turns": turns,
    }


def compare_answers(setting: Setting, outcome: Outcome, in_graphs: bool = False) -> None:
    """Compare answers, one request at a time: both servers compute the same batches on the same prefixes.

    `in_graphs`: whether prefills run in CUDA graphs, as by default; needs a real GPU.
    """
    models = setting.scratch / "models"
    if setting.on_gpu:
        model, shape = make_model(models / "telling-100m", "100m", 4_096, "bfloat16"), LONG_TALKS
    else:
        model, shape = make_model(models / "telling-tiny", "tiny", 4_096, "float32"), SHORT_TALKS
    pools = fitting_pools(shape, 1, device_fraction=0.5, host_gb=EQUALITY_HOST_GB, page_size=PAGE)
    args = (*setting.device_args(EXACT_ATTENTION), *(PREFILL_GRAPHS if in_graphs else ()))
    chosen = configurations((OURS, LARGE), pools, args)
    logs = setting.scratch / "logs" / setting.name / (EQUALITY + ("-in-graphs" if in_graphs else ""))
    with Fleet(model, chosen, logs, START_S) as fleet:
        outcome.notes += ways(fleet.log(OURS))
        rounds = run_rounds(fleet.urls, Plan(shape, 1, SEED, 1, vocabulary_of(str(model))))
    judge_answers(rounds, outcome, EQUAL_IN_GRAPHS if in_graphs else EQUAL)
    outcome.save(setting.output)


def judge_answers(rounds: Sequence[Round], outcome: Outcome, equal: Bound = EQUAL) -> None:
    group = by_configuration(rounds)
    found = agreement(group[OURS], group[LARGE])
    answers = [turn.output_ids for one in group[LARGE] for turn in one.turns]
    part = EQUALITY if equal is EQUAL else f"{EQUALITY}, in graphs"
    outcome.rows += [_row(part, one) for one in rounds] + [{"part": part, **asdict(found)}]
    from_host = sum(turn.cached.get("host", 0) for one in group[OURS] for turn in one.turns)
    outcome.notes.append(
        f"{equal.name}: {found.compared} answers, {from_host} prompt tokens of them from host memory"
    )
    # If nothing came back from host memory, equal answers prove nothing.
    outcome.add(equal.judge(len(found.mismatches) if from_host else None))
    if equal is EQUAL:
        outcome.add(TELLING.judge(len(set(answers)) / len(answers)))
