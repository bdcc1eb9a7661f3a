"""Conversations that leave host memory for the disk, and come back after hours, a restart or a crash."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmark.server import ServerError

HISTORY, CONVERSATIONS = 400, 20
TIGHT = ("--max-total-tokens", "2048")
HOST = "80MB"
PAGE = 64


@pytest.fixture
def disk(disk_tier: Any) -> Any:
    return lambda directory: disk_tier(directory, "2GB")


@pytest.fixture(scope="module")
def expected(answers: Any) -> Any:
    """Per conversation, per turn: the answers of a server that keeps everything on the device."""
    return answers(conversations=30, turns=6)


def verify(directory: Path) -> str:
    command = [str(Path(sys.executable).parent / "cached-attention"), "verify", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def has_disk(states: Any) -> bool:
    return "disk_pages" in states[0]


def histories(talk: Any) -> list[int]:
    """Tokens of each conversation that its last turn could reuse: whole pages of all but the last token."""
    return [(len(c.tokens) - 16 - 40 - 1) // PAGE * PAGE for c in talk.conversations]


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restart_goes_on_where_it_was(
    models: Any,
    start: Any,
    town: Any,
    store_states: Any,
    settled: Any,
    tmp_path: Path,
    disk: Any,
    end: str,
    expected: Any,
    matches: Any,
) -> None:
    actual = town(CONVERSATIONS, HISTORY)
    with start(models(), *TIGHT, *disk(tmp_path), host_size=HOST, doomed=end == "kill") as server:
        actual.hold(server, 3, (2,))
        if end == "stop":
            with pytest.raises(ServerError, match=f"disk-path: {tmp_path} is in use by process"):
                start(models(), *disk(tmp_path), host_size=HOST).__enter__()
            assert server.ready
        if end == "kill":
            settled(server)
            server.kill()
    with start(models(), *TIGHT, *disk(tmp_path), host_size=HOST) as server:
        assert store_states(server)[0]["host_pages_used"] == 0
        actual.hold(server, 1)
    assert matches(actual, expected)
    last = [conversation.cached[-1] for conversation in actual.conversations]
    assert [turn["storage"] for turn in last] == histories(actual)
    if end == "stop":
        other = town(2, HISTORY)
        with start(models(dtype="bfloat16"), *disk(tmp_path), host_size=HOST) as server:
            other.hold(server, 1)
        assert other.cached("storage") == other.cached("host") == 0
        verify(tmp_path)


def test_a_crash_at_any_moment_never_answers_wrong(
    models: Any, start: Any, town: Any, tmp_path: Path, disk: Any, expected: Any, matches: Any
) -> None:
    actual = town(8, HISTORY)
    with start(models(), *TIGHT, *disk(tmp_path), host_size=HOST, doomed=True) as server:
        crash = threading.Timer(random.Random(7).uniform(0.5, 1.5), server.kill)
        crash.start()
        with pytest.raises(ServerError):
            town(8, HISTORY).hold(server, 50)
        crash.join()
    with start(models(), *TIGHT, *disk(tmp_path), host_size=HOST) as server:
        actual.hold(server, 3)
    assert matches(actual, expected)
    verify(tmp_path)


def test_two_ranks_go_on_after_a_restart(
    models: Any, start: Any, town: Any, tmp_path: Path, disk: Any, answers: Any, matches: Any
) -> None:
    args = (*TIGHT, *disk(tmp_path), "--tp-size", "2")
    actual = town(4, HISTORY)
    with start(models(), *args, host_size=HOST) as server:
        actual.hold(server, 2)
    with start(models(), *args, host_size=HOST) as server:
        actual.hold(server, 1)
    assert matches(actual, answers("--tp-size", "2", conversations=12, turns=6))
    last = [conversation.cached[-1] for conversation in actual.conversations]
    assert [turn["storage"] for turn in last] == histories(actual)
    report = verify(tmp_path)
    assert all(f"dp0-pp0-tp{rank}/" in report for rank in range(2)), report


def update_weights(server: Any, model: Path, flush: bool) -> None:
    request = {"model_path": str(model), "flush_cache": flush, "torch_empty_cache": False}
    assert json.loads(server.post("/update_weights_from_disk", request))["success"]


def test_new_weights_never_meet_old_pages(
    models: Any,
    start: Any,
    town: Any,
    store_states: Any,
    settled: Any,
    tmp_path: Path,
    disk: Any,
    expected: Any,
    matches: Any,
) -> None:
    first, second, again = town(4, HISTORY), town(4, HISTORY), town(4, HISTORY)
    with start(models(), *TIGHT, *disk(tmp_path), host_size=HOST) as server:
        first.hold(server, 2)
        settled(server)
        update_weights(server, models(seed=1), flush=False)
        assert not has_disk(store_states(server))
        server.flush_cache()
        second.hold(server, 1)
        assert second.cached("storage") + second.cached("host") == 0
        assert second.answers[0] != first.answers[0][:1]
        update_weights(server, models(), flush=True)
        again.hold(server, 1)
        assert again.cached("storage") > 0
    assert matches(first, expected)
    assert matches(again, expected)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2
    verify(tmp_path)


def test_updates_that_do_not_tell_of_their_weights(
    models: Any, start: Any, town: Any, store_states: Any, settled: Any, tmp_path: Path, disk: Any
) -> None:
    """A trainer that writes into this server's memory, and an update that fails."""
    conversations = town(3, HISTORY)
    with start(models(), *TIGHT, *disk(tmp_path), host_size=HOST) as server:

        def comes_back_with_the_next_flush() -> bool:
            server.flush_cache()
            return has_disk(store_states(server))

        conversations.hold(server, 1)
        settled(server)
        server.post("/begin_weight_update", {})
        assert not has_disk(store_states(server))
        server.post("/end_weight_update", {})
        assert not has_disk(store_states(server))
        assert comes_back_with_the_next_flush()
        with pytest.raises(ServerError, match="400"):
            server.post("/update_weights_from_disk", {"model_path": str(tmp_path / "nothing")})
        assert not has_disk(store_states(server))
        assert comes_back_with_the_next_flush()
        conversations.hold(server, 1)
        with pytest.raises(ServerError, match="400"):
            server.post("/hicache/storage-backend/clear", {})
        assert has_disk(store_states(server))
    verify(tmp_path)


