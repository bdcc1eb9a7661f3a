from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from benchmark.truncation.method import METHODS
from benchmark.truncation_quality import main, parse

TEXT = Path(sysconfig.get_paths()["stdlib"])
ARGUMENTS = [
    "--quick",
    "--text",
    str(TEXT / "asyncio"),
    "--text",
    str(TEXT / "email"),
    "--text",
    str(TEXT / "idlelib"),
]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a quick run leaves behind."""
    directory = tmp_path_factory.mktemp("truncation")
    assert main([*ARGUMENTS, "--output", str(directory)]) == 0
    return directory


@pytest.fixture(scope="module")
def content(output: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((output / "truncation.json").read_text())
    return loaded


def test_a_quick_run_learns(content: dict[str, Any]) -> None:
    losses = list(content["training"]["losses"].values())
    assert losses[-1] < losses[0] - 0.5
    assert content["training"]["held_out_documents"]


def test_every_method_is_measured_after_every_truncation(content: dict[str, Any]) -> None:
    qualities = content["findings"]["qualities"]
    assert {(one["method"], one["truncations"]) for one in qualities} == {
        (name, count) for name in METHODS for count in (None, *range(7))
    }
    for one in qualities:
        assert one["perplexity"][1] <= one["perplexity"][0] <= one["perplexity"][2]
        if one["truncations"] == 0 or one["method"] == "TT":
            assert one["ratio"] == [1.0, 1.0, 1.0]
            assert one["agreement"] == [1.0, 1.0, 1.0]
        elif one["truncations"] is None:
            assert one["ratio"][0] != 1.0
    assert {one["place"] for one in content["findings"]["recalls"]} == {"sink", "kept", "dropped"}


def test_the_figure_is_a_picture(output: Path) -> None:
    picture = matplotlib.image.imread(output / "truncation.png")
    assert min(picture.shape[:2]) > 400
    assert picture[..., :3].std() > 0.05


def test_a_trained_model_is_used_again_and_says_the_same(
    output: Path, content: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*ARGUMENTS, "--model", str(output / "model.pt"), "--output", str(tmp_path)]
    assert main(again) == 0
    assert json.loads((tmp_path / "truncation.json").read_text())["findings"] == content["findings"]
    printed = capsys.readouterr()
    assert "bound of 1.02" in printed.out
    # Hardly trained: the benchmark must say that its numbers show nothing.
    assert "has not learnt to look facts up" in printed.out
    assert "training" not in printed.err


def test_a_model_of_another_training_is_refused(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*ARGUMENTS, "--model", str(output / "model.pt"), "--steps", "7", "--output", str(output)]
    assert main(arguments) == 1
    assert "steps=7" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--page-size", "48"], ["--sink-pages", "8"]])
def test_pages_that_do_not_fit(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, *options, "--output", str(tmp_path)]) == 1
    assert "truncation_quality: " in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--steps", "0"], ["--sink-pages", "0"]])
def test_numbers_that_make_no_sense(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(options)
