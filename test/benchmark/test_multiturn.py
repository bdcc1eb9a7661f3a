from __future__ import annotations

from pathlib import Path

import pytest

from benchmark.model import make_model
from benchmark.multiturn import main, parse, vocabulary_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", size="tiny", context=512)


def test_vocabulary_comes_from_the_config(model: Path) -> None:
    assert vocabulary_of(str(model)) == 1_024


def test_conversations_longer_than_the_context_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--history", "400", "--turns", "4", "--new", "20", "--out", "10"]
    assert main(["--compare", "--model-path", str(model), *arguments]) == 1
    assert "reaches 520 tokens" in capsys.readouterr().err


def test_unknown_configurations_are_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--history", "10", "--configurations", "stock,other"]
    assert main(["--compare", "--model-path", str(model), *arguments]) == 1
    assert "hicache" in capsys.readouterr().err


def test_an_absent_server_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base-url", "http://127.0.0.1:9"]) == 1
    assert "does not say which model it serves" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["--compare", "--base-url", "http://x"], ["--compare", "--rounds", "0"]]
)
def test_arguments_that_make_no_sense(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
