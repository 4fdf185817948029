"""Monitors behind a proxy: the process behind the socket is not the QEMU."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from agent_process import AgentWatch, StartAgent, until

from qmpballoon.api import connect
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import GuestFigures
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
    """Start one process that serves all these monitors, as a multiplexer does."""
    started: list[Program] = []

    async def start(*monitors: Path) -> list[Path]:
        fronts = [sockets_dir / f"{monitor.stem}.proxy" for monitor in monitors]
        pairs = [str(path) for pair in zip(fronts, monitors, strict=True) for path in pair]
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
    await proxied(first.socket, second.socket)
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
    (front,) = await proxied(guest.socket)
    async with connect(front) as vm:
        assert vm.pid is None
        assert (await vm.state()).size == guest.memory
    async with connect(guest.socket) as vm:
        assert vm.pid == guest.pid


async def test_two_proxied_monitors_of_one_qemu_are_one_vm(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent, sockets_dir: Path, proxied: Any
) -> None:
    second = sockets_dir / "z-second.qmp"
    guest = await lab.guest("web", arguments=("-qmp", f"unix:{second},server=on,wait=off"))
    await proxied(guest.socket)
    await proxied(second)
    agent = start_agent(broker, discovery={"sockets": [f"{sockets_dir}/*.proxy"]})
    await watch.until_health("web", "ok")
    await until(
        lambda: (host := watch.last_json("host")) and host["vms"]["total"] == 1 and not host["unidentified"],
        what="one VM",
    )
    state = await watch.until_health("web", "ok")
    assert (state["socket"], state["life"]) == ("web.proxy", None)
    assert watch.last_json("host")["used"] == state["actual"]
    assert not agent.logged("session-lost")
