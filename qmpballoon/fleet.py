"""Sockets become VMs: one endpoint per path, names and lives, what appears, vanishes and moves.

An endpoint keeps at most one connection to its socket. Busy or hung, it waits in the listen backlog
with that one connection; it is greeted the moment the holder leaves. Two sockets of one life are one
VM: the first path in sorted order serves it, the others are left alone until that one is gone.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Final

from qmpballoon.config import Configuration, rename_for, vm_settings
from qmpballoon.errors import ConnectionLost, MonitorBusy, QmpError, Unreachable
from qmpballoon.health import Connection
from qmpballoon.host import is_stopped, life_of
from qmpballoon.journal import say
from qmpballoon.model import Life, VmName
from qmpballoon.mqtt.topics import safe_level
from qmpballoon.qmp.discovery import SocketMark, SocketWatch
from qmpballoon.qmp.monitor import OpenMonitor, SocketTable, open_monitor, socket_table
from qmpballoon.qmp.session import Session
from qmpballoon.store import KnownSocket, Store
from qmpballoon.vm import Identity, OnEvent, OnRecord, SupervisedVm

FIRST_RETRY_S: Final = 0.1
LAST_RETRY_S: Final = 5.0
HELD_FOR_S: Final = 10.0  # a session that lasted so long was sound: back-off starts anew
LOOK_AT_SILENCE_S: Final = 1.0
_LONGEST_NAME: Final = 64
_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"


class Fleet:
    """All VMs of this agent by name, and the endpoints that serve them."""

    def __init__(
        self,
        configuration: Configuration,
        store: Store,
        *,
        on_record: OnRecord,
        on_event: OnEvent,
        on_gone: Callable[[VmName], None],
        on_new: Callable[[SupervisedVm], None] = lambda vm: None,
        on_fast: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.vms: dict[VmName, SupervisedVm] = {}
        self.configuration = configuration
        self.lives: dict[Life, Endpoint] = {}  # who serves a life
        self.lives_changed = asyncio.Event()  # set, and replaced, when a life is given up
        self._store = store
        self._on_record = on_record
        self._on_event = on_event
        self._on_gone = on_gone
        self._on_new = on_new
        self._on_fast = on_fast
        self._clock = clock
        self._watch = SocketWatch(configuration.discovery.sockets)
        self._endpoints: dict[str, Endpoint] = {}
        self._gone_since_s: dict[VmName, float] = {}
        self._stems: dict[Life, str] = {}  # what a QEMU without -name is called: after its first socket

    @property
    def unidentified(self) -> tuple[str, ...]:
        """Paths of sockets that never answered: no VMs yet."""
        return tuple(path for path, endpoint in self._endpoints.items() if endpoint.is_unidentified)

    def remember(self) -> None:
        """Set up the VMs that an earlier run knew; they are offline until their monitors answer."""
        for path, known in list(self._store.sockets.items()):
            if self._watch.covers(path):
                self._add(VmName(known.vm), known.name, path, qemu_name=known.name)
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
            endpoint = self._endpoints.get(vm.path)
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
            endpoint = self._endpoints.get(vm.path)
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
        base = safe_level(name)
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

    def may_serve(self, endpoint: Endpoint, life: Life) -> bool:
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

    def gave_up(self, endpoint: Endpoint) -> None:
        """Note that the endpoint serves no life any more."""
        for life in [life for life, holder in self.lives.items() if holder is endpoint]:
            del self.lives[life]
        self.lives_changed.set()
        self.lives_changed = asyncio.Event()

    # ── inside ───────────────────────────────────────────────────────────────────────────────────

    def _follow(self, found: Mapping[str, SocketMark], endpoints: asyncio.TaskGroup) -> None:
        for path in [path for path, endpoint in self._endpoints.items() if endpoint.is_over]:
            del self._endpoints[path]
        for path, mark in found.items():
            known = self._endpoints.get(path)
            if known is not None:
                known.socket_is(mark)
                continue
            new = self._endpoints[path] = Endpoint(path, mark, self)
            endpoints.create_task(new.run(), name=f"endpoint {path}")
        for path in self._endpoints.keys() - found.keys():
            self._endpoints[path].socket_is(None)

    def _add(self, name: VmName, shown: str, path: str, *, qemu_name: str) -> SupervisedVm:
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
        self._on_gone(vm.vm)

    def _free_name(self, base: str) -> VmName:
        taken = self.vms.keys()
        if VmName(base) not in taken:
            return VmName(base)
        number = 2
        while (name := VmName(f"{base[: _LONGEST_NAME - len(str(number)) - 1]}-{number}")) in taken:
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


class Endpoint:
    """One socket path: connects, waits its turn, hands the session to the VM, and again."""

    def __init__(self, path: str, mark: SocketMark, fleet: Fleet) -> None:
        self.path = path
        self.identity: Identity | None = None
        self.is_over = False
        self._mark: SocketMark | None = mark
        self._fleet = fleet
        self._answered = False
        self._stirred = asyncio.Event()
        self._connection: asyncio.Task[None] | None = None
        self._listening: frozenset[bytes] = frozenset()
        self._remains: frozenset[bytes] = frozenset()  # of sessions that hung: QEMU has yet to see their end
        self._parked = False
        self._retry_s = FIRST_RETRY_S

    @property
    def is_unidentified(self) -> bool:
        """Tell whether no VM ever answered here, nor is it a second socket of one."""
        return not self._parked and not self.is_over and self._fleet.vm_at(self.path) is None

    def socket_is(self, mark: SocketMark | None) -> None:
        """Note what the path is now: the same socket, another one, or nothing (None)."""
        if mark == self._mark:
            return
        before, self._mark = self._mark, mark
        self._retry_s = FIRST_RETRY_S
        if mark is not None and self._connection is not None:
            another_file = before is not None and before[:2] != mark[:2]
            if another_file or socket_table(self.path).listening != self._listening:
                say("socket-replaced", "the path has another socket now", socket=self.path)
                self.kick()
        self._stirred.set()

    def kick(self) -> None:
        """Give up the connection and look anew."""
        if self._connection is not None:
            self._connection.cancel("kicked")

    async def run(self) -> None:
        """Serve the socket until it is gone and its last session is over."""
        try:
            while self._mark is not None:
                self._stirred.clear()
                self._connection = asyncio.create_task(self._connect_once(), name=f"connection {self.path}")
                try:
                    await asyncio.wait((self._connection,))
                    if not self._connection.cancelled():
                        self._connection.result()
                finally:
                    self._connection.cancel()
                    await asyncio.wait((self._connection,))
                    self._connection = None
                    self._fleet.gave_up(self)
                    if (vm := self._fleet.vm_at(self.path)) is not None and vm.connection == "up":
                        vm.fell_silent("offline")
                await self._back_off()
        finally:
            self.is_over = True
            self._silent("offline")

    async def _connect_once(self) -> None:
        try:
            monitor = open_monitor(self.path)
        except Unreachable:
            self._silent("offline")
            return
        except MonitorBusy:
            self._silent("busy")
            return
        try:
            await self._with(monitor)
        except (ConnectionLost, QmpError) as reason:
            self._lost(str(reason))
        finally:
            monitor.connection.close()

    async def _with(self, monitor: OpenMonitor) -> None:
        life = life_of(monitor.pid) if monitor.pid else None
        if life is not None and not self._fleet.may_serve(self, life):
            monitor.connection.close()
            await self._park(life)
            return
        self._listening = socket_table(self.path).listening
        vm: SupervisedVm | None = None

        def on_event(name: str, details: Mapping[str, object]) -> None:
            if vm is not None:  # before, everything is still to be asked
                vm.on_qmp_event(name, details)

        settings = vm_settings(self._fleet.configuration, name="", socket=self.path)
        greeting = asyncio.create_task(
            Session.greeted(
                monitor, on_event, greeting_timeout_s=None, request_timeout_s=settings.qmp_timeout_s
            ),
            name=f"greeting {self.path}",
        )
        session: Session | None = None
        try:
            session = await self._in_line(greeting, monitor.pid, settings.qmp_timeout_s)
            began_s = time.monotonic()
            self.identity = await _identify(session, stem=self._fleet.stem_of(self.path, life))
            vm = self._fleet.vm_of(self.path, self.identity)
            session.request_timeout_s = vm.settings.qmp_timeout_s
            self._answered = True
            say("vm-online", vm=vm.vm, life=life, qemu=session.version, socket=self.path)
            reason = await vm.serve(session, life, self.identity)
            if time.monotonic() - began_s > HELD_FOR_S:
                self._retry_s = FIRST_RETRY_S
            raise reason
        finally:
            greeting.cancel()
            with suppress(asyncio.CancelledError, ConnectionLost):
                session = session or await greeting
            if session is not None:
                if session.hung:
                    self._remains |= socket_table(self.path).accepted
                    self._silent("unresponsive", monitor.pid)
                await session.close()

    async def _in_line(self, greeting: asyncio.Task[Session], pid: int | None, patience_s: float) -> Session:
        """Wait for the greeting as long as it takes, and say meanwhile why it does not come."""
        wait_s = patience_s
        while True:
            done, _ = await asyncio.wait((greeting,), timeout=wait_s)
            if done:
                self._remains = frozenset()
                return greeting.result()
            self._silent(self._why_silent(pid), pid)
            wait_s = LOOK_AT_SILENCE_S

    def _why_silent(self, pid: int | None) -> Connection:
        if pid is not None and is_stopped(pid):
            return "unresponsive"
        table: SocketTable = socket_table(self.path)
        if table.accepted - self._remains:
            return "busy"
        # A socket that QEMU bound under another name (a relative path, a link) is in no row.
        return "unresponsive" if table.listening or self._remains else "busy"

    async def _park(self, life: Life) -> None:
        """Leave the socket alone for as long as another one serves its life."""
        self._parked = True
        try:
            while self._mark is not None and self._fleet.lives.get(life) not in (None, self):
                changed = asyncio.create_task(self._fleet.lives_changed.wait(), name=f"parked {self.path}")
                stirred = asyncio.create_task(self._stirred.wait(), name=f"parked {self.path}")
                try:
                    await asyncio.wait((changed, stirred), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
                    stirred.cancel()
                self._stirred.clear()
        finally:
            self._parked = False

    async def _back_off(self) -> None:
        if self._mark is None:
            return
        pause_s = self._retry_s * random.uniform(0.5, 1.0)
        self._retry_s = min(LAST_RETRY_S, self._retry_s * 2)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._stirred.wait()

    def _silent(self, how: Connection, pid: int | None = None) -> None:
        vm = self._fleet.vm_at(self.path)
        if vm is not None and (vm.connection != how or pid is not None):
            vm.fell_silent(how, pid)

    def _lost(self, reason: str) -> None:
        vm = self._fleet.vm_at(self.path)
        say("session-lost", reason, level=logging.WARNING, vm=vm.vm if vm else None, socket=self.path)


async def _identify(session: Session, *, stem: str) -> Identity:
    name, uuid = await session.request("query-name"), await session.request("query-uuid")
    said = name.get("name") if isinstance(name, dict) else None
    number = uuid.get("UUID") if isinstance(uuid, dict) else None
    return Identity(
        name=said if isinstance(said, str) and said else stem,
        uuid=number if isinstance(number, str) and number != _NO_UUID else None,
    )
