"""Thousands of reconnects leak no task, no descriptor, no thread and no memory."""

from __future__ import annotations

import asyncio
import gc
import linecache
import os
import threading
import tracemalloc
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from qmpballoon.agent import back_off as back_off_module
from qmpballoon.agent import connector as connector_module
from qmpballoon.agent.context import Context
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.store import Store
from qmpballoon.agent.supervisor import Supervisor
from qmpballoon.config import AgentSettings, Configuration, DiscoverySettings, VmSettings
from qmpballoon.errors import ConnectionLost, MonitorBusy
from qmpballoon.model.records import Life
from qmpballoon.qmp import discovery as discovery_module
from qmpballoon.qmp import monitor as monitor_module
from qmpballoon.qmp import process as process_module
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.monitor import OpenMonitor, open_monitor
from qmpballoon.sim.qemu.faults import Babble, Faults
from qmpballoon.sim.qemu.server import SimulatedQemu

RECONNECTS = 2000
LIVES = 200
GROWTH = 400_000  # bytes, after all that; one event kept per reconnect would be more
PATIENCE_S = 60.0


def ignored(_name: str, _details: Mapping[str, object]) -> None:
    """Discard an event."""


def held() -> tuple[int, int, int]:
    """Return the numbers of tasks, open descriptors and threads."""
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd")), threading.active_count()


def more_than(before: tuple[int, int, int]) -> bool:
    """Tell whether any of the numbers has grown."""
    return any(now > was for now, was in zip(held(), before, strict=True))


async def grows_by(round_of_work: Callable[[int], Awaitable[None]], rounds: int) -> int:
    """Do the rounds and return by how many bytes memory grew; tasks, descriptors and threads must not."""
    for number in range(rounds // 10):  # allocated once: caches, pools, the first log lines
        await round_of_work(number)
    before, memory_before = held(), traced_bytes()
    for number in range(rounds):
        await round_of_work(number)
    with suppress(TimeoutError):  # tasks and connections that still end are no leak
        async with asyncio.timeout(PATIENCE_S):
            while more_than(before):
                await asyncio.sleep(0.001)
    assert not more_than(before)
    return traced_bytes() - memory_before


def traced_bytes() -> int:
    """Return the memory in use, without the source lines that Python keeps for tracebacks."""
    linecache.clearcache()
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


FAULTS = [
    Faults(),  # the server disconnects
    Faults(cut_after_bytes=20),  # within the greeting
    Faults(cut_after_bytes=130),  # within the negotiation
    Faults(half_reply_to=frozenset({"*"})),
    Faults(babble=Babble.RANDOM_BYTES),
    Faults(babble=Babble.UNKNOWN_ID),
    Faults(event_flood=3),
    Faults(silent_greeting=True),
    Faults(silent_to=frozenset({"*"})),
]


@pytest.mark.parametrize("loop_factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_thousands_of_sessions_leak_nothing(
    loop_factory: Callable[[], asyncio.AbstractEventLoop], sockets_dir: Path
) -> None:
    ended = {"well": 0, "lost": 0, "busy": 0}

    async def soak() -> None:
        async with SimulatedQemu(sockets_dir / "a.qmp") as qemu:

            async def once(number: int) -> None:
                qemu.faults = faults = FAULTS[number % len(FAULTS)]
                patience_s = 0.002 if faults.silent_greeting or faults.silent_to else PATIENCE_S
                try:
                    session = await Session.greeted(
                        open_monitor(qemu.path),
                        ignored,
                        greeting_timeout_s=patience_s,
                        request_timeout_s=patience_s,
                    )
                    try:
                        await session.request("query-status")
                        if number % 2:
                            qemu.drop_clients()
                            await session.ended()
                        ended["well"] += 1
                    finally:
                        await session.close()
                except ConnectionLost:
                    ended["lost"] += 1
                except MonitorBusy:
                    ended["busy"] += 1
                async with asyncio.timeout(PATIENCE_S):
                    while qemu._connections:
                        await asyncio.sleep(0)

            assert await grows_by(once, RECONNECTS) < GROWTH

    tracemalloc.start()
    try:
        with asyncio.Runner(loop_factory=loop_factory, debug=False) as runner:  # debugging keeps tracebacks
            runner.run(soak())
    finally:
        tracemalloc.stop()
    assert min(ended.values()) > RECONNECTS // len(FAULTS) // 2
    assert sum(ended.values()) == RECONNECTS * 11 // 10


async def test_hundreds_of_lives_at_one_path_leak_nothing(
    sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sockets_dir / "a.qmp"
    life = Life(2**22, 1)

    def opened(name: str) -> OpenMonitor:
        return replace(open_monitor(name), pid=life.pid)  # all simulated QEMUs share our own pid

    monkeypatch.setattr(connector_module, "open_monitor", opened)
    monkeypatch.setattr(connector_module, "life_of", lambda pid: Life(pid, 1))
    monkeypatch.setattr(process_module, "can_hold", lambda pid, size: True)
    monkeypatch.setattr(back_off_module, "FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(back_off_module, "MOST_RENEWALS", 10**6)
    monkeypatch.setattr(discovery_module, "_SETTLE_S", 0.001)
    all_rows, ours = monitor_module._read_rows, os.fsencode(sockets_dir)

    def our_rows() -> dict[bytes, list[tuple[bytes, bytes, bytes]]]:
        """Leave out the sockets of other programs: their number changes the memory that the table takes."""
        return {path: rows for path, rows in all_rows().items() if path.startswith(ours)}

    monkeypatch.setattr(monitor_module, "_read_rows", our_rows)
    configuration = Configuration(
        agent=AgentSettings(host="edge-7", state_dir=os.fspath(sockets_dir / "state")),
        discovery=DiscoverySettings(sockets=(f"{sockets_dir}/*.qmp",)),
        vm=VmSettings(fast_interval_s=0.005, grace_s=0.0),
    )
    store = Store(sockets_dir / "state", "edge-7")
    context = Context(configuration, store)
    registry = Registry(context)
    supervisor = Supervisor(context, registry)

    async def until_health(word: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not any(vm.status.health == word for vm in registry):
                await asyncio.sleep(0.001)

    async def run_and_end(number: int) -> None:
        nonlocal life
        life = Life(life.pid + 1, 1)
        async with SimulatedQemu(path) as qemu:
            await until_health("ok")
            assert next(iter(registry)).run.life == life
            qemu.die(unlink=bool(number % 2))
            await until_health("offline")
        supervisor.forget_absent_vms()

    # A pool with room for more makes a thread whenever none is idle yet: one more is no leak.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(max_workers=1))
    following = asyncio.create_task(supervisor.run())
    asyncio.get_running_loop().set_debug(False)  # it keeps tracebacks of every task
    tracemalloc.start()
    try:
        assert await grows_by(run_and_end, LIVES) < GROWTH
    finally:
        tracemalloc.stop()
        following.cancel()
        await asyncio.wait((following,))
        await store.close()
    assert len(registry) == 1
    assert len(supervisor._connectors) <= 1
    assert len(registry._serving) <= 1
