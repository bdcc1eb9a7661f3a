"""LoRA adapters have another name in page keys when their files have changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.mem_cache.cached_attention.adapters import BLOCK, BLOCKS, adapter_digest, adapter_id

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"r": 8}')
    (directory / WEIGHTS).write_bytes(bytes(3 * BLOCKS * BLOCK + 5))
    return directory


def name(adapter: Path) -> str:
    return adapter_id(LoRARef.deterministic_id, "a", str(adapter))


def test_the_same_files_have_the_same_name_on_every_machine(adapter: Path) -> None:
    known = name(adapter)
    (adapter / "README.md").write_text("not part of it")
    (adapter / WEIGHTS).touch()
    assert name(adapter) == known
    other = adapter.rename(adapter.with_name("elsewhere"))
    shutil.copytree(other, adapter)
    assert name(adapter) == known


@pytest.mark.parametrize("place", [0, 3 * BLOCK, 3 * BLOCKS * BLOCK + 4])
def test_other_weights_are_another_adapter(adapter: Path, place: int) -> None:
    known = name(adapter)
    with (adapter / WEIGHTS).open("r+b") as file:
        file.seek(place)
        file.write(b"x")
    assert name(adapter) != known


def test_another_configuration_is_another_adapter(adapter: Path) -> None:
    known = name(adapter)
    (adapter / "adapter_config.json").write_text('{"r": 9}')
    assert name(adapter) != known


def test_an_empty_file_has_a_digest(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes(b"")
    assert len(adapter_digest(str(adapter))) == 32


def test_an_adapter_that_does_not_exist_is_left_to_sglang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = str(tmp_path / "absent")
    assert adapter_id(LoRARef.deterministic_id, "a", path) == LoRARef.deterministic_id("a", path)
