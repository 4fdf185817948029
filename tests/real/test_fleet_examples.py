"""The programs for many hosts: where a new VM fits, and the benchmark of a fleet on one broker."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from agent_process import PATIENCE_S
from mqtt_listener import running, settings_for

from qmpballoon.errors import RequestRefused
from qmpballoon.lab.broker import LabBroker
from qmpballoon.model.records import rfc3339
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.protocol.requests import Request
from qmpballoon.protocol.verbs import Room
from qmpballoon.units import GIB

ROOT = Path(__file__).parents[2]


async def run(*words: str) -> tuple[int | None, str, str]:
    """Run a program of this tree; return its exit status, its stdout and its stderr."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def answer_room(room: int | None, request: Request) -> object:
    assert isinstance(request.asked, Room)
    if room is None:
        raise RequestRefused("busy", "too many requests")
    size = request.asked.size.of(None)
    return {"room": room, "fits": size <= room, "headroom": room - size}


def an_agent(broker: LabBroker, host: str, room: int | None) -> Bridge:
    """Return the MQTT side of an agent with this room; None: it refuses to tell."""
    settings = settings_for(broker, host=host, client_id=host)
    bridge = Bridge(settings, partial(answer_room, room), vm_exists=lambda vm: False)
    now = rfc3339(datetime.now(UTC))
    bridge.retain(bridge.topics.host_object, lambda: {"ts": now, "heartbeat_s": 60})
    return bridge


async def test_a_vm_is_started_where_there_is_the_most_room(sockets_dir: Path) -> None:
    program, place = "examples/start_where_room.py", "import sys; print('on', *sys.argv[1:]); sys.exit(7)"
    async with LabBroker(sockets_dir) as broker, AsyncExitStack() as stack:
        for host, room in {"a": 2 * GIB, "b": 3 * GIB, "c": GIB, "d": None}.items():
            await stack.enter_async_context(running(an_agent(broker, host, room)))
        command = [sys.executable, "-c", place, "vm@{host}"]
        code, out, err = await run(program, broker.url, "2GiB", *command)
        assert (code, out.split()) == (7, ["b", "on", "vm@b"])
        assert err.startswith("d: ")
        code, out, err = await run(program, broker.url, "4GiB", *command)
        assert (code, out) == (1, "")
        assert f"no host has room for {4 * GIB} bytes" in err
    code, _, err = await run(program, broker.url, "2GiB", "true")
    assert (code, "cannot reach the broker" in err) == (3, True)


async def test_the_benchmark_of_a_fleet_counts_what_the_broker_received() -> None:
    code, out, err = await run("scripts/bench_fleet.py", "--hosts", "3", "--vms", "2", "--seconds", "4")
    assert code == 0, err
    fleet, calm, busy = map(json.loads, out.splitlines())
    assert (fleet["hosts"], fleet["vms"]) == (3, 2)
    for phase in (calm, busy):
        assert (phase["reader"]["hosts"], phase["reader"]["vms"]) == (3, 6)
    assert 0 <= calm["messages_per_s"] < busy["messages_per_s"]
