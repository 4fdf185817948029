"""A monitor that its owner holds: a one-shot command that gives up does the owner no harm."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from agent_process import PATIENCE_S
from test_tcp_monitor import free_port

import qmpballoon
from qmpballoon.cli import main
from qmpballoon.lab.lab import Lab

VERBS = (
    ("status", "{}", "--timeout", "0.2"),
    ("wait", "{}", "ready", "--timeout", "0.2"),
    ("doctor", "{}", "--timeout", "0.2"),
)


class Owner:
    """The program that started QEMU: a plain client that never waits for a place in the backlog."""

    def __init__(self, place: str | tuple[str, int]) -> None:
        self._connection = socket.socket(socket.AF_UNIX if isinstance(place, str) else socket.AF_INET)
        self._connection.settimeout(0 if isinstance(place, str) else PATIENCE_S)
        self._connection.connect(place)
        self._connection.settimeout(PATIENCE_S)

    async def greeted(self) -> bytes:
        return await asyncio.to_thread(self._connection.recv, 2)

    def close(self) -> None:
        self._connection.close()


async def command(*words: str) -> int:
    return await asyncio.to_thread(main, list(words))


@pytest.mark.parametrize("bound", ["absolute", "relative", "tcp"])
async def test_a_command_that_gives_up_leaves_nothing_in_the_backlog(
    bound: str, lab: Lab, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sockets_dir)
    place: str | tuple[str, int] = "mine.sock" if bound == "relative" else str(sockets_dir / "mine.sock")
    if bound == "tcp":
        place = ("127.0.0.1", free_port())
    typed = place if isinstance(place, str) else f"tcp:{place[0]}:{place[1]}"
    option = typed if bound == "tcp" else f"unix:{place}"
    await lab.empty_qemu("mine", arguments=("-qmp", f"{option},server=on,wait=off"))
    owner = Owner(place)
    assert await owner.greeted() == b'{"'
    for verb in (*VERBS, *VERBS):
        assert await command(*(word.format(typed) for word in verb)) == 3
    for _ in range(3):
        with pytest.raises(qmpballoon.MonitorBusy, match="another client holds"):
            async with qmpballoon.connect(typed, timeout_s=0.1):
                pass
    next_one = Owner(place)  # QEMU's backlog takes two: EAGAIN where a given-up client takes a place
    third = Owner(place)
    owner.close()
    assert await next_one.greeted() == b'{"'
    next_one.close()
    assert await third.greeted() == b'{"'
    third.close()
    async with qmpballoon.connect(typed, timeout_s=PATIENCE_S) as vm:
        assert vm.name == "mine"


async def test_a_held_monitor_of_a_stopped_qemu(lab: Lab) -> None:
    guest = await lab.empty_qemu("mine")
    owner = Owner(str(guest.socket))
    assert await owner.greeted() == b'{"'
    guest.stop()
    with pytest.raises(qmpballoon.Unreachable, match=r"is stopped; continue it: kill -CONT"):
        async with qmpballoon.connect(guest.socket, timeout_s=0.1):
            pass
    guest.cont()
    owner.close()


async def test_a_client_that_waits_is_served_when_the_holder_leaves(lab: Lab) -> None:
    guest = await lab.empty_qemu("mine")
    owner = Owner(str(guest.socket))
    assert await owner.greeted() == b'{"'

    async def name() -> str:
        async with qmpballoon.connect(guest.socket, timeout_s=PATIENCE_S) as vm:
            return vm.name

    waiting = asyncio.create_task(name(), name="waits for the holder")
    await asyncio.sleep(0)
    owner.close()
    assert await waiting == "mine"