def test_an_engine_flushes_before_it_ends(models: Any, tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "engine.py"
    command = [sys.executable, str(example), "--model-path", str(models()), "--host-size", "100MB"]
    command += ["--disk-path", str(tmp_path / "kv")]
    runs = [subprocess.run(command, capture_output=True, text=True, timeout=300, check=False) for _ in range(2)]
    assert all(run.returncode == 0 for run in runs), runs[-1].stdout + runs[-1].stderr
    first = [run.stdout.splitlines()[0] for run in runs]
    assert all("turn 3: " in run.stdout for run in runs)
    assert "'storage': 0" in first[0]
    assert "'storage': 3456" in first[1]


def test_a_disk_is_detached_and_attached_while_the_server_runs(
    models: Any,
    start: Any,
    town: Any,
    store_states: Any,
    settled: Any,
    tmp_path: Path,
    expected: Any,
    matches: Any,
) -> None:
    first, second, third = (town(4, HISTORY) for _ in range(3))
    endpoint, settings = "/hicache/storage-backend", {"path": str(tmp_path / "kv"), "size": "1GB"}
    body = {
        "hicache_storage_backend": "disk",
        "hicache_storage_backend_extra_config_json": json.dumps(settings),
    }
    admin = {"Authorization": "Bearer secret"}
    args = (*TIGHT, "--cached-attention-wait", "complete", "--admin-api-key", "secret")
    with start(models(), *args, host_size=HOST) as server:
        first.hold(server, 1)
        assert not has_disk(store_states(server))
        with pytest.raises(ServerError, match="401"):
            server.request("PUT", endpoint, body)
        assert "attached" in server.request("PUT", endpoint, body, headers=admin)
        assert has_disk(store_states(server))
        second.hold(server, 2)
        assert settled(server)["disk_pages_used"] > 0
        assert "stay in the directory" in server.request("DELETE", endpoint, None, headers=admin)
        assert not has_disk(store_states(server))
        second.hold(server, 1)
        assert "attached" in server.request("PUT", endpoint, body, headers=admin)
        third.hold(server, 2)
        assert third.cached("storage") > 0, "what was written before it was detached"
    assert matches(first, expected)
    assert matches(second, expected)
    assert matches(third, expected)
    verify(tmp_path / "kv")
