"""The public Python API: one VM, over its monitor, for the length of an ``async with``."""

from __future__ import annotations

import asyncio
import os
import time
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Final

from qmpballoon.addresses import name_from
from qmpballoon.errors import ConnectionLost, NotReached, NotReady, OutOfRange, QmpError
from qmpballoon.model.records import Event, VmState, utc_now
from qmpballoon.model.tolerance import SAFE_MARGIN, is_reached, is_steady
from qmpballoon.not_reached import not_reached
from qmpballoon.opening import Process, open_session, wait_for_machine
from qmpballoon.qmp import balloon
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.events import EventLog
from qmpballoon.qmp.process import qemu_pid
from qmpballoon.qmp.statistics import Sampler
from qmpballoon.units import Size, format_size, parse_size, round_up_to_page

_POLL_S: Final = 0.05  # of query-balloon while waiting: events are up to a second late
_CLOSES_S: Final = 2.0  # a QEMU that hangs does not hold up the end for longer
_HELD_FOR_S: Final = 60.0  # what a guest held longer ago says nothing about it now


@asynccontextmanager
async def connect(
    socket: str | os.PathLike[str],
    *,
    timeout_s: float = 5.0,
    process: Process | None = None,
    allow_remote: bool = False,
) -> AsyncIterator[Vm]:
    """Open a VM's monitor; waits up to ``timeout_s`` for the socket to exist, accept and greet.

    With ``process``, the QEMU that the caller has started (a ``subprocess.Popen``, or a process of asyncio),
    the wait ends when that process ends. With ``-daemonize`` it is the one that ends first.

    ``socket`` may be ``tcp:HOST:PORT``; only with ``allow_remote`` that of another machine: a monitor has no
    password and no encryption.

    At the end the guest's polling interval is restored; the balloon stays as it is.

    Raises:
        Unreachable: no socket, no listener, access denied, the process has ended or does not answer.
        MonitorBusy: another client holds the monitor.
        ConnectionLost: the peer does not speak QMP.
    """
    events = EventLog()
    deadline_s = time.monotonic() + timeout_s
    session = await open_session(
        os.fspath(socket), events.add, timeout_s=timeout_s, process=process, allow_remote=allow_remote
    )
    try:
        machine = await wait_for_machine(session, deadline_s)
        name = await session.vm_name() or name_from(session.path)
        vm = Vm(session, events, name, qemu_pid(session, machine))
        try:
            yield vm
        finally:
            await vm._close()
    finally:
        await session.close()


class DangerousTarget(UserWarning):
    """A target is so small that the guest may start to swap, stall or kill; it is set all the same."""


