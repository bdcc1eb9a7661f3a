import json
import mmap
import random
import re
import sqlite3
import time

import pytest
from typer.testing import CliRunner

from cached_attention.checksum import page_checksum
from cached_attention.cli import app
from cached_attention.cli.arguments import duration, words
from cached_attention.cli.capacity import Deployment, kv_bytes_per_token, state_bytes
from cached_attention.encryption import EncryptionKey
from cached_attention.fingerprint import Fingerprint
from cached_attention.tiers.disk import DiskTier, PageRead, PageWrite, ReadOutcome
from cached_attention.tiers.disk_index import DiskIndex
from cached_attention.tiers.disk_reader import StoreReader
from cached_attention.tiers.disk_space import disk_usage

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


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
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


@pytest.mark.parametrize("size", ["100", "0.5", "1"])
def test_sizes_need_a_unit(directory, size):
    code, output = run("prune", directory, "--to-size", size)
    assert (code, "has no unit" in output) == (2, True)
    assert "50 pages" in run("inspect", directory)[1]


def test_a_plan_needs_some_time():
    code, output = run("plan", "--bytes-per-token", "1000", "--ttl", "0s")
    assert (code, "is no plan" in output) == (2, True)
    assert run("plan", "--bytes-per-token", "-5")[0] == 2


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
    assert (code, "give their key with --encryption-key-file" in output) == (2, True)
    code, output = run("verify", directory, "--encryption-key-file", secret)
    assert (code, "no damage" in output) == (0, True)
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
    code, output = run("prune", directory, "--older-than", "0s")
    assert code == 1, "the store is in use"
    assert "in use by process" in output


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
    assert (code, "in use by process" in output) == (1, True)
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
    assert run("plan", tmp_path, "--disk-size", "much")[0] == 2
    assert run("plan")[0] == 2
    (tmp_path / "config.json").write_text("[]")
    assert run("plan", tmp_path)[0] == 2


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("7d", 604800), (" 2W ", 1209600)])
def test_durations(text, seconds):
    assert duration(text) == seconds


def test_durations_in_words():
    assert [words(value) for value in (5, 150, 7300, 200_000)] == ["5 s", "2.5 min", "2.0 h", "2.3 d"]
