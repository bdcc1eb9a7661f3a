import json
import mmap
import os
import pwd
import random
import re
import shutil
import sqlite3
import tempfile
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cached_attention.checksum import page_checksum
from cached_attention.cli import app
from cached_attention.cli.arguments import duration, words
from cached_attention.cli.capacity import Deployment, kv_bytes_per_token, served_dtype, state_bytes
from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import FORMAT_VERSION, Fingerprint
from cached_attention.tiers.disk import DiskTier
from cached_attention.tiers.disk_directory import LOCK_NAME
from cached_attention.tiers.disk_index import DiskIndex
from cached_attention.tiers.disk_reader import StoreReader
from cached_attention.tiers.disk_space import disk_usage
from cached_attention.tiers.page_io import PageRead, PageWrite, ReadOutcome

PAGE_BYTES = 16 << 10
CAPACITY = 8 << 20


def open_tier(directory, weights="w0", encryption=None):
    layers = ((PAGE_BYTES // 2, PAGE_BYTES // 2),)
    fingerprint = Fingerprint("llama", weights, "bfloat16", 64, layers, {"tp_rank": 0}, {"theta": 1e4})
    return DiskTier(directory, fingerprint, CAPACITY, encryption=encryption)


def key(number):
    return number.to_bytes(32, "big")


def fill(tier, numbers, age=0.0, uses=1):
    pages = []
    for number in numbers:
        buffer = memoryview(mmap.mmap(-1, PAGE_BYTES))
        buffer[:] = random.Random(number).randbytes(PAGE_BYTES)
        checksum = page_checksum(key(number), buffer)
        pages.append(PageWrite(key(number), None, number, checksum, time.time() - age, uses, buffer))
    assert None not in tier.write(pages).result(30)


def serve(tier):
    """Numbers of the pages that the store has and reads back right."""
    records = list(tier.records())
    reads = [PageRead(r.key, r.slot, r.checksum, memoryview(mmap.mmap(-1, PAGE_BYTES))) for r in records]
    assert set(tier.read(reads).result(30)) <= {ReadOutcome.READ}
    for record, page in zip(records, reads, strict=True):
        assert page.buffer == random.Random(record.base_position).randbytes(PAGE_BYTES)
    return {record.base_position for record in records}


def invoke(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "300"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def run(*arguments):
    result = invoke(*arguments)
    return result.exit_code, result.output


@pytest.fixture
def directory(tmp_path):
    tier = open_tier(tmp_path)
    fill(tier, range(20), age=7200)
    fill(tier, range(100, 130), age=60, uses=5)
    tier.close()
    return tmp_path


def test_inspect_says_what_there_is(directory):
    code, output = run("inspect", directory)
    assert code == 0
    for text in ("llama", "tp_rank 0", "50", "3,200", "20 once", "30 more often", "2.0 h", "not in use"):
        assert text in output, text


def test_inspect_and_verify_work_beside_a_server(directory):
    tier = open_tier(directory)
    fill(tier, range(200, 210))
    code, output = run("inspect", directory)
    assert (code, "in use by process" in output) == (0, True)
    assert "60" in output
    code, output = run("verify", directory)
    assert (code, "no damage" in output) == (0, True)
    fill(tier, range(300, 310))
    tier.close()


@pytest.mark.parametrize("where", ["page", "row", "file", "index"])
def test_verify_finds_damage(directory, where):
    assert run("verify", directory)[0] == 0
    (index,), (pages,) = directory.rglob("index.sqlite3"), directory.rglob("pages-*.bin")
    if where == "page":
        with open(pages, "r+b") as file:
            file.seek(7 * PAGE_BYTES + 100)
            file.write(b"\x00\x01\x02\x03")
    elif where == "row":
        with sqlite3.connect(index) as connection:
            connection.execute("UPDATE pages SET base_position = 12345 WHERE slot = 7")
    elif where == "file":
        pages.unlink()
    else:
        index.write_bytes(b"no index at all")
    code, output = run("verify", directory)
    assert (code, "damage found" in output) == (1, True)
    assert open_tier(directory).close()


def test_prune_drops_old_pages_and_gives_space_back(directory):
    before = disk_usage(directory)
    code, output = run("prune", directory, "--older-than", "1h")
    assert code == 0
    assert re.search(r"\b20\b.*\b30\b", output)
    assert disk_usage(directory) < before - 15 * PAGE_BYTES
    assert run("verify", directory)[0] == 0
    tier = open_tier(directory)
    assert serve(tier) == set(range(100, 130))
    tier.check_invariants()
    tier.close()


def test_prune_to_a_size_keeps_the_most_recent_of_all_stores(directory):
    other = open_tier(directory, "w1")
    fill(other, range(1000, 1010), age=600)
    other.close()
    slots = sum(map(disk_usage, directory.rglob("pages-*.bin")))
    size = disk_usage(directory) - slots + 35 * PAGE_BYTES
    code, _ = run("prune", directory, "--to-size", size)
    assert code == 0
    assert disk_usage(directory) <= size
    tier = open_tier(directory)
    assert serve(tier) == set(range(100, 130))
    tier.close()
    assert run("prune", directory, "--to-size", "1KB")[0] == 0
    assert not list(directory.rglob("pages-*.bin"))


def test_a_prune_that_cannot_write_says_so_and_removes_nothing(directory, monkeypatch):
    def fail(*_):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    for broken in (StoreReader, DiskIndex):
        with monkeypatch.context() as patch:
            patch.setattr(broken, "__init__", fail)
            code, output = run("prune", directory, "--older-than", "1h")
            assert (code, "disk I/O error. Nothing more was dropped" in output) == (1, True)
    assert "50 pages" in run("inspect", directory)[1]


def test_an_unreadable_store_is_an_exit_code(directory):
    (index,) = directory.rglob("index.sqlite3")
    index.write_bytes(b"no index at all")
    code, output = run("inspect", directory)
    assert (code, "unreadable" in output) == (1, True)


@pytest.mark.parametrize("size", ["100", "0.5", "1", "0GB"])
def test_sizes_need_a_unit(directory, size):
    code, output = run("prune", directory, "--to-size", size)
    assert (code, f"--to-size is '{size}': give a size above zero with its unit" in output) == (2, True)
    assert "50 pages" in run("inspect", directory)[1]


def test_an_encrypted_store(directory):
    secret = directory / "key"
    secret.write_bytes(bytes(range(32)))
    secret.chmod(0o600)
    tier = open_tier(directory, encryption=EncryptionKey(bytes(range(32))))
    fill(tier, range(8), age=7200)
    fill(tier, range(8, 20))
    tier.close()
    assert f"AES-256-GCM, key {EncryptionKey(bytes(range(32))).id}" in run("inspect", directory)[1]
    code, output = run("verify", directory)
    assert (code, "no key was given" in output, "another key" in output) == (2, True, False)
    assert "no damage in 1 store\n1 store was not verified: give its key with --encryption-key-file." in output
    code, output = run("verify", tier.path)
    assert (code, "no damage" in output) == (2, False)
    code, output = run("verify", directory, "--encryption-key-file", secret)
    assert (code, "\nno damage\n" in output) == (0, True)
    other = directory / "other key"
    other.write_bytes(bytes(range(1, 33)))
    other.chmod(0o600)
    code, output = run("verify", directory, "--encryption-key-file", other)
    assert (code, "another key than given" in output) == (2, True)
    assert run("prune", directory, "--older-than", "1h")[0] == 0
    assert run("verify", directory, "--encryption-key-file", secret)[0] == 0
    with open(tier.path / "pages-000000.bin", "r+b") as file:
        file.write(b"x")
    code, output = run("verify", directory, "--encryption-key-file", secret)
    assert (code, "damage found" in output) == (1, True)
    secret.chmod(0o644)
    assert run("verify", directory, "--encryption-key-file", secret)[0] == 2


def test_prune_leaves_other_files_and_later_versions_alone(directory):
    store = open_tier(directory).path
    future = directory / "0123456789abcdef"
    future.mkdir()
    (future / "fingerprint.json").write_text('{"format_version": 99}')
    (future / "pages-000000.bin").write_bytes(b"theirs")
    (store / "notes.txt").write_text("mine")
    (directory / "photo.jpg").write_bytes(b"mine too")
    result = invoke("prune", directory, "--older-than", "0s")
    assert result.exit_code == 1, "the store is in use"
    assert f"{directory} is in use by process" in result.stderr
    assert "stop that process first" in result.stderr
    assert "another directory" not in result.output


def test_a_complete_store_of_another_version_is_left_alone(directory):
    (index,) = directory.rglob("index.sqlite3")
    record = index.parent / "fingerprint.json"
    later = replace(Fingerprint.from_json(record.read_bytes()), format_version=FORMAT_VERSION + 1)
    record.write_text(later.to_json())
    store = index.parent.rename(directory / later.name)
    code, output = run("prune", directory, "--older-than", "0s")
    assert (code, "is of another version" in output) == (0, True)
    assert (store / "index.sqlite3").exists()
    assert "another version" in run("inspect", directory)[1]


def test_prune_removes_only_what_is_ours(directory):
    future = directory / "0123456789abcdef"
    future.mkdir()
    (future / "fingerprint.json").write_text('{"format_version": 99}')
    (future / "pages-000000.bin").write_bytes(b"theirs")
    store = next(directory.rglob("index.sqlite3")).parent
    (store / "notes.txt").write_text("mine")
    (directory / "photo.jpg").write_bytes(b"mine too")
    code, output = run("prune", directory, "--older-than", "0s")
    assert code == 0
    assert "left alone" in output
    assert [path.name for path in store.iterdir()] == ["notes.txt"]
    assert (future / "pages-000000.bin").read_bytes() == b"theirs"
    assert (directory / "photo.jpg").exists()


def test_prune_needs_to_be_told_what(directory):
    code, output = run("prune", directory)
    assert code == 2
    assert "--older-than" in output
    assert run("prune", directory, "--older-than", "yesterday")[0] == 2
    assert run("prune", directory, "--to-size", "big")[0] == 2


RANKS = ("dp0-pp0-tp0", "dp0-pp0-tp0-states", "dp0-pp0-tp10")


@pytest.fixture
def ranks(tmp_path):
    """What a server with several ranks leaves: a directory each, or two where there are states."""
    for rank in RANKS:
        tier = open_tier(tmp_path / rank)
        fill(tier, range(10), age=7200)
        fill(tier, range(100, 120), age=60, uses=5)
        tier.close()
    return tmp_path


def kept(directory):
    tier = open_tier(directory)
    try:
        return serve(tier)
    finally:
        tier.close()


def test_every_rank_is_inspected_and_verified(ranks):
    code, output = run("inspect", ranks)
    assert code == 0
    assert [output.count(f"Store {rank}/") for rank in RANKS] == [1, 1, 1]
    assert "3 stores, 90 pages" in output
    assert "not in use" in output
    tier = open_tier(ranks / RANKS[1])
    code, output = run("inspect", ranks)
    assert f"1 of 3 directories in use: {RANKS[1]} by process" in output.replace("\n", " ")
    tier.close()
    code, output = run("verify", ranks)
    assert code == 0
    assert re.search(r"all\W+90\W+0\W+0", output)
    with open(next((ranks / RANKS[2]).rglob("pages-*.bin")), "r+b") as file:
        file.write(b"x")
    code, output = run("verify", ranks)
    assert code == 1
    assert re.search(r"tp10/\w+\W+30\W+1\W+0", output)
    assert re.search(r"all\W+90\W+1\W+0", output)


def test_one_rank_and_one_store_can_be_given(ranks):
    rank = ranks / RANKS[0]
    (store,) = (path.parent for path in rank.rglob("index.sqlite3"))
    for given in (rank, store):
        assert "1 store, 30 pages" in run("inspect", given)[1]
        assert run("verify", given)[0] == 0
    assert run("prune", store, "--older-than", "1h")[0] == 0
    assert [len(kept(ranks / name)) for name in RANKS] == [20, 30, 30]


@pytest.mark.parametrize("at_root", [False, True])
def test_prune_to_a_size_is_over_all_ranks_in_one_order(ranks, at_root):
    """Also where the server had one rank before, and its store is beside the ranks' directories."""
    if at_root:
        tier = open_tier(ranks)
        fill(tier, range(30), age=600)
        tier.close()
    else:
        (ranks / "photo.jpg").write_bytes(bytes(1 << 20))
    slots = sum(map(disk_usage, ranks.rglob("pages-*.bin")))
    other = 0 if at_root else disk_usage(ranks / "photo.jpg")
    size = disk_usage(ranks) - other - slots + 60 * PAGE_BYTES
    code, output = run("prune", ranks, "--to-size", size)
    assert code == 0
    assert disk_usage(ranks) - other <= size
    assert re.search(rf"all\W+{60 if at_root else 30}\W+60\b", output)
    for rank in RANKS:
        assert kept(ranks / rank) == set(range(100, 120))
    assert other == 0 or (ranks / "photo.jpg").exists()


def test_prune_drops_nothing_while_one_rank_is_in_use(ranks):
    tier = open_tier(ranks / RANKS[2])
    code, output = run("prune", ranks, "--older-than", "0s")
    assert (code, f"{ranks / RANKS[2]} is in use by process" in output) == (1, True)
    tier.close()
    assert [len(kept(ranks / rank)) for rank in RANKS] == [30, 30, 30]
    assert run("prune", ranks, "--older-than", "0s")[0] == 0
    assert not list(ranks.rglob("pages-*.bin"))
    assert run("prune", ranks, "--older-than", "0s")[0] == 0, "an empty one is still one of ours"


@pytest.mark.parametrize("command", [("inspect",), ("verify",), ("prune", "--older-than", "0s")])
def test_a_directory_without_stores_is_an_error(tmp_path, command):
    """A store further down than a server puts one is not looked for."""
    open_tier(tmp_path / "elsewhere" / "dp0-pp0-tp0").close()
    (tmp_path / "dp0-pp0-tp0").mkdir()
    code, output = run(command[0], tmp_path, *command[1:])
    assert code == 2
    assert "--cached-attention-disk-path" in output
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["dp0-pp0-tp0", "elsewhere"]


LLAMA_65B = {"num_hidden_layers": 80, "num_attention_heads": 64, "hidden_size": 8192}
LLAMA_70B = LLAMA_65B | {"num_key_value_heads": 8}
LLAMA_13B = {"num_hidden_layers": 40, "num_attention_heads": 40, "hidden_size": 5120}
DEEPSEEK = {"num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512, "qk_rope_head_dim": 64}


@pytest.mark.parametrize(
    ("config", "expected"),
    [(LLAMA_65B, 2_621_440), (LLAMA_70B, 327_680), (LLAMA_13B, 819_200), (DEEPSEEK, 70_272)],
    ids=["65B", "70B", "13B", "latent"],
)
def test_kv_of_a_token(config, expected):
    assert kv_bytes_per_token(config) == expected
    assert kv_bytes_per_token({"text_config": config}, "fp8") * 2 == expected


def test_sparse_attention_keeps_an_index_as_well() -> None:
    assert kv_bytes_per_token(DEEPSEEK | {"index_head_dim": 128}) == 70_272 + 61 * 132


@pytest.mark.parametrize(
    "shares",
    [
        {"indexer_types": ["full", "shared", "shared"] * 20 + ["full"]},
        {"cli_factor": 2},
        {"index_topk_pattern": "FFSS" * 15 + "F"},
        {"index_topk_freq": 4},
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"index_topk_freq": None},
    ],
)
def test_layers_that_take_another_ones_selection_keep_no_index(shares: dict[str, Any]) -> None:
    """As SGLang decides it."""
    from sglang.srt.configs.model_config import dsa_layer_skips_topk

    config = DEEPSEEK | {"index_head_dim": 128, "index_topk": 2048, **shares}
    hf_config: Any = SimpleNamespace(architectures=["DeepseekV32ForCausalLM"], **config)
    indexers = sum(not dsa_layer_skips_topk(hf_config, layer) for layer in range(61))
    assert kv_bytes_per_token(config) == 70_272 + indexers * 132


def test_layers_without_attention_keep_no_index() -> None:
    layers = ["linear_attention", "full_attention"] * 30 + ["full_attention"]
    config = DEEPSEEK | {"index_head_dim": 128, "index_topk_freq": 2, "layer_types": layers}
    indexers = [0, *range(1, 61, 2)]
    with_attention = [layer for layer, kind in enumerate(layers) if kind == "full_attention"]
    found = len(set(indexers).intersection(with_attention))
    assert kv_bytes_per_token(config) == 70_272 // 61 * len(with_attention) + found * 132


QWEN_NEXT = {
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}


def test_layers_without_attention_have_a_state_per_conversation() -> None:
    assert kv_bytes_per_token(QWEN_NEXT) == 12 * 2 * 2 * 256 * 2
    state = 36 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)
    assert state_bytes(QWEN_NEXT) == state_bytes({"text_config": QWEN_NEXT}) == state
    types = ["linear_attention", "full_attention"] * 24
    assert kv_bytes_per_token(QWEN_NEXT | {"layer_types": types}) == 24 * 2 * 2 * 256 * 2
    assert state_bytes(LLAMA_70B) == 0
    sized = deployment(bytes_per_token=24_576, session_bytes=state, session_tokens=1000)
    assert sized.sessions_in(10 * (24_576_000 + state)) == 10
    assert sized.required == 3600 * (4096 * 24_576 + state)
    with pytest.raises(ValueError, match="no 'linear_num_key_heads'"):
        state_bytes({"num_hidden_layers": 4, "full_attention_interval": 2})
    with pytest.raises(ValueError, match="states of a model with mamba_num_heads"):
        kv_bytes_per_token(QWEN_NEXT | {"mamba_num_heads": 8})


def deployment(**changes):
    values = {
        "bytes_per_token": 819_200,
        "session_tokens": 2000,
        "longest_tokens": 4096,
        "sessions_per_hour": 3600.0,
        "ttl": 3600.0,
        "gpus": 4,
        "gpu_kv_size": 0,
        "host_size": 128 * 10**9,
        "disk_size": 10240 * 10**9,
    }
    return Deployment(**(values | changes))


def test_the_papers_points_and_prices():
    required = 3600 * 4096 * 819_200
    for ratio, expected in ((0.0, 0.0), (0.1, 0.51), (0.25, 0.98), (3.0, 0.98), (0.175, 0.745)):
        sized = deployment(host_size=0, disk_size=int(ratio * required))
        assert sized.hit_rate == pytest.approx(expected, abs=1e-6)
    assert deployment().storage_cost == pytest.approx(128 * 0.0088 + 10240 * 0.000082)
    assert deployment().compute_cost == 20.0
    assert deployment().saving(4.0) == pytest.approx(0.70, abs=0.05)


def test_plan(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B | {"max_position_embeddings": 4096}))
    code, output = run(
        "plan", tmp_path, "--host-size", "128GB", "--disk-size", "10TB", "--gpus", 4, "--speedup", 3.3
    )
    assert code == 0
    for text in ("327,680 bytes", "655 MB", "4.832 TB", "98%", "$20.00", "$1.95", "saving"):
        assert text in output, text
    (tmp_path / "config.json").write_text("[]")
    assert "give a model's config.json" in run("plan", tmp_path)[1]
    assert "No such file or directory" in run("plan", tmp_path / "nowhere")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say what KV takes: give the model's config.json"),
        (("--bytes-per-token", "-5"), "--bytes-per-token"),
        (("--bytes-per-token", "9", "--host-size", "50"), "--host-size is '50'"),
        (("--bytes-per-token", "9", "--host-size", "0.5"), "a share of what is free is for servers only"),
        (("--bytes-per-token", "9", "--host-size", "0"), "--host-size is '0': give a size above zero"),
        (("--bytes-per-token", "9", "--gpu-kv-size", "50"), "--gpu-kv-size is '50'"),
        (("--bytes-per-token", "9", "--disk-size", "much"), "--disk-size is 'much'"),
        (("--bytes-per-token", "9", "--ttl", "soon"), "--ttl is 'soon': give a duration"),
        (("--bytes-per-token", "9", "--gpu-price", "-5"), "--gpu-price"),
        (("--bytes-per-token", "9", "--gpu-price", "0", "--speedup", "2"), "leave one of them out"),
        (("--bytes-per-token", "9", "--longest-tokens", "1000"), "--longest-tokens is 1000, less than the mean"),
        (("--bytes-per-token", "9", "--kv-dtype", "fp8"), "--bytes-per-token and --kv-dtype are both given"),
        (("--bytes-per-token", "9", "--kv-dtype", "int3"), "--kv-dtype is 'int3': give one of bfloat16"),
        (("CONFIG", "--bytes-per-token", "9"), "--bytes-per-token and a config are both given"),
    ],
)
def test_a_plan_says_which_option_is_wrong(tmp_path, arguments, said):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    code, output = run("plan", *(tmp_path if text == "CONFIG" else text for text in arguments))
    assert (code, said in output) == (2, True), output


