"""The agent without MQTT over simulated QEMUs; the test sets their lives and the clock."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from schema_checks import check_event

from qmpballoon.agent import back_off as back_off_module
from qmpballoon.agent import connector as connector_module
from qmpballoon.agent import registry as registry_module
from qmpballoon.agent import supervisor as supervisor_module
from qmpballoon.agent.actuator import Actuator
from qmpballoon.agent.context import Context
from qmpballoon.agent.governor import Governor
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.service import Service
from qmpballoon.agent.store import Store
from qmpballoon.agent.supervisor import Supervisor
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.config import AgentSettings, Configuration, DiscoverySettings, VmSettings
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, HostStatus, Life, VmStatus
from qmpballoon.protocol.objects import event_object
from qmpballoon.protocol.payloads import Content
from qmpballoon.protocol.requests import Request
from qmpballoon.protocol.verbs import read_asked
from qmpballoon.qmp import process as process_module
from qmpballoon.qmp.monitor import OpenMonitor, open_monitor
from qmpballoon.sim.qemu.server import SimulatedQemu

PATIENCE_S = 60.0  # for what takes milliseconds on an idle machine
_NO_SUCH_PID = 2**22  # more than any Linux gives
QUICK = VmSettings(stats_interval_s=1, fast_interval_s=0.005, grace_s=0.0, qmp_timeout_s=5.0)


class Kernel:
    """A fake of the kernel: a pid and a life per simulated QEMU, all of which share the pid of the tests."""

    def __init__(self) -> None:
        self.age_s = 1000.0  # of a new life
        self.owners: dict[str, int] = {}  # by path; others are of the user that runs the tests
        self._lives: dict[str, Life] = {}
        self._ended: set[Life] = set()
        self._proxies: set[int] = set()
        self._number = 0

    def new_life(self, *paths: Path | str) -> Life:
        """Set a new life for the QEMU behind these paths."""
        self._number += 1
        uptime_s = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        started = int((uptime_s - self.age_s) * os.sysconf("SC_CLK_TCK"))
        life = Life(_NO_SUCH_PID + self._number, started)
        self._lives |= dict.fromkeys((os.fspath(path) for path in paths), life)
        return life

    def end_process(self, life: Life) -> None:
        """Report the process of this life as ended."""
        self._ended.add(life)

    def open_monitor(self, path: str) -> OpenMonitor:
        monitor = open_monitor(path)
        pid = (self._lives.get(path) or self.new_life(path)).pid
        return replace(monitor, pid=pid, owner=self.owners.get(path, monitor.owner))

    def can_hold(self, pid: int, size: int) -> bool:
        return pid not in self._proxies

    def proxy(self, life: Life) -> None:
        """Report the process of this life as a proxy, which has not mapped the guest's memory."""
        self._proxies.add(life.pid)

    def life_of(self, pid: int) -> Life | None:
        return next(
            (life for life in self._lives.values() if life.pid == pid and life not in self._ended), None
        )


