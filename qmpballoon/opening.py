"""Opening the monitor of one VM, for programs and one-shot commands."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import time
from asyncio.subprocess import Process as AsyncioProcess
from typing import Any, Final, TypeAlias

from qmpballoon.addresses import is_file, is_tcp, refused_address
from qmpballoon.doctor.vm import processes_with
from qmpballoon.errors import ConnectionLost, MonitorBusy, Unreachable
from qmpballoon.procfs import is_stopped
from qmpballoon.qmp.client import EventSink, Session
from qmpballoon.qmp.monitor import (
    HELD_HINT,
    OpenMonitor,
    SocketTable,
    holders_of,
    open_monitor,
    socket_table,
    was_accepted,
)
from qmpballoon.qmp.process import PRECONFIG, Machine, look_at_machine
from qmpballoon.qmp.purpose import purpose_of
from qmpballoon.qmp.tcp import HELD_OR_HANGS, is_tcp_held, open_tcp_monitor

POLL_S: Final = 0.05
_PERMIT: Final = "allow_remote=True"  # to the function: verbs have checked what was typed before
_MONITOR: Final = "give QEMU a monitor: -qmp unix:PATH,server=on,wait=off"
_SILENT: Final = (
    "a QMP monitor greets at once, so this is another socket, such as that of a guest agent, a serial "
    "console or SPICE (or QEMU hangs)"
)
_REQUEST_TIMEOUT_S: Final = 5.0
_ENDS_S: Final = 0.5  # between the end of a process's sockets and its own; milliseconds on an idle machine

Process: TypeAlias = subprocess.Popen[Any] | AsyncioProcess
"""A QEMU that the caller has started, and whose end the caller may await."""


async def open_session(
    path: str,
    on_event: EventSink,
    *,
    timeout_s: float,
    process: Process | None = None,
    allow_remote: bool = False,
) -> Session:
    """Wait up to ``timeout_s`` until the socket exists, accepts and greets; return the running session.

    Raises:
        Unreachable: no socket, no listener, access denied, ``process`` has ended, or QEMU does not answer.
        MonitorBusy: another client holds the monitor.
        ConnectionLost: the peer does not speak QMP.
    """
    if (
        not is_file(path)
        and (refused := refused_address(path, allow_remote=allow_remote, permit=_PERMIT)) is not None
    ):
        raise Unreachable(f"{path}: {refused}")
    deadline_s = time.monotonic() + timeout_s
    while True:
        has_ended = process is not None and exit_status(process) is not None  # before a last attempt
        table = socket_table(path)  # before our own connection is in it
        try:
            monitor = await _opened(path, table, deadline_s)
            break
        except (Unreachable, MonitorBusy) as error:
            if has_ended and isinstance(error, Unreachable):
                raise _ended(path, process) from error
            if time.monotonic() >= deadline_s:
                if isinstance(error, MonitorBusy) and (pid := await _stopped_qemu(table)) is not None:
                    raise _stopped(path, pid) from error  # the backlog is full of what others gave up
                raise
        await asyncio.sleep(POLL_S)
    same = _duplicate(monitor.connection)  # open until it is known why no greeting came
    try:
        return await Session.greeted(
            monitor,
            on_event,
            greeting_timeout_s=max(POLL_S, deadline_s - time.monotonic()),
            request_timeout_s=_REQUEST_TIMEOUT_S,
        )
    except ConnectionLost as error:
        if process is not None and await _ends(process):
            raise _ended(path, process) from error
        raise
    except MonitorBusy:
        waited_s = f"{round(timeout_s, 2):g}"
        if is_tcp(path):
            raise MonitorBusy(f"{path}: no greeting within {waited_s} s: {HELD_OR_HANGS}") from None
        if monitor.pid is not None and is_stopped(monitor.pid):
            raise _stopped(path, monitor.pid) from None
        if same is not None and was_accepted(same):
            purpose = None if monitor.pid is None else purpose_of(monitor.pid, path)
            what = _SILENT if purpose is None else f"this is {purpose}, not a QMP monitor"
            raise Unreachable(
                f"{path}: accepted, and no greeting within {waited_s} s: {what}; {_MONITOR}"
            ) from None
        if table.listening and not table.accepted:
            raise Unreachable(f"{path}: connected, but QEMU did not greet within {waited_s} s") from None
        raise
    finally:
        if same is not None:
            same.close()


def _duplicate(connection: socket.socket) -> socket.socket | None:
    try:
        return connection.dup()
    except OSError:  # no descriptor is left
        return None


async def _opened(path: str, table: SocketTable, deadline_s: float) -> OpenMonitor:
    """Connect, unless another client is seen to hold the monitor.

    A connection that is given up stays in QEMU's backlog of one until the holder leaves, and the next one to
    connect, such as the program that started QEMU, may be refused. So nothing is left there.
    """
    if is_tcp(path):
        if is_tcp_held(path):
            raise MonitorBusy(f"{path}: {HELD_HINT}")
        return await open_tcp_monitor(path, timeout_s=max(POLL_S, deadline_s - time.monotonic()))
    if (table.accepted or not table.listening) and holders_of(path):
        if (pid := await _stopped_qemu(table)) is not None:
            raise _stopped(path, pid)
        raise MonitorBusy(f"{path}: {HELD_HINT}")
    return open_monitor(path)


async def _stopped_qemu(table: SocketTable) -> int | None:
    """Return the pid of the process that listens, if it is stopped and the kernel tells this process."""
    qemu = await asyncio.to_thread(processes_with, {int(inode) for inode in table.listening})
    return qemu[0].pid if qemu and is_stopped(qemu[0].pid) else None


def _stopped(path: str, pid: int) -> Unreachable:
    stopped = Unreachable(f"{path}: QEMU (pid {pid}) is stopped; continue it: kill -CONT {pid}")
    stopped.stopped_pid = pid
    return stopped


async def wait_for_machine(session: Session, deadline_s: float) -> Machine:
    """Wait while QEMU is in ``-preconfig``, until ``deadline_s`` on the monotonic clock.

    Raises:
        Unreachable: it still is.
        ConnectionLost: the session ended meanwhile.
    """
    while not (machine := await look_at_machine(session)).is_there:
        if time.monotonic() >= deadline_s:
            raise Unreachable(f"{session.path}: {PRECONFIG}")
        await asyncio.sleep(POLL_S)
    return machine


def exit_status(process: Process) -> int | None:
    """Return the exit status of a process, negative for a signal; None while it runs."""
    return process.poll() if isinstance(process, subprocess.Popen) else process.returncode


async def _ends(process: Process) -> bool:
    """Tell whether a process whose sockets are closed has ended, or does so in a moment."""
    deadline_s = time.monotonic() + _ENDS_S
    while exit_status(process) is None:
        if time.monotonic() >= deadline_s:
            return False
        await asyncio.sleep(POLL_S / 10)
    return True


def _ended(path: str, process: Process | None) -> Unreachable:
    assert process is not None
    status = exit_status(process) or 0
    how = f"killed by signal {-status}" if status < 0 else f"it exited with status {status}"
    return Unreachable(f"{path}: the QEMU process (pid {process.pid}) has ended: {how}")