@pytest.mark.parametrize("ttl", ["3600", "1h", "60 m"])
def test_a_plan_takes_the_durations_of_a_server(ttl):
    code, output = run("plan", "--bytes-per-token", "1000", "--longest-tokens", "4096", "--ttl", ttl)
    assert (code, "14.7 GB" in output) == (0, True)


def test_a_plan_in_which_nothing_expires():
    code, output = run("plan", "--bytes-per-token", "1000", "--ttl", "0")
    assert (code, "without limit" in output, "hit rate" in output) == (0, True, False)


@pytest.mark.parametrize("nothing", ["0", "0GB"])
def test_a_plan_without_a_disk(nothing):
    code, output = run("plan", "--bytes-per-token", "100000", "--disk-size", nothing)
    assert (code, re.search(r"^\W*disk\b", output, re.MULTILINE)) == (0, None)
    assert re.search(r"of that\W+0\.087", output)


@pytest.mark.parametrize(
    ("config", "served"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32"}, "float16"),
        ({}, "float16"),
        ({"dtype": "half", "torch_dtype": "float32"}, "float16"),
        ({"dtype": "float32", "model_type": "gemma3_text"}, "bfloat16"),
        ({"dtype": "float", "text_config": {"model_type": "gemma2"}}, "bfloat16"),
        ({"dtype": "float32", "text_config": {"dtype": "bfloat16"}}, "bfloat16"),
    ],
)
def test_the_kv_dtype_is_what_sglang_serves(config, served):
    from sglang.srt.configs.model_config import _get_and_verify_dtype

    text = {"dtype": config.get("dtype")} | config.get("text_config", config)
    assert f"torch.{served}" == str(_get_and_verify_dtype(text, "auto"))
    assert served_dtype(config) == served


