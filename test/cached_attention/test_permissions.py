"""Whatever the umask, and whatever was there before."""

import os
import stat

import pytest

from cached_attention.kernels.compilation import CPU, cache_directory, find_or_compile
from cached_attention.permissions import check_private, close_to_others, make_private


@pytest.fixture(params=[0o000, 0o002, 0o022, 0o077])
def _umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("_umask")
def test_what_is_made_is_private(tmp_path):
    make_private(tmp_path / "a" / "b")
    assert (mode(tmp_path / "a"), mode(tmp_path / "a" / "b")) == (0o700, 0o700)


@pytest.mark.parametrize("others", [0o020, 0o002, 0o022, 0o1022])
def test_a_directory_that_others_can_write_is_refused_and_left_alone(tmp_path, others):
    tmp_path.chmod(0o700 | others)
    with pytest.raises(PermissionError, match=f"{tmp_path} has mode {0o700 | others:04o}.*chmod go-w"):
        make_private(tmp_path)
    assert mode(tmp_path) == 0o700 | others
    make_private(tmp_path / "own")
    assert mode(tmp_path / "own") == 0o700


def test_a_directory_that_others_can_read_is_taken_as_it_is(tmp_path):
    tmp_path.chmod(0o755)
    make_private(tmp_path)
    assert mode(tmp_path) == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user(tmp_path, monkeypatch):
    os.chown(tmp_path, 12345, -1)
    check_private(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(PermissionError, match=r"another user \(12345\)"):
        check_private(tmp_path)


def test_an_open_file_is_closed_to_others(tmp_path):
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o666)
    fd = os.open(path, os.O_RDWR)
    close_to_others(fd)
    os.close(fd)
    assert mode(path) == 0o600


def test_no_library_is_loaded_from_where_others_can_put_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("cached_attention.kernels.compilation.SHIPPED", tmp_path / "none")
    make_private(cache_directory())
    cache_directory().chmod(0o777)
    with pytest.raises(PermissionError, match="other users can replace"):
        find_or_compile(CPU)
