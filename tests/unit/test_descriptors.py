"""What works with no descriptor left, and what is logged."""

from __future__ import annotations

import errno
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from qmpballoon import descriptors
from qmpballoon.agent import host_monitor as host_monitor_module
from qmpballoon.agent import systemd
from qmpballoon.agent.feed import Feed
from qmpballoon.agent.host_monitor import HostMonitor
from qmpballoon.agent.state_file import KnownSocket
from qmpballoon.agent.store import Store
from qmpballoon.config import HostSettings
from qmpballoon.errors import StateUnusable, Unreachable
from qmpballoon.model.records import Life
from qmpballoon.procfs import HostSample, has_ended, life_of, read_host, rss_of
from qmpballoon.qmp.discovery import SocketWatch, scan
from qmpballoon.qmp.monitor import open_monitor, socket_table


@contextmanager
def none_left() -> Iterator[None]:
    """Open all descriptors that this process may have, except one in reserve, if any."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 4, hard))
        with suppress(OSError):
            while True:
                stack.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        yield


@pytest.fixture
def reserve() -> Iterator[None]:
    descriptors.keep_reserve()
    yield
    descriptors.release_reserve()


@pytest.fixture
def manager(sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(os.fspath(sockets_dir / "notify"))
        channel.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(sockets_dir / "notify"))
        yield channel


@pytest.mark.usefixtures("reserve")
def test_with_a_reserved_descriptor_systemd_is_still_notified(manager: socket.socket) -> None:
    with none_left():
        systemd.notify("WATCHDOG=1")
        systemd.notify("WATCHDOG=1")
        assert [manager.recv(64), manager.recv(64)] == [b"WATCHDOG=1"] * 2


def test_without_a_reserved_descriptor_nothing_is_sent_or_raised(manager: socket.socket) -> None:
    with none_left():
        systemd.notify("READY=1")
        with pytest.raises(BlockingIOError):
            manager.recv(64)


@pytest.mark.usefixtures("reserve")
def test_with_one_in_reserve_all_of_proc_can_be_read() -> None:
    life, table = life_of(os.getpid()), socket_table("")
    with none_left():
        assert life_of(os.getpid()) == life
        assert rss_of(os.getpid())
        sample = read_host()
        assert None not in (sample.mem_total, sample.mem_available)
        assert bool(socket_table("").bound) == bool(table.bound)


def test_a_process_that_cannot_be_read_has_not_ended() -> None:
    life = life_of(os.getpid())
    assert life is not None
    assert has_ended(replace(life, started=life.started - 1))
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
        assert has_ended(Life(child.pid, 1))
        with none_left():
            assert life_of(os.getpid()) is None, "precondition: /proc cannot be read"
            assert not has_ended(life)
            assert has_ended(Life(child.pid, 1))


def test_the_reserve_is_restored_and_nothing_leaks(manager: socket.socket) -> None:
    before = len(os.listdir("/proc/self/fd"))
    descriptors.keep_reserve()
    descriptors.keep_reserve()
    assert descriptors.are_left()
    with none_left():
        for _ in range(3):
            systemd.notify("READY=1")
            assert not descriptors.are_left()
    assert len(os.listdir("/proc/self/fd")) == before + 1
    descriptors.release_reserve()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("reserve")
def test_another_error_is_raised_without_a_second_attempt() -> None:
    tries = []

    def denied() -> None:
        tries.append(1)
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        descriptors.with_reserve(denied)
    assert tries == [1]


async def test_an_existing_socket_stays_if_its_directory_cannot_be_listed(sockets_dir: Path) -> None:
    watch = SocketWatch([f"{sockets_dir}/*.qmp"])
    with ExitStack() as stack:
        for name in ("b", "a", "gone"):
            server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            server.bind(os.fspath(sockets_dir / f"{name}.qmp"))
        known = watch.scan({})
        (sockets_dir / "gone.qmp").unlink()
        with none_left():
            assert scan(watch.globs) == {}, "precondition: the directory looks empty"
            found = watch.scan(known)
            assert [os.path.basename(path) for path in found] == ["a.qmp", "b.qmp"]
            assert found.items() < known.items()
            watch.watch([f"{sockets_dir}/a*.qmp"])
            assert [os.path.basename(path) for path in watch.scan(known)] == ["a.qmp"]


def test_a_monitor_is_unreachable_for_now(sockets_dir: Path) -> None:
    with none_left(), pytest.raises(Unreachable, match="Too many open files"):
        open_monitor(sockets_dir / "a.qmp")


async def test_a_state_file_that_cannot_be_opened_now_is_not_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, "edge-7")
    store.know("/run/a.qmp", KnownSocket("a", "a", "a"))
    await store.close()
    text = (tmp_path / "edge-7.json").read_text()

    def refused(*_: object, **__: object) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refused)
        with pytest.raises(StateUnusable, match="Too many open files"):
            Store(tmp_path, "edge-7")
    assert (tmp_path / "edge-7.json").read_text() == text
    again = Store(tmp_path, "edge-7")  # the lock was released
    assert json.loads(text)["sockets"].keys() == again.sockets.keys()
    await again.close()


def test_exhausted_and_recovered_descriptors_are_each_logged_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words: list[str] = []
    monkeypatch.setattr(host_monitor_module, "log_event", lambda word, *_, **__: words.append(word))
    monitor = HostMonitor(Feed())
    monitor.look(HostSettings())
    with none_left():
        monitor.look(HostSettings())
        monitor.look(HostSettings())
        assert words == ["descriptors-exhausted"]
    monitor.look(HostSettings())
    monitor.look(HostSettings())
    assert words == ["descriptors-exhausted", "descriptors-left"]


def test_the_budget_stays_if_the_size_of_the_host_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = HostMonitor(Feed())
    monitor.look(HostSettings())
    before = (monitor.budget, monitor.reserve)
    assert before[0]
    monkeypatch.setattr(host_monitor_module, "read_host", lambda _: HostSample(None, None, None, None))
    monitor.look(HostSettings())
    assert (monitor.budget, monitor.reserve) == before
    assert monitor.sample.mem_available is None
