"""Measures one broker with many hosts: messages and bytes a second, and how long a new reader takes.

    .venv/bin/python scripts/bench_fleet.py                          200 hosts with 20 VMs each, three minutes
    .venv/bin/python scripts/bench_fleet.py --hosts 20 --seconds 10

One process has the MQTT side of every agent (its bridge and publisher, one connection each) and pretended
VMs. Nothing is polled and no balloon moves: the figures are of messages, not of agents. mosquitto's own
counters ($SYS) tell what it received. In the phase ``calm`` only heartbeats are sent; in ``busy`` the
figures of each VM change every ten seconds. The reader is a `Client` in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import aiomqtt

from qmpballoon.client import Client
from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.model.names import VmId
from qmpballoon.model.records import GuestStats, HostStatus, Life, Limits, Sample, VmStatus
from qmpballoon.mqtt.bridge import Bridge, BridgeSettings
from qmpballoon.mqtt.connection import Broker
from qmpballoon.mqtt.publisher import Publisher
from qmpballoon.protocol.objects import Agent
from qmpballoon.protocol.requests import Request
from qmpballoon.units import GIB, MIB

CHANGE_S: Final = 10.0  # between two changes of a VM in the busy phase
HEARTBEAT_S: Final = 60.0  # the default
PATIENCE_S: Final = 120.0
_AT_ONCE: Final = 20  # agents that connect together
_COUNTERS: Final = (
    "messages/received",
    "bytes/received",
)  # of all kinds: PUBLISH, and few PINGREQ and PUBACK
_SETTLES_S: Final = 3.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Host:
    """The MQTT side of one agent with pretended VMs."""

    def __init__(self, name: str, vms: int, port: int) -> None:
        settings = BridgeSettings((Broker("mqtt", HOST, port),), f"qmpballoon-{name}", name)
        self.bridge = Bridge(settings, _echo, vm_exists=lambda vm: True)
        agent = Agent(name, name, "0.1.0", "bench", HEARTBEAT_S)
        self.publisher = Publisher(self.bridge, agent, min_interval_s=1.0, home_assistant=True)
        self.publisher.host_changed(_host(vms))
        self._vms = [_vm(f"vm{number:02}") for number in range(vms)]
        for vm in self._vms:
            self.publisher.vm_changed(vm)

    async def run(self) -> None:
        """Stay connected and publish until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.bridge.run(), name="bridge")
            group.create_task(self.publisher.run(), name="publisher")

    def change(self, number: int) -> None:
        """Change what a VM has, by more than its dead band."""
        vm = self._vms[number]
        actual = 768 * MIB if vm.actual == 512 * MIB else 512 * MIB
        self._vms[number] = changed = dataclasses.replace(
            vm, actual=actual, target=actual, sample=_sample(actual)
        )
        self.publisher.vm_changed(changed)


async def _echo(request: Request) -> object:
    return {"verb": request.verb}


def _sample(actual: int) -> Sample:
    stats = GuestStats(
        total=actual - 32 * MIB, free=actual // 4, available=actual // 2, caches=actual // 4, swap_in=0,
        swap_out=0, major_faults=12, minor_faults=34567, hugetlb_allocs=0, hugetlb_failures=0,
    )  # fmt: skip
    return Sample(stats, time.monotonic(), actual)


def _vm(name: str) -> VmStatus:
    actual = 512 * MIB
    return VmStatus(
        VmId(name), name, f"/run/qmpballoon/{name}.qmp", "ok", life=Life(4711, 889123),
        uuid="6ba7b810-9dad-11d1-80b4-00c04fd430c8", qemu="10.0.13", run_state="running", size=GIB,
        actual=actual, target=actual, limits=Limits(256 * MIB, GIB, 1000), why="give",
        why_since=datetime.now(UTC), sample=_sample(actual), rss=actual, pid=4711, driver_up=True,
    )  # fmt: skip


def _host(vms: int) -> HostStatus:
    return HostStatus(
        "ok", "fairshare", "auto", 32 * GIB, GIB, vms * GIB // 2, 12 * GIB, 64 * GIB, 20 * GIB, 0.5, 0.1, vms,
        vms, (), 4 * GIB, 8 * GIB,
    )  # fmt: skip


