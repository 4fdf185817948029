"""Which monitors a typed path or glob names."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qmpballoon.cli.sockets import Found, find_sockets, is_listening
from qmpballoon.errors import Unreachable


@pytest.fixture
def sockets(sockets_dir: Path) -> Iterator[Path]:
    """A directory with two sockets that listen, one that no longer does, and a file."""
    with ExitStack() as stack:
        for name in ("b.qmp", "a.qmp", "stale.sock"):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(sockets_dir / name))
            listener.listen(1)
            if name == "stale.sock":
                listener.close()
        (sockets_dir / "file.qmp").write_text("")
        yield sockets_dir


def test_a_glob_finds_only_sockets_in_sorted_order(sockets: Path) -> None:
    found = find_sockets([f"{sockets}/*.qmp"])
    assert found == [Found(f"{sockets}/{name}", is_named=False) for name in ("a.qmp", "b.qmp")]


def test_a_typed_socket_is_returned_once(sockets: Path) -> None:
    found = find_sockets([f"{sockets}/b.qmp", f"{sockets}/*.qmp", f"{sockets}/b.qmp"])
    assert found == [Found(f"{sockets}/a.qmp", is_named=False), Found(f"{sockets}/b.qmp", is_named=True)]


def test_a_missing_path_is_returned_as_typed(sockets_dir: Path) -> None:
    assert find_sockets([f"{sockets_dir}/x.qmp"]) == [Found(f"{sockets_dir}/x.qmp", is_named=True)]


def test_a_path_that_exists_is_no_glob(sockets_dir: Path) -> None:
    path = sockets_dir / "[a].qmp"
    path.write_text("")
    assert find_sockets([str(path)]) == [Found(str(path), is_named=True)]


def test_without_paths_the_default_globs_are_used(sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(sockets_dir))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    (sockets_dir / "qmpballoon").mkdir()
    path = sockets_dir / "qmpballoon" / "mine.qmp"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert Found(str(path), is_named=False) in find_sockets([])


def test_no_sockets_found_names_the_qemu_options(sockets_dir: Path) -> None:
    with pytest.raises(Unreachable, match=r"start QEMU with -qmp unix:.*server=on,wait=off"):
        find_sockets([f"{sockets_dir}/*.qmp"])


def test_a_listener_is_detected_without_a_connection(sockets: Path) -> None:
    assert is_listening(f"{sockets}/a.qmp")
    assert not is_listening(f"{sockets}/stale.sock")
    assert not is_listening(f"{sockets}/missing.qmp")
    assert not is_listening(f"{sockets}/file.qmp")
    assert not is_listening("/" + "x" * 200)
