from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmark.gpu.__main__ import main
from benchmark.gpu.room import HostMemory, NoRoomError, file_system, require_disk


def test_what_is_pinned_must_fit_what_is_free() -> None:
    HostMemory(total=8, available=6, free=4, pinned=4).require()
    with pytest.raises(NoRoomError, match="a smaller shape"):
        HostMemory(total=8, available=6, free=4, pinned=5).require()
    now = HostMemory.now(pinned=1)
    assert 0 < now.free <= now.available <= now.total
    assert "to be pinned" in str(now)


def test_a_disk_must_have_room(tmp_path: Path) -> None:
    require_disk(tmp_path, 1)
    with pytest.raises(NoRoomError, match="--scratch"):
        require_disk(tmp_path, 2**60)
    assert file_system(Path("/proc")) == "proc"


def test_an_experiment_on_a_gpu_records_host_memory_and_does_not_begin_without_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmark.gpu.kernels.pinned_bytes", lambda setting: 2**60)
    monkeypatch.setattr("benchmark.gpu.kernels.run", lambda *_: pytest.fail("there is no room"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmark.gpu.outcome.describe", lambda device: "a GPU")
    assert main(["kernels", "--shape", "tiny", "--output", str(tmp_path)]) == 1
    content = json.loads((tmp_path / "kernels-tiny.json").read_text())
    assert content["host_memory"]["pinned"] == 2**60
    assert content["host_memory"]["total"] > 0
    assert "host memory: " in capsys.readouterr().out
    assert content["notes"][0].startswith("ended early: the experiment pins")