# ---- the reader: a process of its own ----


async def _read(url: str) -> None:
    began_s = time.perf_counter()
    async with Client(url, timeout_s=PATIENCE_S) as client:
        entered_s = time.perf_counter() - began_s
        known = len([vm for vm in client.vms.values() if vm.online and vm.size is not None])
        hosts = len([host for host in client.hosts.values() if host.online])
    print(json.dumps({"seconds": entered_s, "hosts": hosts, "vms": known}))


async def _reader(url: str) -> dict[str, float]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--reader", url, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(PATIENCE_S):
        out, _ = await process.communicate()
    return dict(json.loads(out))


# ---- what the broker counts ----


async def _counters(port: int) -> dict[str, int]:
    """Return the broker's counters, at most a second old: it publishes every second those that changed."""
    found: dict[str, int] = {}
    seconds = 0
    async with asyncio.timeout(PATIENCE_S), aiomqtt.Client(HOST, port) as client:
        await client.subscribe("$SYS/broker/#")
        async for message in client.messages:
            name = message.topic.value.removeprefix("$SYS/broker/")
            if name in _COUNTERS and isinstance(message.payload, bytes):
                found[name] = int(message.payload)
            seconds += name == "uptime"
            if seconds == 3:
                break
    return found


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


async def _phase(
    name: str, broker: LabBroker, hosts: list[Host], vms: int, seconds: float, *, busy: bool
) -> dict[str, object]:
    before, cpu_s, began_s = await _counters(broker.port), _cpu_s(broker.program.pid), time.monotonic()
    step_s, number = CHANGE_S / (len(hosts) * vms), 0
    while (passed_s := time.monotonic() - began_s) < seconds:
        if busy:
            while number < passed_s / step_s:
                hosts[number % len(hosts)].change(number // len(hosts) % vms)
                number += 1
        await asyncio.sleep(0.05)
    after, took_s = await _counters(broker.port), time.monotonic() - began_s
    per_s = {key: (after.get(key, 0) - before.get(key, 0)) / took_s for key in _COUNTERS}
    return {
        "phase": name,
        "messages_per_s": round(per_s[_COUNTERS[0]], 1),
        "kilobytes_per_s": round(per_s[_COUNTERS[1]] / 1000, 1),
        "broker_cpu_percent": round(100 * (_cpu_s(broker.program.pid) - cpu_s) / took_s, 1),
        "reader": await _reader(broker.url),
    }


async def _measure(arguments: argparse.Namespace, directory: Path) -> None:
    limits = ["sys_interval 1"]
    async with LabBroker(directory, options=limits) as broker, AsyncExitStack() as stack:
        group = await stack.enter_async_context(asyncio.TaskGroup())
        began_s, hosts = time.monotonic(), []
        tasks = []
        for number in range(arguments.hosts):
            host = Host(f"edge-{number:03}", arguments.vms, broker.port)
            hosts.append(host)
            tasks.append(group.create_task(host.run(), name=f"host {number}"))
            if number % _AT_ONCE == _AT_ONCE - 1 and not await host.bridge.wait_connected(PATIENCE_S):
                raise SystemExit(f"agent {number} is not connected after {PATIENCE_S:g} s")
        for host in hosts:
            await host.bridge.wait_connected(PATIENCE_S)
        online_s = time.monotonic() - began_s
        await asyncio.sleep(_SETTLES_S)
        print(
            json.dumps({"hosts": len(hosts), "vms": arguments.vms, "all_online_s": round(online_s, 1)}),
            flush=True,
        )
        for name, busy in (("calm", False), ("busy", True)):
            figures = await _phase(name, broker, hosts, arguments.vms, arguments.seconds, busy=busy)
            print(json.dumps(figures), flush=True)
        for task in tasks:
            task.cancel()


def main() -> None:
    """Measure, or read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hosts", type=int, default=200)
    parser.add_argument("--vms", type=int, default=20, help="of each host")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of each phase; a heartbeat is every 60 s"
    )
    parser.add_argument("--reader", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reader:
        asyncio.run(_read(arguments.reader))
        return
    with tempfile.TemporaryDirectory(prefix="qb-fleet-") as directory:
        asyncio.run(_measure(arguments, Path(directory)))


if __name__ == "__main__":
    main()