def test_a_plan_says_which_kv_dtype_it_assumes(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_70B | {"torch_dtype": "float32"}))
    output = run("plan", config)[1]
    assert "float16, as SGLang by default; the config has float32" in output
    assert "327,680 bytes" in output
    output = run("plan", config, "--kv-dtype", "float32")[1]
    assert re.search(r"KV dtype\W+float32\b", output)
    assert "655,360 bytes" in output
    config.write_text(json.dumps(LLAMA_70B | {"dtype": "bfloat16"}))
    assert "bfloat16, as the config" in run("plan", config)[1]
    config.write_text(json.dumps(LLAMA_70B))
    assert "the config has none" in run("plan", config)[1]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("1.5h", 5400), ("7d", 604800), (" 2W ", 1209600), ("3600", 3600), ("0", 0)],
)
def test_durations(text, seconds):
    assert duration("--ttl", text) == seconds


def test_a_wrong_duration_does_not_suggest_zero():
    """With `prune` it would drop everything."""
    with pytest.raises(typer.BadParameter, match="--older-than is '5 weeks': give a duration") as error:
        duration("--older-than", "5 weeks")
    assert " 0 " not in str(error.value)


def test_durations_in_words():
    assert [words(value) for value in (5, 150, 7300, 200_000)] == ["5 s", "2.5 min", "2.0 h", "2.3 d"]


