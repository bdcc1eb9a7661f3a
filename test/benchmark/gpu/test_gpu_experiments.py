"""Experiments that start no server run in full; what the others judge is tested without servers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmark.client import Round, TurnRecord
from benchmark.disk import Turn
from benchmark.gpu import disk, overlap, server, truncate
from benchmark.gpu.__main__ import EXPERIMENTS, main, parse
from benchmark.gpu.forward import Llama
from benchmark.gpu.loads import LOADS
from benchmark.gpu.outcome import Outcome
from benchmark.gpu.room import NoRoomError
from benchmark.gpu.server_log import slow_kernels, ways
from benchmark.gpu.setting import SHAPES, Setting
from benchmark.gpu.stored import StoredPages
from benchmark.gpu.traffic import DEVICE, HOST, RECOMPUTE, FirstToken


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Setting]:
    def make(experiment: str, *parts: str) -> Setting:
        return Setting(experiment, "cpu", "tiny", tmp_path, tmp_path / "scratch", parts)

    return make


def run(name: str, output: Path) -> dict:
    assert main([name, "--device", "cpu", "--output", str(output)]) == 0
    return json.loads((output / f"{name}-tiny.json").read_text())


def test_kernels_move_what_torch_says_and_compete_with_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = run("kernels", tmp_path)
    exact = next(bound for bound in content["bounds"] if bound["name"].startswith("bytes"))
    assert exact["measured"] == 0
    assert [bound["limit"] for bound in content["bounds"]] == [0.9, 0.8, 0]
    measured = [(row["direction"], row["page_tokens"]) for row in content["rows"] if "direction" in row]
    directions = ("save", "load", "load, rotated")
    assert measured == [(way, size) for size in (16, 32, 64, 128, 256) for way in directions]
    assert all(row["pinned_copy_gb_per_s"] > 0 for row in content["rows"] if "direction" in row)
    assert "no GPU, not a claim" in capsys.readouterr().out


def test_overlap_compares_four_ways_and_every_hit_answers_alike(tmp_path: Path) -> None:
    content = run("overlap", tmp_path)
    assert [(row["history"], row["new"]) for row in content["rows"]] == [(64, 16), (64, 64), (256, 16), (256, 64)]
    for row in content["rows"]:
        assert set(row["ttft_s"]) == set(overlap.WAYS)
        assert len(row["exposed_s"]) == SHAPES["tiny"].layers
        assert row["differing"] == 0
    assert [bound["limit"] for bound in content["bounds"]] == [1.1, 0.87, 0]


def test_a_forward_that_does_not_wait_answers_otherwise(tiny: Callable[..., Setting]) -> None:
    """So the comparison of logits in `overlap` would see a load that is late."""
    model = Llama(tiny("overlap"), 128, 64)
    history, question = model.words(64), model.words(16)
    model.prefill(history, 0)
    stored = StoredPages(model.pool, 1)
    with stored:
        keys, slots = stored.new_chain(1), stored.slots([0])
        stored.save(keys, slots)
        on_device = model.prefill(question, 64)
        model.kv[:, :, :64].zero_()
        assert not torch.equal(model.prefill(question, 64), on_device)
        number, arrival = stored.start_load(keys, slots)
        assert torch.equal(model.prefill(question, 64, arrival.wait), on_device)
        stored.finish_load(number)


def test_a_prefill_in_parts_is_a_prefill_at_once(tiny: Callable[..., Setting]) -> None:
    model = Llama(tiny("overlap"), 128, 64)
    tokens = model.words(96)
    at_once = model.prefill(tokens, 0)
    model.prefill(tokens[:70], 0)
    torch.testing.assert_close(model.prefill(tokens[70:], 70), at_once, rtol=1e-4, atol=1e-4)


def test_every_experiment_knows_every_shape() -> None:
    for sizes in (overlap.GRIDS, LOADS, truncate.SIZES, disk.SIZES):
        assert sizes.keys() == SHAPES.keys()


def test_what_is_run_is_checked_before_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = parse(["server", "--device", "cpu", "--parts", "decode,equality", "--output", str(tmp_path)])
    assert setting.name == "server-tiny-decode-equality"
    assert [setting.runs(part) for part in server.PARTS] == [False, False, True, False, True]
    with pytest.raises(SystemExit):
        parse(["server", "--parts", "everything"])
    assert "multiturn, zero-hit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["gears"])
    assert all(name in capsys.readouterr().err for name in EXPERIMENTS[:1])


@pytest.mark.parametrize(
    ("others", "most", "expected"),
    [
        (["stock", "hicache"], 4, [["stock", "hicache", "cached-attention"]]),
        (["stock", "hicache"], 2, [["stock", "cached-attention"], ["hicache", "cached-attention"]]),
        ([], 1, [["cached-attention"]]),
    ],
)
def test_ours_meets_all_others(others: list[str], most: int, expected: list[list[str]]) -> None:
    assert server.groups(others, most) == expected


def test_a_device_that_holds_one_server_compares_nothing() -> None:
    with pytest.raises(NoRoomError, match="more memory"):
        server.groups(["stock"], 1)


def test_pools_hold_what_runs_at_once_and_not_what_returns() -> None:
    for load in LOADS.values():
        pools, talks = load.pools(), load.multiturn
        assert pools.small_device >= 2 * (load.history + max(load.news))
        assert pools.small_device < talks.conversations * talks.tokens_per_conversation
        assert max(load.history + max(load.news), talks.tokens_per_conversation) < load.context


def first_tokens(**seconds: float) -> list[FirstToken]:
    names = {"device": DEVICE, "host": HOST, "again": RECOMPUTE}
    return [FirstToken(names.get(kind, kind), 16, 272, {}, value) for kind, value in seconds.items()]


def test_a_hit_is_judged_only_where_the_history_was_where_it_should_be() -> None:
    load = LOADS["tiny"]
    samples = first_tokens(device=1.0, host=1.5, again=6.0)
    assert server.worst_first_token(samples, load) == 1.5
    assert server.worst_first_token(samples[:1] + samples[2:], load) is None


@pytest.fixture
def compared(turn: Callable[..., TurnRecord]) -> Callable[..., list[Round]]:
    """One round each of two configurations, two answers in it, unless told otherwise alike."""

    def make(names: tuple[str, str], **changes: object) -> list[Round]:
        rounds = []
        for name, extra in zip(names, ({}, changes), strict=True):
            turns = tuple(turn(i, **{"output_ids": (i, 8, 9), "itl_s": (0.1, 0.1), **extra}) for i in range(2))
            rounds += [Round(name, index, 2.0, turns) for index in range(2)]
        return rounds

    return make


def judged(outcome: Outcome) -> dict[str, bool | None]:
    return {verdict.bound.name: verdict.passed for verdict in outcome.verdicts}


def test_equal_answers_count_only_when_something_was_reused(compared: Callable[..., list[Round]]) -> None:
    for cached, expected in (({"host": 64}, True), ({}, None)):
        outcome = Outcome("server", "cpu")
        server.judge_answers(compared(("device", "cached-attention"), cached=cached), outcome)
        assert judged(outcome)[server.EQUAL.name] is expected


def test_an_answer_that_differs_fails(compared: Callable[..., list[Round]]) -> None:
    outcome = Outcome("server", "cpu")
    wrong = {"cached": {"host": 64}, "output_ids": (0, 8, 7)}
    server.judge_answers(compared(("device", "cached-attention"), **wrong), outcome)
    assert judged(outcome)[server.EQUAL.name] is False


def test_slower_gaps_fail(compared: Callable[..., list[Round]]) -> None:
    for gaps, expected in (((0.1, 0.1), True), ((0.1, 0.11), False)):
        outcome = Outcome("server", "cpu")
        server.judge_gaps(compared(("stock", "cached-attention"), itl_s=gaps), outcome)
        assert judged(outcome) == {server.GAP.name: expected}


def test_bounds_that_were_not_come_to_are_named(
    tiny: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting, outcome = tiny("server", server.MULTITURN, server.EQUALITY), Outcome("server", "cpu")
    monkeypatch.setattr(server, "compare", lambda *_: None)
    monkeypatch.setattr(server, "compare_answers", lambda *_: None)
    server.run(setting, outcome)
    assert set(judged(outcome)) == {
        bound.name for bound in (server.TTFT, server.THROUGHPUT, server.EQUAL, server.TELLING)
    }
    assert not any(judged(outcome).values())


def test_hicache_without_its_kernels_is_not_compared_with(
    compared: Callable[..., list[Round]], tmp_path: Path
) -> None:
    log = tmp_path / "hicache.log"
    lines = [
        "[2026] Unsupported element_size = 48 for JIT HiCache kernel",
        "Failed to load JIT HiCache kernel: no",
    ]
    log.write_text("\n".join(["Load weight end.", "Failed to load a font", *lines]))
    assert slow_kernels(log) == lines
    assert slow_kernels(tmp_path / "none.log") == []
    rounds = compared(("hicache", "cached-attention"))
    for found in ([], lines):
        outcome = Outcome("server", "cpu")
        server.judge_multiturn([replace(one, turns=returning(one)) for one in rounds], outcome, found)
        assert set(judged(outcome)) == (set() if found else {server.TTFT.name, server.THROUGHPUT.name})
        assert len(outcome.notes) == len(found)


def returning(one: Round) -> tuple[TurnRecord, ...]:
    """Its turns as second ones of their conversations."""
    return tuple(replace(turn, turn=1) for turn in one.turns)


def test_the_log_of_ours_says_how_pages_move(tmp_path: Path) -> None:
    log = tmp_path / "ours.log"
    line = "CachedAttention: loads are made by a kernel (16 pages: copy engines 2 ms, a kernel 1 ms)."
    log.write_text(f"[2026-11-30 TP0] {line}\nCachedAttention: loads are quick\n")
    assert ways(log) == [line]


def test_servers_forget_before_each_part_and_hits_are_measured_last(
    tiny: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Only what the parts do to the servers, in order."""
    done: list[str] = []

    class Standing:
        urls: ClassVar = {"stock": "", "cached-attention": ""}

        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> Standing:
            return self

        def __exit__(self, *_: object) -> None: ...

        def flush(self) -> None:
            done.append("flush")

        def log(self, name: str) -> Path:
            return tmp_path / name

    def note(name: str) -> Callable[..., list[Round]]:
        return lambda *_, **__: done.append(name) or []

    monkeypatch.setattr(server, "Fleet", Standing)
    monkeypatch.setattr(server, "run_rounds", note("rounds"))
    monkeypatch.setattr(server, "measure_first_tokens", note("first tokens"))
    for name in ("judge_multiturn", "judge_zero_hit", "judge_gaps"):
        monkeypatch.setattr(server, name, lambda *_: None)
    monkeypatch.setattr("benchmark.gpu.traffic.Mixture.play", lambda *_: done.append("mixture"))
    setting = tiny("server", *server.PARTS[:-1])
    server.compare(setting, LOADS["tiny"], Outcome("server", "cpu"))
    assert done == [
        *("flush", "rounds", "flush", "rounds"),
        *("flush", "mixture", "mixture", "mixture", "mixture"),
        *("flush", "first tokens"),
    ]


