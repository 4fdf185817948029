"""What systemd is told."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpballoon.agent import systemd


@pytest.fixture
def manager(sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The service manager's end of the channel; its path has an at sign, as a container's may."""
    (sockets_dir / "user@1000").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(os.fspath(sockets_dir / "user@1000" / "notify"))
        channel.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(sockets_dir / "user@1000" / "notify"))
        yield channel


def test_states_go_in_one_message(manager: socket.socket) -> None:
    systemd.notify("READY=1", "STATUS=watching")
    assert manager.recv(4096) == b"READY=1\nSTATUS=watching"


def test_an_abstract_socket_is_notified(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"qmpballoon-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("\0" + name)
        channel.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        systemd.notify("READY=1")
        assert channel.recv(4096) == b"READY=1"


@pytest.mark.parametrize("address", [None, "", "relative", "/nobody/listens/here"])
def test_without_a_manager_nothing_happens(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if address is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    before = set(os.listdir("/proc/self/fd"))
    systemd.notify("READY=1")
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_reload_message_has_the_monotonic_time(manager: socket.socket) -> None:
    systemd.reloading()
    reloading, clock = manager.recv(4096).decode().split("\n")
    assert reloading == "RELOADING=1"
    assert int(clock.removeprefix("MONOTONIC_USEC=")) > 0


async def test_the_watchdog_is_notified_while_the_loop_runs(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    manager.setblocking(False)
    feeding = asyncio.create_task(systemd.feed_watchdog())
    try:
        async with asyncio.timeout(5):
            for _ in range(3):
                assert await asyncio.get_running_loop().sock_recv(manager, 64) == b"WATCHDOG=1"
    finally:
        feeding.cancel()
        await asyncio.wait((feeding,))


@pytest.mark.parametrize(
    ("microseconds", "pid"), [("", None), ("soon", None), ("0", None), ("-5", None), ("2000", "1")]
)
async def test_a_watchdog_of_another_pid_is_ignored(
    microseconds: str, pid: str | None, manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    async with asyncio.timeout(5):
        await systemd.feed_watchdog()
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(64)
