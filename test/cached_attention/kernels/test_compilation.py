"""The compiled code exists, is made of 16-byte accesses, and is not missed where it cannot be made."""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

from cached_attention.kernels import compilation, compiler
from cached_attention.kernels.compilation import CPU, find_or_compile, library_name, load_library
from cached_attention.kernels.rope_on_load import PagedComponent, RopeOnLoad

DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@pytest.fixture(scope="module")
def kernels() -> dict[str, str]:
    """Name of each kernel of the library for sm_90a -> its instructions."""
    command = [str(DISASSEMBLER), "-sass", str(find_or_compile("90a"))]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "sm_90a" in text
    functions = text.split("Function : ")[1:]
    return {function.split("\n", 1)[0]: function for function in functions}


def rotating(kernels: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in kernels.items() if "rope_on_load" in name}


def copying(kernels: dict[str, str], word: str) -> str:
    (text,) = (text for name, text in kernels.items() if f"copy_rows_kernelI{word}E" in name)
    return text


def wide(kernels: dict[str, str]) -> list[str]:
    """Those that move 16 bytes at once: 8 elements of 2 bytes, 4 of 4."""
    return [text for name, text in kernels.items() if re.search(r"(bfloat16|half)Li8E|IfLi4E", name)]


def test_sm_90a_copies_16_bytes_at_once_and_reads_all_before_it_writes_any(kernels: dict[str, str]) -> None:
    """128 bytes per thread are in flight, and what is read once does not push anything out of the caches."""
    text = copying(kernels, "5uint4")
    stores, reads = re.findall(r"\bSTG\.\S+", text), re.findall(r"\bLDG\.E\.EF\.128\b", text)
    assert len(stores) == len(reads) == 8
    assert all(".128" in store for store in stores)
    assert len(re.findall(r"\bLDG\.E\.EF\.128\b", text.split("STG.", 1)[0])) == 8
    assert "LDL" not in text
    assert "STL" not in text


def test_sm_90a_reads_and_writes_16_bytes_at_once(kernels: dict[str, str]) -> None:
    assert len(rotating(kernels)) == 6
    assert len(kernels) == 8
    assert len(wide(kernels)) == 3
    for text in wide(kernels):
        stores = re.findall(r"\bSTG\.\S+", text)
        assert len(stores) >= 8
        assert all(".128" in store for store in stores)
        assert len(re.findall(r"\bLDG\.E\.\S*128\S*", text)) >= 8


def test_all_of_a_lane_is_read_before_any_of_it_is_written(kernels: dict[str, str]) -> None:
    """128 bytes of the record are in flight per thread: the link to host memory is kept busy."""
    for text in wide(kernels):
        before_the_first_store = text.split("STG.", 1)[0]
        reads = re.findall(r"\bLDG\.E\.128(?!\.CONSTANT)", before_the_first_store)
        assert len(reads) == 8


def test_no_product_is_contracted_into_a_sum(kernels: dict[str, str]) -> None:
    for text in rotating(kernels).values():
        assert "FMUL" in text
        assert "FFMA" not in text


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_library.cache_clear()
    yield
    load_library.cache_clear()


@pytest.fixture
def only_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libraries are shipped, none so far; there is no compiler, and nothing was compiled before."""
    monkeypatch.setattr(compilation, "SHIPPED", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    return tmp_path


def loader() -> RopeOnLoad:
    component = PagedComponent(torch.zeros(8, 1, 8), torch.ones(2, 128, dtype=torch.uint8))
    return RopeOnLoad([[component]], 4)


def test_without_a_compiler_torch_does_it_and_the_log_says_so_once(
    nothing_compiled: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING):
        loaders = [loader() for _ in range(3)]
    assert [one.is_compiled for one in loaders] == [False] * 3
    (record,) = caplog.records
    assert "install g++" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_compiler_that_fails_is_quoted_in_one_line(
    nothing_compiled: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "false")
    with caplog.at_level(logging.WARNING):
        assert not loader().is_compiled
    (record,) = caplog.records
    assert "\n" not in record.getMessage()


def test_a_cache_that_cannot_be_written_is_no_failure(
    nothing_compiled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not loader().is_compiled


def test_a_shipped_library_is_taken_only_if_it_was_made_of_these_sources(only_shipped: Path) -> None:
    (only_shipped / (library_name(CPU)[: -len("0123456789ab.so")] + "0123456789ab.so")).touch()
    with pytest.raises(compilation.CompilationError):
        find_or_compile(CPU)
    shipped = only_shipped / library_name(CPU)
    shipped.touch()
    assert find_or_compile(CPU) == shipped


def test_a_gpu_takes_what_was_shipped_else_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compilation, "SHIPPED", tmp_path)
    assert compilation.cuda_target((9, 0)) == "90a"
    assert compilation.cuda_target((8, 6)) == "86"
    (tmp_path / library_name(compilation.ALL_GPUS)).touch()
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3)):
        assert compilation.cuda_target(capability) == compilation.ALL_GPUS
    assert compilation.cuda_target((12, 0)) == "120"


def test_a_newer_gpu_without_a_compiler_takes_what_was_shipped(only_shipped: Path) -> None:
    shipped = only_shipped / library_name(compilation.ALL_GPUS)
    with pytest.raises(compilation.CompilationError):
        compilation._library_for("120")
    shipped.touch()
    assert compilation._library_for("120") == shipped
    with pytest.raises(compilation.CompilationError):
        compilation._library_for(CPU)


def test_a_gpu_of_before_compiles_for_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compilation, "SHIPPED", tmp_path)
    (tmp_path / library_name(compilation.ALL_GPUS)).touch()
    assert compilation.cuda_target((7, 5)) == "75"


def test_a_library_that_does_not_load_is_compiled_anew(
    nothing_compiled: None, caplog: pytest.LogCaptureFixture
) -> None:
    kept = compilation._kept(CPU)
    kept.write_bytes(b"of another machine")
    with caplog.at_level(logging.WARNING):
        assert loader().is_compiled
    assert f"{kept} cannot be loaded, and is replaced" in caplog.text


def make_toolkit(home: Path, version: int) -> Path:
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").touch(mode=0o755)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    return home


def test_the_toolkit_is_that_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = make_toolkit(tmp_path / "cuda-12.9", 12090), make_toolkit(tmp_path / "cuda-13.0", 13000)
    monkeypatch.setenv("CUDA_HOME", str(old))
    monkeypatch.setenv("PATH", str(new / "bin"))
    monkeypatch.setattr(compiler, "find_spec", lambda _: None)
    for version, home in (("12.8", old), ("13.0", new), (None, old)):
        monkeypatch.setattr(torch.version, "cuda", version)
        assert compiler.toolkit() == home
    monkeypatch.setattr(torch.version, "cuda", "14.0")
    with pytest.raises(SystemExit, match=rf"no CUDA compiler of version 14.*{old} has 12\. {new} has 13\."):
        compiler.toolkit()


def test_libraries_for_different_runtimes_have_different_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for version in ("12.8", "13.0", "13.1"):
        monkeypatch.setattr(torch.version, "cuda", version)
        names.add((library_name("90a"), library_name(CPU)))
    assert len(names) == 2
    assert len({name for _, name in names}) == 1