def from_disk(tokens: int, seconds: float) -> Turn:
    return Turn("from disk", 0, seconds, 612, {"device": 0, "host": 0, "storage": tokens})


def test_only_histories_that_came_from_disk_in_full_count() -> None:
    again = Turn("recompute", 0, 2.0, 612, {"device": 0, "host": 0, "storage": 0})
    for turns, expected in (
        ([from_disk(512, 1.0), from_disk(448, 9.0), again], 0.5),
        ([from_disk(448, 1.0), again], None),
    ):
        outcome = Outcome("disk", "cpu")
        disk.judge(turns, 512, 1_024, outcome)
        assert [verdict.measured for verdict in outcome.verdicts] == [expected]
        assert "1 of 2" in outcome.notes[0] or "0 of 1" in outcome.notes[0]
    assert disk.TTFT.limit == pytest.approx(1.07)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_that_is_to_be_on_disk_is_evicted(shape: str, tmp_path: Path) -> None:
    """The arithmetic of the module's docstring, as sizes and shapes are now."""
    device = "cpu" if shape == "tiny" else "cuda"
    setting, sizes = Setting("disk", device, shape, tmp_path, tmp_path), disk.SIZES[shape]
    whole = -(-(sizes.history + sizes.new) // 64) * 64
    assert (2 * sizes.conversations + 2) * whole * setting.kv_bytes < 0.9 * sizes.tier_mb * 10**6
    assert sizes.history % 64 == 0
    assert whole < sizes.window


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_pinned_is_known_and_fits_128_gib(name: str, tmp_path: Path) -> None:
    for shape in ("llama-3-8b", "llama-2-13b"):
        setting = parse([name, "--device", "cuda", "--shape", shape, "--output", str(tmp_path)])
        pinned = importlib.import_module(f"benchmark.gpu.{name}").pinned_bytes(setting)
        assert 10**9 < pinned < 100 * 2**30


@pytest.mark.parametrize(
    ("failure", "status", "reason"),
    [
        (NoRoomError("use more"), 1, "use more"),
        (OSError("disk full"), 1, "disk full"),
        (SystemExit(143), None, "stopped, status 143"),
        (ZeroDivisionError("0"), None, "ZeroDivisionError: 0"),
    ],
)
def test_what_was_measured_before_a_failure_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    status: int | None,
    reason: str,
) -> None:
    def fail(setting: Setting, outcome: Outcome) -> None:
        outcome.rows.append({"speed": 1})
        raise failure

    monkeypatch.setattr("benchmark.gpu.kernels.run", fail)
    command = ["kernels", "--device", "cpu", "--output", str(tmp_path)]
    if status is None:
        with pytest.raises(type(failure)):
            main(command)
    else:
        assert main(command) == status
    content = json.loads((tmp_path / "kernels-tiny.json").read_text())
    assert content["rows"] == [{"speed": 1}]
    assert content["notes"] == [f"ended early: {reason}"]
