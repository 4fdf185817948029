"""The trouble with one monitor: why no VM is served there, for the VM, the log and the host object."""

from __future__ import annotations

import logging
from typing import Final

from qmpballoon.agent.context import Context
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.vm import ManagedVm
from qmpballoon.errors import Unreachable
from qmpballoon.log import log_event
from qmpballoon.model.facts import Connection
from qmpballoon.model.records import Event, Life, utc_now
from qmpballoon.procfs import is_stopped
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.monitor import HELD_HINT, OpenMonitor
from qmpballoon.qmp.purpose import purpose_of

_OTHER: Final = "a console, a guest agent or another protocol"


class Trouble:
    """The trouble with the monitor at one path. Each problem is logged once, until another one follows."""

    def __init__(self, path: str, context: Context, registry: Registry) -> None:
        self.problem: str | None = None  # why no VM is known, or served, behind the socket
        self._path = path
        self._context = context
        self._registry = registry

    def is_silent(self, how: Connection, pid: int | None = None) -> None:
        """Tell the VM, if there is one, why no session serves it. ``pid``: the process behind the socket."""
        vm = self._registry.at(self._path)
        if vm is not None and (vm.connection != how or pid is not None):
            vm.mark_unreachable(how, pid)

    def note(self, problem: str | None) -> None:
        """Note a problem that somebody else logs, or that there is none any more."""
        self.problem = problem

    def is_refused(self, error: Unreachable) -> None:
        """Note a socket that cannot be connected to; who may not is told."""
        self.is_silent("offline")
        if isinstance(error.__cause__, PermissionError):
            self._say("socket-refused", str(error))
        self.problem = str(error)

    def no_greeting(self, why: Connection, pid: int | None) -> None:
        """Say once what an operator can do about a monitor that does not greet, and list it as the reason."""
        if why == "busy":
            self._say("monitor-busy", HELD_HINT, vm=self._vm_id())
        elif self.problem is None and pid is not None and is_stopped(pid):
            problem = f"QEMU (pid {pid}) is stopped; continue it: kill -CONT {pid}"
            self._say("qemu-stopped", problem, vm=self._vm_id())

    def is_no_monitor(self, problem: str) -> None:
        """Say once that what is behind the socket does not speak QMP."""
        self._say("socket-not-qmp", problem)

    def sent_too_much(self, session: Session, monitor: OpenMonitor) -> None:
        """Report a QEMU whose session ended because of what it sent."""
        reason = str(session.reason)
        found = {"vm": self._vm_id(), "socket": self._path, "pid": monitor.pid, "owner": monitor.owner}
        log_event("session-excess", reason, level=logging.WARNING, **found)
        self._context.feed.host_event(Event("session-excess", utc_now(), {**found, "reason": reason}))
        self.problem = reason
        self.is_silent("unresponsive", monitor.pid)

    def hung(self, vm: ManagedVm | None, life: Life | None, pid: int | None) -> None:
        """Note a session that was given up because QEMU did not answer; say what that may be at QEMU's end.

        QEMU 7.2.22 hangs for ever if a request arrives at the moment of its end; 5.2, 10.0 and 11.1 do not.
        """
        if vm is not None and vm.run.is_ending:
            log_event(
                "qemu-end-hangs",
                "QEMU has announced its end and does not answer: it still writes, or hangs there, as 7.2 "
                f"may; end it by SIGTERM{f': kill {life.pid}' if life else ''}",
                level=logging.WARNING,
                vm=vm.id,
                socket=self._path,
            )
        self.is_silent("unresponsive", pid)

    def lost(self, reason: str) -> None:
        """Log why a session is over."""
        log_event("session-lost", reason, level=logging.WARNING, vm=self._vm_id(), socket=self._path)

    def what_it_is(self, seen: str, pid: int | None) -> str:
        """Return a sentence on a socket that sends no greeting: what was seen, what it is, and what to do."""
        purpose = None if pid is None else purpose_of(pid, self._path)
        return f"{self._path}: {seen}: it is {purpose or _OTHER}; keep it out of the globs of monitors"

    def _say(self, word: str, problem: str, **details: object) -> None:
        if self.problem != problem:
            self.problem = problem
            log_event(word, problem, level=logging.WARNING, **details, socket=self._path)

    def _vm_id(self) -> str | None:
        vm = self._registry.at(self._path)
        return vm.id if vm else None
