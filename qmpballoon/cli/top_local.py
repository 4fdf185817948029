"""The VMs of this machine for ``top``: through the agents that run here, and over monitors of no agent."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from qmpballoon.api import Vm
from qmpballoon.cli.sockets import connected
from qmpballoon.cli.status import health_of_error, health_of_state, state_as_json
from qmpballoon.cli.vms import DIRECT, Chosen, choose_from
from qmpballoon.control import Agents, RunningAgent, connected_to, find_agents
from qmpballoon.errors import QmpBalloonError, RequestRefused, Unreachable
from qmpballoon.fleet import FleetHost, FleetVm, host_of, vm_of
from qmpballoon.model.records import SILENT
from qmpballoon.procfs import read_host, rss_of

_STATES_S: Final = 1.0
_LOOK_S: Final = 5.0  # between two looks for agents and sockets that came or went
_FIRST_RETRY_S: Final = 0.5
_LAST_RETRY_S: Final = 8.0
_CONNECT_S: Final = 3.0
_WITHOUT_AGENT: Final = "no-agent"
_NO_AGENT: Final = "no agent holds its monitor, and only an agent decides: see qmpballoon agent --help"


class LocalSource:
    """The agents of this machine, and the VMs at its default sockets. ``control``: as the option."""

    def __init__(self, control: str | None) -> None:
        self.name = f"this machine ({socket.gethostname()})"
        self.problem: str | None = "looking for agents and sockets"
        self.has_news = True
        self.hosts: dict[str, FleetHost] = {}
        self.vms: dict[str, FleetVm] = {}
        self._control = control
        self._agents: dict[str, RunningAgent] = {}  # by host
        self._open: dict[str, Vm] = {}  # by id: monitors that are held
        self._followed: dict[str, asyncio.Task[None]] = {}  # by path: of control sockets and monitors

    async def run(self) -> None:
        """Follow what there is, and look for what comes."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._look(group)
                self.has_news = True
                await asyncio.sleep(_LOOK_S)

    async def _look(self, group: asyncio.TaskGroup) -> None:
        try:
            agents = Agents(()) if self._control == DIRECT else await find_agents(self._control)
            choice = choose_from(agents, ())
        except QmpBalloonError as error:
            self.problem = None if self._followed else str(error)
            return
        problems = choice.problems
        self.problem = "; ".join(problems) if problems and not agents.running else None
        self._followed = {path: task for path, task in self._followed.items() if not task.done()}
        for agent in agents.running:
            self._agents[agent.host] = agent
            if agent.path not in self._followed:
                self._follow(group, agent.path, _Agent(self, agent).run())
        for found in choice.vms:
            if found.agent is None and found.path not in self._followed:
                self._follow(group, found.path, _Monitor(self, found).run())
            elif found.agent is not None and (task := self._followed.pop(found.path, None)) is not None:
                task.cancel()  # an agent has taken it over
        if any(found.agent is None for found in choice.vms):
            self._note_this_host()

    def _follow(self, group: asyncio.TaskGroup, path: str, follow: Any) -> None:
        self._followed[path] = group.create_task(follow, name=f"top {path}")

    def _note_this_host(self) -> None:
        sample = read_host()
        document = {
            "name": "(no agent)",
            "mem_total": sample.mem_total,
            "mem_available": sample.mem_available,
        }
        self.hosts[_WITHOUT_AGENT] = host_of(_WITHOUT_AGENT, document, online=True)

    # ── what those who follow tell ───────────────────────────────────────────────────────────────

    def take_host(self, host: str, document: Mapping[str, object], *, online: bool) -> None:
        """Take what is known of a host; offline: its VMs are, too."""
        self.hosts[host] = host_of(host, document, online=online)
        if not online:
            for key, vm in self.vms.items():
                if vm.host == host and vm.online:
                    self.vms[key] = vm_of(host, vm.vm, vm.document, online=False)
        self.has_news = True

    def take_vm(self, host: str, vm: str, document: Mapping[str, object]) -> None:
        """Take a VM object."""
        is_online = document.get("health") not in SILENT
        self.vms[f"{host}/{vm}"] = vm_of(host, vm, document, online=is_online)
        self.has_news = True

    def keep_vms(self, host: str, known: set[str]) -> None:
        """Drop the VMs of a host that are not among the known ones."""
        gone = [key for key, vm in self.vms.items() if vm.host == host and vm.vm not in known]
        for key in gone:
            del self.vms[key]
            self.has_news = True

    @asynccontextmanager
    async def holding(self, key: str, vm: Vm) -> AsyncIterator[None]:
        """Hold an open monitor for requests."""
        self._open[key] = vm
        try:
            yield
        finally:
            del self._open[key]

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    async def request(self, target: str, verb: str, /, **arguments: Any) -> object:
        """Ask the agent that holds the VM; without one, a target is set over the monitor."""
        host, _, vm = target.partition("/")
        if host == _WITHOUT_AGENT:
            monitor = self._open.get(target)
            if verb != "set-target":
                raise RequestRefused("not-allowed", _NO_AGENT)
            if monitor is None:
                raise Unreachable("its monitor is not open")
            return {"target": await monitor.set_target(arguments["target"])}
        agent = self._agents.get(host)
        if agent is None:
            raise Unreachable(f"no agent of the host {host} runs here")
        async with connected_to(agent.path) as client:
            return await client.request(verb, vm, **arguments)