COMMANDS = [("inspect",), ("verify",), ("prune", "--older-than", "1h")]


@contextmanager
def as_another_user():
    """Root, who may do everything, becomes nobody; others stay, and are locked out by modes alone."""
    if os.geteuid() != 0:
        yield
        return
    for arguments in (("nowhere",), ()):
        run("inspect", *arguments)  # Imports what errors need: Python may be where nobody cannot read.
    os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared():
    """A directory with stores that another user can read; unlike `tmp_path`, so are those above it."""
    path = Path(tempfile.mkdtemp())
    tier = open_tier(path / "kv")
    fill(tier, range(20), age=7200)
    tier.close()
    path.chmod(0o755)
    yield path / "kv"
    for inner in (path, path / "kv"):
        inner.chmod(0o700)
    shutil.rmtree(path)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("closed", [".", "..", "store"])
def test_what_may_not_be_read_is_said_in_a_sentence(shared, command, closed):
    shared.chmod(0o755)
    (store,) = shared.glob("*/")
    place = store if closed == "store" else shared / closed
    place.chmod(0)
    try:
        with as_another_user():
            code, output = run(command[0], shared, *command[1:])
    finally:
        place.chmod(0o700)
    assert code == 2
    assert f"{shared} may not be read by user " in output
    assert "as the server's user or as root" in output
    assert "does not exist" not in output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_what_is_not_there_is_said_in_a_sentence(tmp_path, command):
    (tmp_path / "file").touch()
    for name, said in (("nowhere", "does not exist: give what"), ("file", "is not a directory: give what")):
        code, output = run(command[0], tmp_path / name, *command[1:])
        assert (code, f"{tmp_path / name} {said}" in output) == (2, True), output


