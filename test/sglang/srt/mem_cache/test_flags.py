"""The flags, as the command line, a YAML file and `sgl.Engine` give them."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import pytest
from sglang.srt.arg_groups import pipeline
from sglang.srt.arg_groups.overrides import resolved_view, run_post_process_pass
from sglang.srt.mem_cache.cached_attention import flags, plugin, settings
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs, prepare_server_args
from sglang.srt.utils.common import is_no_spec_infer_or_topk_one

from cached_attention.config import ConfigError
from cached_attention.tiers import remote_client
from cached_attention.tiers.disk_directory import DirectoryLock
from cached_attention.tiers.remote_address import parse_remote

MODEL = ["--model-path", "some/model"]
ON = [*MODEL, "--enable-cached-attention"]
AUTO = ["--allow-auto-truncate"]
DISK = ["--cached-attention-disk-path", "/tmp/kv", "--cached-attention-disk-size"]
REMOTE = ["--cached-attention-remote", "mooncake://10.0.0.1:50051"]
DECODE = ["--disaggregation-mode", "decode"]
KEEP = "--disaggregation-decode-enable-radix-cache"
KEY_FILE = ["--cached-attention-encryption-key-file"]


@pytest.fixture(autouse=True, scope="module")
def _plugins() -> None:
    load_plugins()


def host_size(args: ServerArgs) -> int:
    assert args.enable_unified_cache_external_linker
    assert args.unified_cache_external_linker_backend == "dynamic"
    config = args.unified_cache_external_linker_config
    assert flags.is_enabled(config)
    return config["linker_extra_config"]["host_size"]


def test_without_the_flag_nothing_changes() -> None:
    args = prepare_server_args(MODEL)
    assert not args.enable_unified_cache_external_linker
    assert args.unified_cache_external_linker_config is None
    assert args.page_size is None


def test_command_line() -> None:
    args = prepare_server_args([*ON, "--cached-attention-host-size", "200MB"])
    assert host_size(args) == 200 * 10**6
    assert args.page_size == 64


def test_the_remote_tier() -> None:
    extra = ["--cached-attention-remote", "mooncake://10.0.0.1:50051?segment=64MiB"]
    config = prepare_server_args([*ON, *extra]).unified_cache_external_linker_config["linker_extra_config"]
    address = parse_remote("--remote", config["remote"])
    assert (address.master, address.segment) == ("10.0.0.1:50051", 64 << 20)


def test_a_remote_tier_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_client, "find_spec", lambda _: None)
    given = {"enable_cached_attention": True, "cached_attention_remote": "mooncake://m:50051?segment=0"}
    with pytest.raises(ConfigError, match="pip install 'mooncake-transfer-engine-non-cuda>="):
        settings.fold(given)


def test_the_disk_tier(tmp_path: Path) -> None:
    extra = ["--cached-attention-disk-path", str(tmp_path / "new" / "kv"), "--cached-attention-disk-size", "50MB"]
    config = prepare_server_args([*ON, *extra]).unified_cache_external_linker_config["linker_extra_config"]
    assert config["disk_path"] == str(tmp_path / "new" / "kv")
    assert config["disk_size"] == 50 * 10**6
    assert config["disk_min_uses"] == 1
    assert config["ttl"] == 3600
    assert config["wait"] == "measured"
    assert config["eviction"] == "learnt"


@pytest.mark.parametrize("tier", ["disk", "remote"])
def test_the_key_itself_is_in_no_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    key, place = "c3" * 32, tmp_path / "key"
    place.write_text(key)
    place.chmod(0o600)
    below = {
        "disk": [*DISK[:1], str(tmp_path / "kv"), *DISK[2:], "50MB"],
        "remote": ["--cached-attention-remote", "mooncake://10.0.0.1:50051?segment=64MiB"],
    }[tier]

    def placed(*extra: str) -> str | None:
        args = prepare_server_args([*ON, *below, *extra])
        assert key not in repr(args)
        found: str | None = args.unified_cache_external_linker_config["linker_extra_config"]["encryption_key"]
        return found

    assert placed() is None
    assert placed(*KEY_FILE, str(place)) == str(place)
    monkeypatch.setenv("CACHED_ATTENTION_ENCRYPTION_KEY", key)
    assert placed() == "environment"
    with pytest.raises(SystemExit, match="are both given"):
        placed(*KEY_FILE, str(place))
    monkeypatch.setenv("CACHED_ATTENTION_ENCRYPTION_KEY", "secret")
    with pytest.raises(SystemExit, match="ENCRYPTION_KEY holds no key"):
        placed()


def test_a_directory_that_others_can_write_stops_the_server(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    disk = [*DISK[:1], str(tmp_path), *DISK[2:], "50MB"]
    with pytest.raises(SystemExit, match=f"disk-path: {tmp_path} has mode 0777.*chmod go-w"):
        prepare_server_args([*ON, *disk])
    assert tmp_path.stat().st_mode & 0o777 == 0o777


def test_truncation() -> None:
    config = prepare_server_args([*ON, *AUTO]).unified_cache_external_linker_config["linker_extra_config"]
    assert (config["truncation_ratio"], config["sink_pages"]) == (0.5, 1)
    extra = ["--cached-attention-truncation-ratio", "0.25", "--cached-attention-sink-pages", "0"]
    config = prepare_server_args([*ON, *AUTO, *extra]).unified_cache_external_linker_config["linker_extra_config"]
    assert (config["truncation_ratio"], config["sink_pages"]) == (0.25, 0)


def test_a_given_page_size_stays() -> None:
    assert prepare_server_args([*ON, "--page-size", "16"]).page_size == 16


CHAIN = ["--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", "1"]


@pytest.mark.parametrize(
    ("extra", "is_late"),
    [
        (CHAIN, True),
        ([*CHAIN, "--attention-backend", "fa3"], False),
        ([*CHAIN, "--disable-overlap-schedule"], False),
        (CHAIN[:2], False),
    ],
)
def test_for_a_chain_of_drafts_sglang_chooses_its_attention_before_it_knows_the_page_size(
    extra: list[str], is_late: bool
) -> None:
    """On Hopper and Blackwell it would choose a slower one, as the function shows that it asks."""
    args = prepare_server_args([*ON, *extra])
    assert (args.page_size is None) == is_late
    assert is_no_spec_infer_or_topk_one(args) or not is_late
    run_post_process_pass(args, pipeline._page_size_default)
    assert resolved_view(args).page_size == 64


def test_where_states_are_kept_at_the_end_only_pages_stay_as_sglang_wants_them() -> None:
    """It would stop with an assertion; so we say why such a model is not supported."""
    args = prepare_server_args([*ON, *CHAIN, "--mamba-radix-cache-strategy", "no_buffer"])
    run_post_process_pass(args, pipeline._page_size_default)
    assert resolved_view(args).page_size == 1


def test_without_the_flag_sglang_chooses_the_page_size() -> None:
    args = prepare_server_args([*MODEL, *CHAIN])
    run_post_process_pass(args, pipeline._page_size_default)
    assert resolved_view(args).page_size == 1


def test_the_default_is_a_share_of_free_memory() -> None:
    half = host_size(prepare_server_args(ON))
    quarter = host_size(prepare_server_args([*ON, "--cached-attention-host-size", "0.25"]))
    assert 1.6 < half / quarter < 2.4


def test_yaml(tmp_path: Path) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("enable-cached-attention: true\ncached-attention-host-size: 300MB\n")
    assert host_size(prepare_server_args([*MODEL, "--config", str(config)])) == 300 * 10**6


def test_engine_arguments() -> None:
    from sglang.srt.entrypoints.engine import Engine

    plugin._accept_engine_arguments()
    args = Engine.server_args_class(
        model_path="some/model",
        enable_cached_attention=True,
        cached_attention_host_size="100MB",
        allow_auto_truncate=True,
        cached_attention_truncation_ratio=0.25,
    )
    assert args.unified_cache_external_linker_config["linker_extra_config"]["truncation_ratio"] == 0.25
    assert isinstance(args, ServerArgs)
    assert host_size(args) == 10**8
    assert Engine.server_args_class(model_path="some/model").unified_cache_external_linker_config is None
    with pytest.raises(ConfigError, match="no effect without --enable-cached-attention"):
        Engine.server_args_class(model_path="some/model", cached_attention_host_size="100MB")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--cached-attention-host-size", "0"], "--cached-attention-host-size is '0': it must be above zero"),
        (["--cached-attention-host-size=-1"], "--cached-attention-host-size is '-1': give a size such as 8GB"),
        (["--cached-attention-host-size", "900TB"], "but only .* are free"),
        (["--enable-hierarchical-cache"], "cannot be used with --enable-hierarchical-cache"),
        (["--disable-radix-cache"], "cannot be used with --disable-radix-cache"),
        (["--enable-lmcache"], "cannot be used with --enable-lmcache"),
        (["--cached-attention-disk-path", "/tmp/kv"], "belong together: give both or none"),
        (["--cached-attention-disk-size", "1GB"], "belong together: give both or none"),
        ([*DISK, "900TB"], "--cached-attention-disk-size is '900TB', but only .* are free"),
        ([*DISK[:1], "", *DISK[2:], "1GB"], "--cached-attention-disk-path is empty: give a directory"),
        ([*DISK, "0"], "--cached-attention-disk-size is '0': it must be above zero"),
        ([*DISK, "1GB", "--cached-attention-disk-min-uses", "0"], "give a whole number from 1"),
        ([*DISK, "1GB", "--cached-attention-ttl", "soon"], "give a duration such as 1h"),
        (["--cached-attention-eviction", "fifo"], "is 'fifo': give learnt or lru"),
        (["--cached-attention-wait", "forever"], "is 'forever': give measured or complete"),
        ([*DISK[:1], __file__, *DISK[2:], "1GB"], "is not a directory: give another path"),
        (
            ["--cached-attention-sink-pages", "2"],
            "--cached-attention-sink-pages has no effect without --allow-auto-truncate: add it",
        ),
        ([*DISK, "1GB", *KEY_FILE, "/absent/key"], "the key file /absent/key cannot be read: No such file"),
        ([*DISK, "1GB", *KEY_FILE, __file__], "others than its owner can use it; `chmod 600 .*`|holds no key"),
        (
            [*KEY_FILE, "/absent/key"],
            "has no effect without --cached-attention-disk-path or --cached-attention-remote: add one of them",
        ),
        (
            [*KEY_FILE, "/absent/key", *REMOTE],
            "the key file /absent/key cannot be read",
        ),
        ([*AUTO, "--cached-attention-sink-pages=-1"], "sink-pages is '-1': give a whole number from 0"),
        ([*AUTO, "--cached-attention-truncation-ratio", "1"], "is '1': give a number above 0 and below 1"),
        ([*AUTO, "--cached-attention-truncation-ratio", "half"], "is 'half': give a number above 0"),
        (
            ["--speculative-algorithm", "DFLASH"],
            "cannot be used with --speculative-algorithm DFLASH: give EAGLE, .* or NGRAM, or leave it out",
        ),
        (
            ["--speculative-algorithm", "eagle", "--cached-attention-mla-dedup"],
            r"mla-dedup cannot be used with --speculative-algorithm eagle \(the draft model's KV",
        ),
        (["--pp-size", "2"], r"cannot be used with --pp-size 2 \(stages would decide"),
        (["--attn-cp-size", "2"], "cannot be used with --attn-cp-size 2"),
        (["--dcp-size", "2"], "cannot be used with --dcp-size 2"),
        (DECODE, "needs --cached-attention-remote and --disaggregation-decode-enable-radix-cache .*: add them"),
        ([*DECODE, *REMOTE], "decode needs --disaggregation-decode-enable-radix-cache .*: add it, or leave"),
        ([*DECODE, *REMOTE, KEEP, *DISK, "1GB"], "disk-path cannot be used with .* decode .*: give it to the"),
        ([*DECODE, *REMOTE, KEEP, "--cached-attention-mla-dedup"], "mla-dedup cannot be used with .* decode"),
        (
            [*DECODE, *REMOTE, KEEP, "--disaggregation-decode-retraction-backup", "host_pool"],
            "retraction-backup host_pool .*: leave it out",
        ),
        (
            [*DECODE, *REMOTE, KEEP, "--disaggregation-decode-host-receive-threshold", "0"],
            "host-receive-threshold below 1 .*: leave it out",
        ),
        ([*REMOTE, "--elastic-ep-backend", "mooncake"], "remote cannot be used with --elastic-ep-backend"),
        (["--hicache-storage-backend", "file"], r"--hicache-storage-backend \(it is HiCache's\): leave one"),
        (["--disaggregation-decode-enable-offload-kvcache"], r"offload-kvcache \(both save answers\): leave one"),
        (["--enable-pd-role-switch"], "cannot be used with --enable-pd-role-switch"),
    ],
)
def test_contradictions_stop_the_server(extra: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as stop:
        prepare_server_args([*ON, *extra])
    assert "\n" not in str(stop.value.code)


def test_a_directory_that_this_user_cannot_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, *_, **__: path != tmp_path)
    message = f"disk-path: {tmp_path} cannot be written by this user: give another path"
    for path in (tmp_path, tmp_path / "new" / "kv"):
        with pytest.raises(SystemExit, match=message):
            prepare_server_args([*ON, DISK[0], str(path), DISK[2], "1GB"])


def test_a_directory_that_cannot_be_seen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", fail)
    with pytest.raises(ConfigError, match=r"^--cached-attention-disk-path: .*Permission denied: '/secret/kv'$"):
        settings._disk_path("/secret/kv")


def test_a_disk_that_fails_does_not_stop_a_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stat = os.stat

    def fail(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path)):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", fail)
    values = {"enable_cached_attention": True}
    settings.fold(values | {flags.DISK_PATH.name: str(tmp_path / "kv"), flags.DISK_SIZE.name: "1TB"})
    assert "Input/output error" in caplog.text


def test_the_directory_of_another_server_is_refused_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "REPLACED", 0.5)
    given = [*ON, DISK[0], str(tmp_path), DISK[2], "1GB"]
    for directory in (tmp_path, tmp_path / "dp0-pp0-tp1"):
        lock = DirectoryLock(directory)
        with pytest.raises(SystemExit, match=f"disk-path: {directory} is in use by process"):
            prepare_server_args(given)
        timer = Timer(0.2, lock.release)
        timer.start()
        prepare_server_args(given)
        timer.join()
    DirectoryLock(tmp_path).release()


def test_nodes_of_one_server_may_share_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "REPLACED", 0.0)
    lock = DirectoryLock(tmp_path / "dp0-pp0-tp0")
    values = {"enable_cached_attention": True, "nnodes": 2}
    settings.fold(values | {flags.DISK_PATH.name: str(tmp_path), flags.DISK_SIZE.name: "1GB"})
    lock.release()


def test_a_directory_in_use_may_be_larger_than_what_others_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = psutil.disk_usage("/")._replace(free=10**9, total=10**13)
    monkeypatch.setattr(psutil, "disk_usage", lambda _path: usage)
    given = [*ON, DISK[0], str(tmp_path), DISK[2]]
    with pytest.raises(SystemExit, match="but only 1 GB are free"):
        prepare_server_args([*given, "1TB"])
    DirectoryLock(tmp_path).release()
    args = prepare_server_args([*given, "1TB"])
    assert args.unified_cache_external_linker_config["linker_extra_config"]["disk_size"] == 10**12
    with pytest.raises(SystemExit, match="but only 10 TB are there"):
        prepare_server_args([*given, "20TB"])


def test_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    args = prepare_server_args([*ON, DISK[0], "~/kv", DISK[2], "1MB"])
    assert args.unified_cache_external_linker_config["linker_extra_config"]["disk_path"] == str(tmp_path / "kv")


def test_a_setting_without_the_flag_stops_the_server() -> None:
    with pytest.raises(SystemExit, match="has no effect without --enable-cached-attention: add it"):
        prepare_server_args([*MODEL, "--cached-attention-host-size", "1GB"])


def test_help_names_every_flag() -> None:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    text = parser.format_help()
    assert all(flag.option in text for flag in flags.FLAGS)


def test_another_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "version", lambda _: "0.6.0")
    with pytest.raises(ImportError, match=r"supports sglang 0\.5\.23, but 0\.6\.0 is installed"):
        plugin.activate()


@pytest.mark.parametrize(
    ("env", "extra", "message"),
    [
        ({}, ["--cached-attention-host-size", "0"], "error: --cached-attention-host-size is '0'"),
        ({"SGLANG_PLUGINS": "another"}, [], "unrecognized arguments: --enable-cached-attention"),
    ],
    ids=["wrong value", "plugin not loaded"],
)
def test_the_launcher_stops_at_once(env: dict[str, str], extra: list[str], message: str) -> None:
    command = [sys.executable, "-m", "sglang.launch_server", *ON, *extra]
    run: Any = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, timeout=240, check=False
    )
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr
