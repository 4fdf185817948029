"""Sockets become VMs: one endpoint per path, names and lives, what appears, vanishes and moves.

Two sockets of one life are one VM: the first path in sorted order serves it, the others are left alone
until that one is gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Final

from qmpballoon.agent.connector import Connector
from qmpballoon.agent.store import KnownSocket, Store
from qmpballoon.agent.vm import Identity, OnEvent, OnFast, OnRecord, SupervisedVm
from qmpballoon.config import Configuration, rename_for, vm_settings
from qmpballoon.log import say
from qmpballoon.model.names import VmId, safe_name
from qmpballoon.model.records import Life
from qmpballoon.procfs import life_of
from qmpballoon.qmp.discovery import SocketMark, SocketWatch

_LONGEST_NAME: Final = 64


class Supervisor:
    """All VMs of this agent by name, and the endpoints that serve them."""

    def __init__(
        self,
        configuration: Configuration,
        store: Store,
        *,
        on_record: OnRecord,
        on_event: OnEvent,
        on_gone: Callable[[VmId], None],
        on_new: Callable[[SupervisedVm], None] = lambda vm: None,
        on_fast: OnFast = lambda at_once: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.vms: dict[VmId, SupervisedVm] = {}
        self.configuration = configuration
        self.lives: dict[Life, Connector] = {}  # who serves a life
        self.lives_changed = asyncio.Event()  # set, and replaced, when a life is given up
        self._store = store
        self._on_record = on_record
        self._on_event = on_event
        self._on_gone = on_gone
        self._on_new = on_new
        self._on_fast = on_fast
        self._clock = clock
        self._watch = SocketWatch(configuration.discovery.sockets)
        self._connectors: dict[str, Connector] = {}
        self._gone_since_s: dict[VmId, float] = {}
        self._stems: dict[Life, str] = {}  # what a QEMU without -name is called: after its first socket

    @property
    def unidentified(self) -> tuple[str, ...]:
        """Paths of sockets that never answered: no VMs yet."""
        return tuple(path for path, endpoint in self._connectors.items() if endpoint.is_unidentified)

    def remember(self) -> None:
        """Set up the VMs that an earlier run knew; they are offline until their monitors answer."""
        for path, known in list(self._store.sockets.items()):
            if self._watch.covers(path):
                self._add(VmId(known.vm), known.name, path, qemu_name=known.name)
            else:
                self._store.know(path, None)

    async def run(self) -> None:
        """Follow the sockets for as long as the agent runs."""
        async with asyncio.TaskGroup() as endpoints, aclosing(self._watch.changes()) as changes:
            async for found in changes:
                self._follow(found, endpoints)

    def reconfigure(self, configuration: Configuration) -> None:
        """Take over a re-read configuration."""
        self.configuration = configuration
        self._watch.watch(configuration.discovery.sockets)
        for vm in list(self.vms.values()):
            endpoint = self._connectors.get(vm.path)
            if not self._watch.covers(vm.path):
                self._drop(vm)
                if endpoint is not None:
                    endpoint.socket_is(None)
                    endpoint.kick()
            elif endpoint is not None and endpoint.identity is not None:
                if self.vm_of(vm.path, endpoint.identity) is not vm:
                    endpoint.kick()  # its session feeds the VM of the old name
            else:
                vm.settings = vm_settings(configuration, name=vm.name, socket=vm.path)
                vm.touch()

    def retire(self) -> None:
        """Say nothing more of the VMs: the agent stops, and they do not."""
        for vm in self.vms.values():
            vm.retired = True

    def forget_the_gone(self) -> None:
        """Drop the VMs that had no socket and no process for ``forget_after_s``."""
        now_s = self._clock()
        self._stems = {
            life: stem
            for life, stem in self._stems.items()
            if life in self.lives or life_of(life.pid) == life
        }
        for vm in list(self.vms.values()):
            endpoint = self._connectors.get(vm.path)
            socket = endpoint is not None and not endpoint.is_over
            if socket or (vm.life is not None and life_of(vm.life.pid) == vm.life):
                self._gone_since_s.pop(vm.vm, None)
            elif (
                now_s - self._gone_since_s.setdefault(vm.vm, now_s)
                >= self.configuration.discovery.forget_after_s
            ):
                say("vm-forgotten", "no socket and no process for forget_after_s", vm=vm.vm)
                self._drop(vm)
                self._store.forget(vm.vm)

    # ── for the endpoints ────────────────────────────────────────────────────────────────────────

    def vm_at(self, path: str) -> SupervisedVm | None:
        """Return the VM whose monitor is this socket, if it is known."""
        return next((vm for vm in self.vms.values() if vm.path == path), None)

    def vm_of(self, path: str, identity: Identity) -> SupervisedVm:
        """Return the VM that answered at this socket, under its name; a new or renamed one is set up."""
        name = rename_for(self.configuration, identity.name, path) or identity.name
        base = safe_name(name)
        vm: SupervisedVm | None = self.vm_at(path)
        known = self._store.sockets.get(path)
        if vm is not None and known is not None and known.base == base:
            vm.settings = vm_settings(self.configuration, name=identity.name, socket=path)
            if vm.name != name:
                vm.name = name
                self._store.know(path, KnownSocket(vm.vm, base, name))
            vm.touch()
            return vm
        if vm is not None:
            say("vm-renamed", vm=vm.vm, now=name)
            vm.retired = True
            self._drop(vm)
        free = self._free_name(base)
        if vm is not None:  # the target belongs to the life, not to the name
            before = self._store.kept(vm.vm)
            self._store.keep(free, life=before.life, sent=before.sent)
        self._store.know(path, KnownSocket(free, base, name))
        return self._add(free, name, path, qemu_name=identity.name)

    def stem_of(self, path: str, life: Life | None) -> str:
        """Return the name of a QEMU without one: its socket's file stem, kept when another one takes over."""
        stem = Path(path).stem
        return stem if life is None else self._stems.setdefault(life, stem)

    def may_serve(self, endpoint: Connector, life: Life) -> bool:
        """Tell whether this endpoint is the one for the life; the first path in sorted order is."""
        holder = self.lives.get(life)
        if holder is not None and holder is not endpoint and holder.path < endpoint.path:
            return False
        if holder is not None and holder is not endpoint:
            say("socket-second", "another socket of the same QEMU comes first", socket=holder.path)
            holder.kick()
        if self.lives.get(life) is not endpoint:
            self.lives[life] = endpoint
            self._move(life, endpoint.path)
        return True

    def gave_up(self, endpoint: Connector) -> None:
        """Note that the endpoint serves no life any more."""
        for life in [life for life, holder in self.lives.items() if holder is endpoint]:
            del self.lives[life]
        self.lives_changed.set()
        self.lives_changed = asyncio.Event()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _follow(self, found: Mapping[str, SocketMark], endpoints: asyncio.TaskGroup) -> None:
        for path in [path for path, endpoint in self._connectors.items() if endpoint.is_over]:
            del self._connectors[path]
        for path, mark in found.items():
            known = self._connectors.get(path)
            if known is not None:
                known.socket_is(mark)
                continue
            new = self._connectors[path] = Connector(path, mark, self)
            endpoints.create_task(new.run(), name=f"endpoint {path}")
        for path in self._connectors.keys() - found.keys():
            self._connectors[path].socket_is(None)

    def _add(self, name: VmId, shown: str, path: str, *, qemu_name: str) -> SupervisedVm:
        vm = SupervisedVm(
            name,
            shown,
            path,
            vm_settings(self.configuration, name=qemu_name, socket=path),
            self._store,
            on_record=self._on_record,
            on_event=self._on_event,
            on_fast=self._on_fast,
            clock=self._clock,
        )
        self.vms[name] = vm
        self._on_new(vm)
        vm.touch()
        return vm

    def _drop(self, vm: SupervisedVm) -> None:
        del self.vms[vm.vm]
        self._gone_since_s.pop(vm.vm, None)
        self._store.know(vm.path, None)
        vm.fell_silent("offline")
        vm.retired = True  # a request or a session that ends later must not bring it back
        self._on_gone(vm.vm)

    def _free_name(self, base: str) -> VmId:
        taken = self.vms.keys()
        if VmId(base) not in taken:
            return VmId(base)
        number = 2
        while (name := VmId(f"{base[: _LONGEST_NAME - len(str(number)) - 1]}-{number}")) in taken:
            number += 1
        return name

    def _move(self, life: Life, path: str) -> None:
        """Let the VM of a life follow it to another of its sockets."""
        vm = next((vm for vm in self.vms.values() if self._is_of(vm, life)), None)
        if vm is None or vm.path == path or self.vm_at(path) is not None:
            return
        known = self._store.sockets.get(vm.path)
        self._store.know(vm.path, None)
        self._store.know(path, known)
        say("vm-moved", vm=vm.vm, socket=path)
        vm.path = path

    def _is_of(self, vm: SupervisedVm, life: Life) -> bool:
        return vm.life == life or (vm.life is None and self._store.kept(vm.vm).life == str(life))
