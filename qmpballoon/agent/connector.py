"""The connector of one socket path: connects, passes the session to the VM, and reconnects when it ends.

A connector keeps at most one connection. If the monitor is busy or hung, that connection waits in the
listen backlog; QEMU greets it as soon as the other client disconnects.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final

from qmpballoon.addresses import is_tcp
from qmpballoon.agent import arrival
from qmpballoon.agent.answering import Answering
from qmpballoon.agent.back_off import BackOff
from qmpballoon.agent.context import Context
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.run import Identity
from qmpballoon.agent.trouble import Trouble
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.config import Claim, vm_settings
from qmpballoon.errors import ConnectionLost, MonitorBusy, QmpError, Unreachable
from qmpballoon.log import log_event
from qmpballoon.model.facts import Connection
from qmpballoon.model.records import Life
from qmpballoon.procfs import is_stopped, life_of
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.discovery import SocketMark
from qmpballoon.qmp.monitor import OpenMonitor, SocketTable, open_monitor, was_accepted
from qmpballoon.qmp.tcp import open_tcp_monitor

LOOK_AT_SILENCE_S: Final = 1.0
MOST_LOOKS: Final = 8  # how many times longer the pause between two looks at silence becomes
ONE_MORE_LOOK_S: Final = 0.001
TCP_CONNECTS_S: Final = 5.0
LATE_S: Final = 0.1
AT_ONCE_S: Final = 0.005  # many sockets that appear at once share one reading of the kernel's table
SECOND_WAITS_S: Final = 5.0  # where no process tells: for the monitor that served the VM to answer again


class Connector:
    """Connects to one socket path, passes the session to its VM, and reconnects when it ends."""

    def __init__(
        self, path: str, mark: SocketMark, context: Context, registry: Registry, back_off: BackOff
    ) -> None:
        self.path = path
        self.identity: Identity | None = None
        self.is_over = False
        self._mark: SocketMark | None = mark
        self._context = context
        self._registry = registry
        self._wakeup = asyncio.Event()
        self._connection: asyncio.Task[None] | None = None
        self._bound: frozenset[bytes] = frozenset()
        self._unclosed: frozenset[bytes] = frozenset()  # of hung sessions: QEMU has not seen their end yet
        self._parked = False
        # The path of the first one, by an earlier session; only where no process tells.
        self._second_of: str | None = None
        self._back_off = back_off
        self._trouble = Trouble(path, context, registry)

    @property
    def unidentified(self) -> str | None:
        """Why no VM is known here; None if one is, or if it is a second socket of one."""
        if self._parked or self.is_over or self._registry.at(self.path) is not None:
            return None
        return self._trouble.problem or "no answer yet"

    def socket_is(self, mark: SocketMark | None) -> None:
        """Note which socket is at the path now: the same, another one, or none (None)."""
        if mark == self._mark:
            return
        before, self._mark = self._mark, mark
        if mark is not None:
            self._back_off.renewed()
        self._second_of = None
        self._trouble.note(None)
        if mark is not None and self._connection is not None:
            another_file = before is None or before[:2] != mark[:2]
            # The file may exist before its QEMU listens, and it is checked only when it changes.
            bound = self._table(AT_ONCE_S).bound
            if another_file or (self._bound and bound != self._bound):
                log_event("socket-replaced", "the path has another socket now", socket=self.path)
                self.kick()
            else:  # perhaps the table from before the connection was older than the socket
                self._bound = bound
        if mark is None or not self._back_off.waits:
            self._wakeup.set()

    def kick(self) -> None:
        """Close the connection and connect again."""
        if self._connection is not None:
            self._connection.cancel("kicked")

    async def run(self) -> None:
        """Serve the socket until it is gone and its last session is over."""
        try:
            if self._back_off.waits:
                await self._pause()
            while self._mark is not None:
                self._wakeup.clear()
                self._connection = asyncio.create_task(self._connect_once(), name=f"connection {self.path}")
                try:
                    await asyncio.wait((self._connection,))
                    if not self._connection.cancelled():
                        self._connection.result()
                finally:
                    self._connection.cancel()
                    await asyncio.wait((self._connection,))
                    self._connection = None
                    self._registry.gave_up(self)
                    if (vm := self._registry.at(self.path)) is not None and vm.connection == "up":
                        vm.mark_unreachable("offline")
                await self._pause()
        finally:
            self.is_over = True
            self._trouble.is_silent("offline")

    async def _connect_once(self) -> None:
        tables = self._context.socket_tables
        # A socket that is tried again from time to time is worth no reading of its own.
        before = self._table(LOOK_AT_SILENCE_S) if self._back_off.waits else tables.lately(self.path)
        try:
            monitor = await self._opened()
        except Unreachable as error:
            self._trouble.is_refused(error)
            return
        except MonitorBusy:
            self._trouble.is_silent("busy")
            self._trouble.no_greeting("busy", None)
            return
        try:
            await self._with(monitor, before)
        except _NoMonitor as reason:
            self._trouble.is_no_monitor(str(reason))
            self._back_off.foreign()  # it is not ours to hold
        except (ConnectionLost, QmpError) as reason:
            self._trouble.lost(str(reason))
        except arrival.SecondMonitor as second:
            self._second_of = second.path
        finally:
            monitor.connection.close()
        if self._second_of is not None:
            await self._park(partial(self._served_second, self._second_of), look_again_s=SECOND_WAITS_S)

    async def _opened(self) -> OpenMonitor:
        if is_tcp(self.path):
            return await open_tcp_monitor(self.path, timeout_s=TCP_CONNECTS_S)
        return open_monitor(self.path)

    async def _with(self, monitor: OpenMonitor, before: SocketTable) -> None:
        life = life_of(monitor.pid) if monitor.pid else None
        if life is not None:
            self._registry.connected(self.path, life)
            if (first := self._registry.served_before(self, life)) is not None:
                monitor.connection.close()
                self._registry.are_one(serving=first, second=self.path)
                await self._park(partial(self._registry.served_at, self, life))
                return
        self._bound = before.bound
        vm: ManagedVm | None = None

        def on_event(name: str, details: Mapping[str, object]) -> None:
            if vm is not None:  # until then an event makes invalid what was asked on arrival
                vm.on_qmp_event(name, details)

        settings = vm_settings(self._context.configuration, Claim("", self.path, monitor.owner))
        opening = Session(monitor, on_event, request_timeout_s=settings.qmp_timeout_s)
        greeting = asyncio.create_task(opening.started(greeting_timeout_s=None), name=f"greeting {self.path}")
        session: Session | None = None
        began_s = time.monotonic()
        try:
            wait_s = settings.qmp_timeout_s
            session = await self._wait_for_greeting(opening, greeting, monitor, life, before, wait_s)
            self._back_off.greeted()
            self._trouble.note(None)
            began_s = time.monotonic()
            machine, who, looked = await arrival.until_machine_is_there(session, self._trouble.note)
            life = arrival.life_behind(session, machine, life)
            if life is not None and not self._registry.may_serve(self, life):
                return  # the socket that comes first has greeted meanwhile
            stem = self._registry.stem_of(self.path, life)
            identity = arrival.identify(who, stem=stem, owner=monitor.owner)
            await arrival.until_arrived(session, identity, self._registry, self._trouble.note)
            self._take_up_second(identity)
            monitor_here = Answering(self, session, identity.reported, has_life=life is not None)
            await arrival.check_it_is_first(monitor_here, self._registry)
            self.identity = identity
            vm = self._registry.answered(self.path, identity, life)
            session.request_timeout_s = vm.spec.settings.qmp_timeout_s
            log_event("vm-online", vm=vm.id, life=life, qemu=session.version, socket=self.path)
            raise await vm.serve(session, life, identity, looked)
        finally:
            greeting.cancel()
            with suppress(asyncio.CancelledError, ConnectionLost):
                session = session or await greeting
            if session is not None:
                self._back_off.lasted(time.monotonic() - began_s, exceeded=session.exceeded)
                if session.exceeded:
                    self._trouble.sent_too_much(session, monitor)
                elif session.hung:
                    self._unclosed |= self._table(LOOK_AT_SILENCE_S).accepted
                    self._trouble.hung(vm, life, monitor.pid)
                await session.close()

    def _take_up_second(self, identity: Identity) -> None:
        """Serve the VM whose second monitor this was, if its first one does not answer any more."""
        first, self._second_of = self._second_of, None
        vm = None if first is None else self._registry.at(first)
        if vm is None or self._registry.at(self.path) is not None:
            return
        before = vm.run.identity
        if vm.connection != "up" and before is not None and before.reported == identity.reported:
            self._registry.take_over(vm, self.path)

    async def _wait_for_greeting(
        self,
        opening: Session,
        greeting: asyncio.Task[Session],
        monitor: OpenMonitor,
        life: Life | None,
        before: SocketTable,
        patience_s: float,
    ) -> Session:
        """Wait for the greeting as long as it may come, and log meanwhile why it does not.

        Raises:
            _NoMonitor: what is behind the socket does not speak QMP.
        """
        pid, is_stranger = monitor.pid, self._registry.at(self.path) is None
        wait_s, looks = patience_s, 1
        stopped: ManagedVm | None = None  # its process allocates nothing, so its RSS is read once
        while True:
            ends_s = time.monotonic() + wait_s
            done, _ = await asyncio.wait((greeting,), timeout=wait_s)
            if not done:
                await asyncio.sleep(ONE_MORE_LOOK_S)
                if not greeting.done() and time.monotonic() - ends_s > LATE_S:
                    continue  # it was us who were late: what was received is still to be read
            if greeting.done():
                self._unclosed = frozenset()
                try:
                    return greeting.result()
                except ConnectionLost as error:
                    if is_stranger:
                        raise _NoMonitor(str(error)) from error
                    raise
            if is_stranger and life is not None and self._registry.is_served_by_another(self, life):
                no_greeting = "no greeting, and its QEMU has another monitor"
                raise _NoMonitor(self._trouble.what_it_is(no_greeting, pid))
            if pid is not None and is_stopped(pid):
                if (vm := self._registry.at(self.path)) is not stopped:
                    self._trouble.is_silent("unresponsive", pid)
                stopped = vm
                self._trouble.no_greeting("unresponsive", pid)
            else:
                stopped = None
                why, is_mute = self._why_silent(monitor, before, max_age_s=LOOK_AT_SILENCE_S * looks)
                if is_stranger and is_mute and opening.greeting is None:
                    raise _NoMonitor(self._trouble.what_it_is("connected, and no greeting came", pid))
                self._trouble.is_silent(why, pid)
                self._trouble.no_greeting(why, pid)
            looks = min(MOST_LOOKS, 2 * looks)
            wait_s = LOOK_AT_SILENCE_S * looks  # a greeting wakes at once; only the reason may change

    def _why_silent(
        self, monitor: OpenMonitor, before: SocketTable, *, max_age_s: float
    ) -> tuple[Connection, bool]:
        """Return why no greeting comes, and whether our connection was accepted: a monitor greets then.

        A monitor that another client holds, or whose QEMU does not run its main loop yet, accepts nobody.
        """
        is_mute = was_accepted(monitor.connection)
        if is_mute is None:  # then by the table, where one more has come
            is_mute = not before.accepted and bool(self._table(AT_ONCE_S).accepted)
        if is_mute:
            return "unresponsive", True
        table = self._table(max_age_s)
        if table.accepted - self._unclosed:
            return "busy", False
        # A socket that QEMU bound under another name (a relative path, a link) is in no row.
        return "unresponsive" if table.listening or self._unclosed else "busy", False

    def _table(self, max_age_s: float) -> SocketTable:
        return self._context.socket_tables.of(self.path, max_age_s=max_age_s)

    def _served_second(self, path: str) -> str | None:
        vm = self._registry.at(path)
        is_served = self._registry.answers_at(path) or (vm is not None and vm.silent_for_s < SECOND_WAITS_S)
        return path if is_served else None

    async def _park(self, served_at: Callable[[], str | None], *, look_again_s: float | None = None) -> None:
        """Wait while another socket, the one at the path that is returned, serves this QEMU."""
        self._parked = True
        try:
            while self._mark is not None and (path := served_at()) is not None:
                given_up = self._registry.given_up(path)
                changed = asyncio.create_task(given_up.wait(), name=f"parked {self.path}")
                wakeup = asyncio.create_task(self._wakeup.wait(), name=f"parked {self.path}")
                try:
                    await asyncio.wait(
                        (changed, wakeup), timeout=look_again_s, return_when=asyncio.FIRST_COMPLETED
                    )
                finally:
                    changed.cancel()
                    wakeup.cancel()
                self._wakeup.clear()
        finally:
            self._parked = False

    async def _pause(self) -> None:
        if self._mark is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self._back_off.pause_s()):
                await self._wakeup.wait()


class _NoMonitor(Exception):
    """What is behind the socket does not speak QMP."""
