"""Sockets come and go: one connector for each path that is there and that the configuration names."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import aclosing
from typing import Final

from qmpballoon.addresses import is_tcp
from qmpballoon.agent.back_off import BackOffs
from qmpballoon.agent.connector import Connector
from qmpballoon.agent.context import Context
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.config import Claim, vm_settings
from qmpballoon.log import log_event
from qmpballoon.model.names import VmId
from qmpballoon.procfs import life_of
from qmpballoon.qmp.discovery import SocketMark, SocketWatch

MOST_ABSENT: Final = 512  # VMs without a socket and a process whose names are remembered
UNREADABLE: Final = "the agent's user may not read this directory: the sockets in it are not seen"


class Supervisor:
    """Follows the sockets that the configuration names, and forgets VMs gone for a long time."""

    def __init__(self, context: Context, registry: Registry) -> None:
        self._context = context
        self._registry = registry
        self._watch = SocketWatch(context.configuration.discovery.sockets)
        self._connectors: dict[str, Connector] = {}
        self._back_offs = BackOffs()
        self._gone_since_s: dict[VmId, float] = {}
        self._told: list[str] = []  # unreadable directories that were logged

    @property
    def unidentified(self) -> tuple[tuple[str, str], ...]:
        """Paths of sockets for which no VM is known, and of unreadable directories, each with the reason."""
        sockets = (
            (path, reason)
            for path, connector in self._connectors.items()
            if (reason := connector.unidentified) is not None
        )
        return (*((directory, UNREADABLE) for directory in self._watch.unreadable), *sockets)

    def remember(self) -> None:
        """Set up the VMs that an earlier run knew; they are offline until their monitors answer."""
        store = self._context.store
        for path, known in list(store.sockets.items()):
            if self._watch.covers(path):
                self._registry.remember(path, known)
            else:
                store.know(path, None)

    async def run(self) -> None:
        """Follow the sockets for as long as the agent runs."""
        async with asyncio.TaskGroup() as connectors, aclosing(self._watch.changes()) as changes:
            connectors.create_task(self._context.wheel.run(), name="polls of all VMs")
            async for found in changes:
                self._follow(found, connectors)

    def reconfigure(self) -> None:
        """Apply the configuration that is in force now."""
        self._watch.watch(self._context.configuration.discovery.sockets)
        for _ in range(2):  # a name that one VM has to give up may be another's
            for vm in self._registry:
                self._reconfigure(vm)
        for path, connector in self._connectors.items():
            if not self._watch.covers(path):  # also one whose monitor never answered
                connector.socket_is(None)
                connector.kick()

    def _reconfigure(self, vm: ManagedVm) -> None:
        connector = self._connectors.get(vm.path)
        if not self._watch.covers(vm.path):
            self._drop(vm, "not-configured")
        elif connector is not None and connector.identity is not None:
            if self._registry.named(vm.path, connector.identity) is not vm:
                connector.kick()  # its session feeds the VM of the old name
        else:
            known = self._context.store.sockets.get(vm.path)
            claim = Claim(vm.name, vm.path, known.owner if known else None)
            vm.spec.settings = vm_settings(self._context.configuration, claim)
            vm.touch()

    def tell_unreadable(self) -> None:
        """Log the directories whose sockets the agent cannot see, if they are new."""
        before, self._told = self._told, self._watch.unreadable
        for directory in self._told:
            if directory not in before:
                log_event("socket-refused", UNREADABLE, level=logging.WARNING, socket=directory)

    def forget_absent_vms(self) -> None:
        """Drop the VMs that have had no socket and no process for ``forget_after_s``."""
        self._registry.forget_ended_lives()
        now_s, after_s = self._context.clock(), self._context.configuration.discovery.forget_after_s
        for vm in self._registry:
            if self._is_there(vm):
                self._gone_since_s.pop(vm.id, None)
            elif now_s - self._gone_since_s.setdefault(vm.id, now_s) >= after_s:
                self._forget(vm, "no socket and no process for forget_after_s")
        while len(self._gone_since_s) > MOST_ABSENT:
            self._forget_one_of_many()

    def _forget_one_of_many(self) -> None:
        """Forget the VM that has been absent for longest, of the owner with the most absent VMs."""
        owners = {vm_id: self._context.store.kept(vm_id).owner for vm_id in self._gone_since_s}
        worst = Counter(owners.values()).most_common(1)[0][0]
        oldest = next(vm_id for vm_id, owner in owners.items() if owner == worst)
        vm = self._registry.get(oldest)
        if vm is None:  # renamed or dropped meanwhile
            del self._gone_since_s[oldest]
        else:
            self._forget(vm, f"more than {MOST_ABSENT} VMs have no socket and no process")

    def _forget(self, vm: ManagedVm, why: str) -> None:
        log_event("vm-forgotten", why, vm=vm.id, owner=self._context.store.kept(vm.id).owner)
        self._drop(vm, "gone")
        self._context.store.forget(vm.id)

    def _is_there(self, vm: ManagedVm) -> bool:
        connector = self._connectors.get(vm.path)
        # Of an address of TCP, which has no file, only a connection tells that nobody listens.
        is_absent = is_tcp(vm.path) and vm.connection == "offline"
        if connector is not None and not connector.is_over and not is_absent:
            return True
        life = vm.run.life
        return life is not None and life_of(life.pid) == life

    def _drop(self, vm: ManagedVm, why: str) -> None:
        self._gone_since_s.pop(vm.id, None)
        self._registry.drop(vm, why=why)

    def _follow(self, found: Mapping[str, SocketMark], connectors: asyncio.TaskGroup) -> None:
        for path in [path for path, connector in self._connectors.items() if connector.is_over]:
            del self._connectors[path]
        for path, mark in found.items():
            known = self._connectors.get(path)
            if known is not None:
                known.socket_is(mark)
                continue
            back_off = self._back_offs.of_new(path)
            new = self._connectors[path] = Connector(path, mark, self._context, self._registry, back_off)
            connectors.create_task(new.run(), name=f"connector {path}")
        for path in self._connectors.keys() - found.keys():
            self._connectors[path].socket_is(None)