class _Agent:
    """Follows one agent over its control socket, until it is gone."""

    def __init__(self, source: LocalSource, agent: RunningAgent) -> None:
        self._source = source
        self._agent = agent
        self._last: dict[str, object] = {"name": agent.host}

    async def run(self) -> None:
        host = self._agent.host
        try:
            async with connected_to(self._agent.path) as client, connected_to(self._agent.path) as asking:
                await client.request("subscribe", states_s=_STATES_S)
                self._note(True)
                async with asyncio.TaskGroup() as group:
                    listing = group.create_task(self._list(asking), name=f"top list {host}")
                    try:
                        while True:
                            self._take(await client.receive())
                    finally:
                        listing.cancel()
        except* QmpBalloonError:
            self._note(False)  # the next look follows it again, if it is back

    def _take(self, received: Mapping[str, object]) -> None:
        vm = received.get("vm")
        if isinstance(vm, str) and "run_state" in received:
            self._source.take_vm(self._agent.host, vm, received)
        elif "level" in received and "event" not in received:
            self._last = {"name": self._agent.host, **received}
            self._note(True)

    async def _list(self, asking: Any) -> None:
        """Drop VMs that the agent has forgotten."""
        while True:
            listed = await asking.request("list")
            if isinstance(listed, list):
                known = {str(each.get("vm")) for each in listed if isinstance(each, Mapping)}
                self._source.keep_vms(self._agent.host, known)
            await asyncio.sleep(_LOOK_S)

    def _note(self, online: bool) -> None:
        self._source.take_host(self._agent.host, dict(self._last), online=online)


class _Monitor:
    """Follows one VM over its monitor, until its socket is gone."""

    def __init__(self, source: LocalSource, found: Chosen) -> None:
        self._source = source
        self._path = found.path
        self._id = Path(found.path).stem
        self._name = self._id

    async def run(self) -> None:
        retry_s = _FIRST_RETRY_S
        try:
            while _is_there(self._path):
                try:
                    async with connected(self._path, timeout_s=_CONNECT_S) as vm:
                        self._name, retry_s = vm.name, _FIRST_RETRY_S
                        async with self._source.holding(f"{_WITHOUT_AGENT}/{self._id}", vm):
                            await self._follow(vm)
                except QmpBalloonError as error:
                    self._take({"health": health_of_error(error, self._path)})
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)
        finally:
            self._source.vms.pop(f"{_WITHOUT_AGENT}/{self._id}", None)
            self._source.has_news = True

    async def _follow(self, vm: Vm) -> None:
        while True:
            state = await vm.state(fresh_s=2 * _STATES_S)
            self._take(
                {
                    **state_as_json(state),
                    "health": await health_of_state(vm, state),
                    "rss": rss_of(vm.pid) if vm.pid else None,
                    "qemu": vm.qemu,
                }
            )
            await asyncio.sleep(_STATES_S)

    def _take(self, document: Mapping[str, object]) -> None:
        self._source.take_vm(_WITHOUT_AGENT, self._id, {"name": self._name, **document})


def _is_there(path: str) -> bool:
    return os.path.lexists(path)