def test_prune_of_what_may_not_be_written_is_a_sentence_on_stderr(shared):
    for path in (shared, *shared.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    with as_another_user():
        result = invoke("prune", shared, "--older-than", "1h")
    assert result.exit_code == 1
    assert f"{shared} may not be changed by user " in result.stderr
    assert "as the server's user or as root" in result.stderr
    assert "Errno" not in result.output
    assert "Permission" not in result.stdout


def test_prune_says_how_to_mend_the_mode_of_a_directory(directory):
    directory.chmod(0o777)
    result = invoke("prune", directory, "--older-than", "1h")
    assert (result.exit_code, f"chmod go-w {directory}" in result.stderr) == (1, True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can create files that the owner cannot open")
def test_a_lock_that_root_creates_is_the_servers(directory):
    user = pwd.getpwnam("nobody").pw_uid
    for path in (directory, *directory.rglob("*")):
        os.chown(path, user, user)
    (directory / LOCK_NAME).unlink()
    assert run("prune", directory, "--older-than", "1h")[0] == 0
    for path in (directory, *directory.rglob("*")):
        assert path.stat().st_uid == user, path
    assert (directory / LOCK_NAME).stat().st_mode & 0o777 == 0o600


def _no_index(index):
    index.write_bytes(b"no index at all")


def _empty_file(index):
    index.write_bytes(b"")


def _of_another_store(index):
    with closing(sqlite3.connect(index)) as connection, connection:
        connection.execute("UPDATE meta SET value = 'other' WHERE name = 'fingerprint'")


def _missing(index):
    index.unlink()


@pytest.mark.parametrize("damage", [_no_index, _empty_file, _of_another_store, _missing])
def test_prune_keeps_a_damaged_store_that_is_not_old(directory, damage):
    other = open_tier(directory, "w1")
    fill(other, range(1000, 1010), age=7200)
    fill(other, range(1010, 1015))
    other.close()
    (index,) = (path for path in directory.rglob("index.sqlite3") if path.parent != other.path)
    damage(index)
    code, output = run("prune", directory, "--older-than", "1h")
    assert code == 0
    assert "left alone: its index is damaged" in output
    assert re.search(r"all\W+10\W+5\b", output)
    assert (index.parent / "pages-000000.bin").exists()
    for path in index.parent.iterdir():
        os.utime(path, (time.time() - 7200,) * 2)
    assert (
        "removed: its index is damaged" in run("prune", directory, "--older-than", "1h")[1] or not index.exists()
    )
    assert not index.parent.exists()


def test_a_damaged_store_makes_room_first(directory):
    (index,) = directory.rglob("index.sqlite3")
    _no_index(index)
    code, _ = run("prune", directory, "--older-than", "1h", "--to-size", "1GB")
    assert (code, index.parent.exists()) == (0, False)


def test_nothing_is_dropped_beside_a_damaged_store_while_a_rank_is_in_use(ranks):
    (index,) = (ranks / RANKS[0]).rglob("index.sqlite3")
    _no_index(index)
    tier = open_tier(ranks / RANKS[2])
    code, output = run("prune", ranks, "--older-than", "0s")
    assert (code, "in use by process" in output) == (1, True)
    tier.close()
    assert len(kept(ranks / RANKS[1])) == 30


def test_a_store_of_another_version_is_not_damage(directory):
    """One that has other fields, and one that has the same."""
    (store,) = (path.parent for path in directory.rglob("fingerprint.json"))
    for name, text in (
        ("0123456789abcdef", '{"format_version": 99}'),
        ("f" * 16, replace(StoreReader(store).fingerprint, format_version=2).to_json()),
    ):
        (directory / name).mkdir()
        (directory / name / "fingerprint.json").write_text(text)
    code, output = run("verify", directory)
    assert code == 0
    assert "not verified: format version 99, and 1 is known here" in output
    assert "no damage in 1 store\n2 stores were not verified: the format is that of another version" in output
    code, output = run("verify", directory / "0123456789abcdef")
    assert (code, "no damage" in output) == (0, False)
    with open(store / "pages-000000.bin", "r+b") as file:
        file.write(b"x")
    code, output = run("verify", directory)
    assert (code, "damage found" in output) == (1, True)
    (store / "fingerprint.json").write_text("{")
    assert run("verify", directory)[0] == 1
