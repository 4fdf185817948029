"""Monitors behind a proxy: the process behind the socket is not the QEMU."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from agent_process import AgentWatch, StartAgent

from qmpballoon.api import connect
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import GuestFigures, LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.process import Program
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB

SIZE: Final = 192 * MIB
BUDGET: Final = 270 * MIB
PATIENCE_S: Final = 90.0

PROXY: Final = """
import asyncio, sys

async def copy(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()

async def main(pairs):
    async def served(reader, writer, path):
        there, back = await asyncio.open_unix_connection(path)
        await asyncio.gather(copy(reader, back), copy(there, writer), return_exceptions=True)

    for front, path in zip(pairs[::2], pairs[1::2]):
        await asyncio.start_unix_server(lambda r, w, path=path: served(r, w, path), front)
    await asyncio.Event().wait()

asyncio.run(main(sys.argv[1:]))
"""


@pytest.fixture
def proxied(sockets_dir: Path) -> Iterator[Any]:
    """Start one process that serves the monitors of all these guests, as a multiplexer does."""
    started: list[Program] = []

    async def start(*guests: LabGuest) -> list[Path]:
        fronts = [sockets_dir / f"{guest.name}.proxy" for guest in guests]
        pairs = [
            str(path) for front, guest in zip(fronts, guests, strict=True) for path in (front, guest.socket)
        ]
        started.append(Program([sys.executable, "-c", PROXY, *pairs], log=sockets_dir / "proxy.log"))

        async def there() -> bool:
            return all(front.is_socket() for front in fronts)

        await eventually(there, bool, timeout_s=PATIENCE_S, what="the proxy listens")
        return fronts

    yield start
    for program in started:
        program.destroy()


def holds_or_was_killed(figures: GuestFigures, *, held: int) -> bool:
    return figures.held == held or figures.kills > 0


async def test_guests_behind_a_proxy_are_served_by_their_own_figures(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent, sockets_dir: Path, proxied: Any
) -> None:
    first, second = await asyncio.gather(lab.guest("first", memory=SIZE), lab.guest("second", memory=SIZE))
    await proxied(first, second)
    start_agent(
        broker,
        policy={"mode": "auto"},
        host={"budget": BUDGET, "reserve": "16MiB"},
        discovery={"sockets": [f"{sockets_dir}/*.proxy"]},
    )
    await watch.until_all_ok("first", "second")
    for name in ("first", "second"):
        state = watch.state(name)
        assert (state["pid"], state["rss"], state["life"]) == (None, None, None)

    await first.command("grow 60 20")
    await second.command("grow 105 4")
    for guest, held in ((first, 60 * MIB), (second, 105 * MIB)):
        figures = await eventually(
            guest.figures,
            partial(holds_or_was_killed, held=held),
            timeout_s=PATIENCE_S,
            what=f"{guest.name} holds {held // MIB} MiB",
            interval_s=0.1,
        )
        assert figures.kills == 0
    assert await second.monitor.actual() > BUDGET // 2


async def test_one_vm_behind_a_proxy_has_no_pid(lab: Lab, proxied: Any) -> None:
    guest = await lab.guest("web")
    (front,) = await proxied(guest)
    async with connect(front) as vm:
        assert vm.pid is None
        assert (await vm.state()).size == guest.memory
    async with connect(guest.socket) as vm:
        assert vm.pid == guest.pid