class AgentHarness:
    """The VMs, the governor and the service of an agent; records what they publish."""

    def __init__(self, directory: Path, kernel: Kernel, settings: VmSettings, **tables: Any) -> None:
        self.directory = directory
        self.kernel = kernel
        self.configuration = Configuration(
            agent=AgentSettings(host="edge-7", state_dir=os.fspath(directory / "state")),
            vm=settings,
            **{"discovery": DiscoverySettings(sockets=(f"{directory}/*.qmp",)), **tables},
        )
        self.records: dict[str, VmStatus] = {}
        self.healths: list[str] = []
        self.events: list[tuple[VmId | None, Event]] = []
        self.gone: list[str] = []
        self.hosts: list[HostStatus] = []
        self.later_s = 0.0  # how far the agent's clock is ahead
        self._notified = asyncio.Event()
        self.store = Store(directory / "state", "edge-7")
        self.context = Context(self.configuration, self.store, clock=lambda: time.monotonic() + self.later_s)
        self.context.feed.add(self)
        actuator = Actuator(self.context.feed)
        self.registry = Registry(self.context)
        self.supervisor = Supervisor(self.context, self.registry)
        self.governor = Governor(self.context, self.registry, self.supervisor, actuator)
        self.service = Service(
            self.context,
            self.registry,
            self.governor,
            actuator,
            host="edge-7",
            reload=lambda: {"reloaded": True},
        )

    def vm(self, name: str) -> ManagedVm:
        vm = self.registry.get(VmId(name))
        assert vm is not None
        return vm

    @property
    def ids(self) -> set[str]:
        """The ids of all VMs."""
        return {vm.id for vm in self.registry}

    def record(self, name: str) -> VmStatus:
        return self.vm(name).status

    def reconfigure(self, configuration: Configuration) -> None:
        """Apply a reloaded configuration, as the agent does."""
        self.context.configuration = configuration
        self.supervisor.reconfigure()

    def health(self, name: str) -> str | None:
        """The VM's health, None while there is no such VM."""
        vm = self.registry.get(VmId(name))
        return None if vm is None else vm.status.health

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition, checked at each change and event; without it in time the test fails."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition():
                    self._notified.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.005):
                            await self._notified.wait()
        except TimeoutError:
            vms = [vm.status for vm in self.registry]
            raise AssertionError(
                f"not within {PATIENCE_S:g} s; VMs: {vms}; last events: {self.events[-10:]}"
            ) from None

    async def move(self, name: str, target: int) -> None:
        """Set a target in bytes and wait until the guest has it exactly; the request allows 1 MiB less."""
        await self.ask(name, "set-target", target=target, wait_s=PATIENCE_S)
        await self.until(lambda: self.record(name).actual == target)

    async def until_health(self, name: str, *words: str) -> VmStatus:
        await self.until(lambda: self.health(name) in words)
        return self.record(name)

    async def until_sampled(self, name: str, *, samples: int) -> VmStatus:
        """Wait for this many new samples of a VM."""
        for _ in range(samples):
            before = self.sampled_at_s(name)
            await self.until(lambda before=before: self.sampled_at_s(name) != before)  # type: ignore[misc]
        return self.record(name)

    def sampled_at_s(self, name: str) -> float | None:
        """Return when the VM's newest sample was seen; a sample whose figures come again is seen again."""
        sample = self.record(name).sample
        return None if sample is None else sample.seen_at_s

    async def ask(
        self, vm: str | None, verb: str, *, expires_at_s: float | None = None, **arguments: object
    ) -> Any:
        """Handle a request as one that came over MQTT."""
        asked = read_asked(verb, "host" if vm is None else "vm", Content(arguments=arguments))
        request = Request(None if vm is None else VmId(vm), asked, expires_at_s=expires_at_s)
        async with asyncio.timeout(PATIENCE_S):
            return await self.service.handle(request)

    def events_of(self, vm: str) -> list[str]:
        return [event.event for name, event in self.events if name == vm]

    # ── a listener of the feed ───────────────────────────────────────────────────────────────────

    def vm_changed(self, vm: VmStatus) -> None:
        if not self.healths or self.healths[-1] != vm.health:
            self.healths.append(vm.health)
        self.records[vm.id] = vm
        self._notified.set()

    def vm_gone(self, vm: VmId) -> None:
        self.gone.append(vm)
        self._notified.set()

    def vm_event(self, vm: VmId, event: Event) -> None:
        check_event(event_object(vm, event))
        self.events.append((vm, event))
        self._notified.set()

    def host_changed(self, host: HostStatus) -> None:
        self.hosts.append(host)

    def host_event(self, event: Event) -> None:
        check_event(event_object(None, event))
        self.events.append((None, event))
        self._notified.set()

    def sampled(self) -> None:
        self._notified.set()


@asynccontextmanager
async def running_agent(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    kernel: Kernel | None = None,
    settings: VmSettings = QUICK,
    *,
    governed: bool = False,
    **tables: Any,
) -> AsyncIterator[AgentHarness]:
    """Run the agent on all sockets of a directory, and the governor's tick if ``governed``."""
    kernel = kernel or Kernel()
    monkeypatch.setattr(connector_module, "open_monitor", kernel.open_monitor)
    monkeypatch.setattr(connector_module, "life_of", kernel.life_of)
    monkeypatch.setattr(process_module, "can_hold", kernel.can_hold)
    for module in (supervisor_module, registry_module):
        monkeypatch.setattr(module, "life_of", kernel.life_of)
    monkeypatch.setattr(back_off_module, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(back_off_module, "LAST_RETRY_S", 0.05)
    monkeypatch.setattr(back_off_module, "FIRST_LONG_RETRY_S", 0.05)
    harness = AgentHarness(directory, kernel, settings, **tables)
    harness.supervisor.remember()
    parts = [asyncio.create_task(harness.store.run()), asyncio.create_task(harness.supervisor.run())]
    if governed:
        parts.append(asyncio.create_task(harness.governor.run()))
    try:
        yield harness
    finally:
        for part in parts:
            part.cancel()
        outcomes = await asyncio.gather(*parts, return_exceptions=True)
        await harness.store.close()
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome


class Qemus:
    """Simulated QEMUs by file stem; all end with the test."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self._directory = directory
        self._stack = stack

    def path(self, name: str) -> Path:
        return self._directory / f"{name}.qmp"

    async def start(self, *names: str, **how: Any) -> SimulatedQemu:
        """Start one QEMU with a monitor for each name."""
        paths = [self.path(name) for name in names]
        return await self._stack.enter_async_context(SimulatedQemu(*paths, **how))


@asynccontextmanager
async def qemus_in(directory: Path) -> AsyncIterator[Qemus]:
    async with AsyncExitStack() as stack:
        yield Qemus(directory, stack)