class Vm:
    """A VM with an open monitor; made by :func:`connect`.

    ``name`` is QEMU's ``-name``, else the socket's file stem; ``pid`` the QEMU process, None if it is
    in another pid namespace or behind a proxy; ``qemu`` its version. Any call may raise
    ConnectionLost. Cancelling a call leaves the connection usable.
    """

    def __init__(self, session: Session, events: EventLog, name: str, pid: int | None) -> None:
        self.name = name
        self.pid = pid
        self.qemu = session.version
        self._session = session
        self._events = events
        self._resizer: balloon.VirtioBalloon | None = None
        self._sampler: Sampler | None = None
        self._starting = asyncio.Lock()
        self._held: tuple[float, int] | None = None  # when it was seen, and what the guest held

    async def state(self, *, fresh_s: float = 3.0) -> VmState:
        """Return the VM's state with fresh guest statistics.

        ``fresh_s`` is the longest wait for them: they take some ms, and up to a second if a calm guest's
        are equal to the last. ``guest`` is None if none arrive.

        Raises:
            NoBalloon: the VM has no balloon device.
        """
        resizer, sampler = await self._find_balloon(), await self._started_sampler()
        run_state = await balloon.query_run_state(self._session)
        may_come = fresh_s > 0 and run_state == "running" and await self.driver_up() is not False
        before = await resizer.actual()
        fresh = may_come and await sampler.refresh(timeout_s=fresh_s)
        actual = await resizer.actual()
        size = await balloon.memory_size(self._session)
        sample = sampler.sample if fresh else None
        if sample is None:
            return VmState(run_state, size, actual, resizer.asked, None)
        sampled = replace(sample, actual=actual if is_steady(before, actual) else None)
        if sampled.held is not None:
            self._held = time.monotonic(), sampled.held
        return VmState(run_state, size, actual, resizer.asked, sampled.aged(time.monotonic()), sampled.held)

    async def driver_up(self) -> bool | None:
        """Tell whether the guest's balloon driver is up; None if QEMU cannot report it (``qmp.commands``).

        Raises:
            NoBalloon: the VM has no balloon device.
        """
        driver = await (await self._find_balloon()).driver()
        return None if driver is None else driver.up

    @property
    def has_reported(self) -> bool:
        """Whether the guest has sent statistics since QEMU started; False before ``state``."""
        return self._sampler is not None and self._sampler.ever_reported

    async def ready(self, *, timeout_s: float) -> VmState:
        """Wait until the guest's balloon driver is up and has sent a fresh sample; return that state.

        Raises:
            NotReady: not within ``timeout_s``; the message names what is missing.
            NoBalloon: the VM has no balloon device.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            state = await self.state(fresh_s=min(1.0, max(0.05, deadline_s - time.monotonic())))
            if state.guest is not None and state.run_state == "running":
                return state
            if time.monotonic() >= deadline_s:
                raise NotReady(await self._missing(state, timeout_s))
            await asyncio.sleep(_POLL_S)

    async def set_target(self, size: Size, *, wait_s: float | None = None) -> int:
        """Set the balloon target to ``size`` (a percentage is of the VM's size); return it in bytes.

        Without ``wait_s`` it returns when QEMU has accepted the target; the guest may not have moved yet.
        With ``wait_s`` it returns when ``actual`` is within max(1 MiB, 0.5 % of the VM's size) of it.

        Any size is obeyed. A guest that is shrunk below what it holds (``VmState.held``) plus 24 MiB may
        swap, stall or kill: ``qmpballoon set`` refuses such a target without ``--force``. Here it causes a
        warning, DangerousTarget, when QEMU has accepted the target, if ``state``, ``ready`` or ``wait_for``
        has read what the guest holds in the last minute: this call reads no statistics.

        Raises:
            InvalidSize, OutOfRange: not a size, or not a possible one for this VM.
            NotReached: not reached within ``wait_s``; the target stays.
            NoBalloon: the VM has no balloon device.
        """
        asked = await self._ask(size)
        if asked.danger is not None:
            warnings.warn(asked.danger, DangerousTarget, stacklevel=2)
        if wait_s is not None:
            await self._wait_reached(asked, wait_s)
        return asked.target

    @asynccontextmanager
    async def squeeze(self, size: Size, *, wait_s: float = 10.0) -> AsyncIterator[int]:
        """Set the target to ``size``, wait until it is reached, and set it back at the end.

        The value is the target in bytes. It is set back to the target that was set before on this
        connection, else to the ``actual`` that was found; also if ``size`` was not reached, or the block
        raised an error or was cancelled. Only after a block that raised nothing does it wait, again up to
        ``wait_s``, until that is reached, and raise the errors of setting it back.

        Raises:
            NotReached: not reached within ``wait_s``.
            The errors of `set_target`.
        """
        resizer = await self._find_balloon()
        before = await resizer.actual() if resizer.asked is None else resizer.asked
        try:
            yield await self.set_target(size, wait_s=wait_s)
        except BaseException:
            with suppress(ConnectionLost, QmpError):
                await resizer.ask(before)
            raise
        await self._wait_reached(await self._ask(before), wait_s)

    async def wait_for(self, condition: Callable[[VmState], bool], *, timeout_s: float) -> VmState:
        """Wait until ``condition`` holds for the VM's state and return that state.

        Raises:
            NotReached: not within ``timeout_s``; ``.state`` is the last state.
        """
        began_s = time.monotonic()
        while True:
            left_s = began_s + timeout_s - time.monotonic()
            state = await self.state(fresh_s=min(1.0, max(0.05, left_s)))
            if condition(state):
                return state
            if time.monotonic() - began_s >= timeout_s:
                sizes = f"{format_size(state.actual)} of {format_size(state.size)}"
                reason = f"what was waited for did not come true within {timeout_s:g} s"
                message = f"{self.name}: {reason}; the guest has {sizes}"
                raise NotReached(state.target, state, timeout_s, message)
            await asyncio.sleep(_POLL_S)

    async def events(self) -> AsyncIterator[Event]:
        """Iterate over the events since connect; ends with ConnectionLost.

        A reader that is too slow gets one event ``lagged`` instead of those missed: ``{"missed": N}``.
        """
        read = 0
        while True:
            changed = self._events.changed
            while read < self._events.count:
                missed = self._events.first - read
                if missed > 0:
                    read += missed
                    yield Event("lagged", utc_now(), {"missed": missed})
                    continue
                event = self._events[read]
                read += 1
                yield event
            if self._events.changed is changed:
                await self._session.while_running(changed.wait())

    # ── private ──────────────────────────────────────────────────────────────────────────────────

    async def _find_balloon(self) -> balloon.VirtioBalloon:
        if self._resizer is None:
            self._resizer = balloon.VirtioBalloon(self._session, await balloon.find_balloon(self._session))
        return self._resizer

    def _danger_of(self, target: int) -> str | None:
        """Return why a target is dangerous; None if it is not, or if that is not known."""
        if self._held is None or time.monotonic() - self._held[0] > _HELD_FOR_S:
            return None
        held = self._held[1]
        if target >= held + SAFE_MARGIN:
            return None
        return (
            f"{self.name}: {format_size(target)} is less than the {format_size(held)} that the guest held "
            f"and a margin of {format_size(SAFE_MARGIN)}: it may swap, stall or kill"
        )

    async def _started_sampler(self) -> Sampler:
        device = (await self._find_balloon()).device
        async with self._starting:
            if self._sampler is None:
                self._sampler = Sampler(self._session, device)
            if self._sampler.found_s is None:  # true, too, if the first call was cancelled
                await self._sampler.start(1)
        return self._sampler

    async def _ask(self, size: Size) -> _Asked:
        resizer = await self._find_balloon()
        whole = await balloon.memory_size(self._session)
        target = round_up_to_page(parse_size(size, whole=whole))
        if target > whole:
            raise OutOfRange(
                f"{format_size(target)} is more than the VM's {format_size(whole)}: "
                "a balloon cannot add memory"
            )
        danger = self._danger_of(target)
        shrinks = danger is not None and target < await resizer.actual()
        await resizer.ask(target)
        return _Asked(target, whole, danger if shrinks else None)

    async def _wait_reached(self, asked: _Asked, wait_s: float) -> None:
        resizer, deadline_s = await self._find_balloon(), time.monotonic() + wait_s
        while not is_reached(await resizer.actual(), asked.target, asked.size):
            if time.monotonic() >= deadline_s:
                raise await self._not_reached(asked.target, wait_s)
            await asyncio.sleep(_POLL_S)

    async def _not_reached(self, target: int, waited_s: float) -> NotReached:
        state = await self.state(fresh_s=0.1)
        message = not_reached(
            self.name,
            target=target,
            actual=state.actual,
            waited_s=waited_s,
            available=state.guest.available if state.guest else None,
            run_state=state.run_state,
            driver_up=await self.driver_up(),
        )
        return NotReached(target, state, waited_s, message)

    async def _missing(self, state: VmState, waited_s: float) -> str:
        place = f"{self.name}: not ready within {waited_s:g} s: "
        if state.run_state != "running":
            return f"{place}the VM is {state.run_state}, not running"
        driver_up = await self.driver_up()
        if driver_up is None:
            return (
                f"{place}no statistics came: the guest's balloon driver is not up (Linux: module "
                f"virtio_balloon), or sends none; QEMU {self.qemu} cannot tell which"
            )
        if not driver_up:
            return f"{place}the guest's balloon driver is not up (Linux: module virtio_balloon)"
        return f"{place}the guest's balloon driver is up and sends no statistics"

    async def _close(self) -> None:
        self._session.request_timeout_s = _CLOSES_S
        if self._sampler is not None:
            with suppress(ConnectionLost, QmpError):  # then QEMU has no interval of ours
                await self._sampler.stop()


def session_of(vm: Vm) -> Session:
    """Return the session of a VM, for what `Vm` does not offer; it ends with the VM's connection."""
    return vm._session


@dataclass(frozen=True, slots=True)
class _Asked:
    """A target that QEMU has accepted, the VM's size, both in bytes, and why the target is dangerous."""

    target: int
    size: int
    danger: str | None
