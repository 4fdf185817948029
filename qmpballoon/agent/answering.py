"""The monitors that answer, and which of them may be of one QEMU."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from qmpballoon.qmp.client import Session


class Serving(Protocol):
    """What serves a life: a connector."""

    @property
    def path(self) -> str:
        """The path of its socket."""
        ...

    def kick(self) -> None:
        """Close the connection and connect again."""


@dataclass(frozen=True, slots=True, eq=False)
class Answering:
    """A monitor that answers, from its identification until its session ends."""

    connector: Serving
    session: Session
    reported: tuple[str | None, str | None]  # `Identity.reported`
    has_life: bool  # its process is known

    @property
    def rank(self) -> tuple[bool, str]:
        """Of two monitors of one QEMU the lower one serves the VM."""
        return not self.has_life, self.connector.path


@dataclass(slots=True)
class Alike:
    """The monitors that answer and report the same name and UUID. Those with a known process are apart."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held to find out whether two are of one QEMU
    monitors: dict[bool, dict[Answering, None]] = field(default_factory=dict)  # by ``has_life``

    def enter(self, monitor: Answering) -> None:
        """Add a monitor."""
        self.monitors.setdefault(monitor.has_life, {})[monitor] = None

    def leave(self, monitor: Answering) -> None:
        """Remove a monitor."""
        del self.monitors[monitor.has_life][monitor]
        if not self.monitors[monitor.has_life]:
            del self.monitors[monitor.has_life]

    def others(self, monitor: Answering) -> Iterator[Answering]:
        """Iterate over those that may be of the same QEMU: two known processes are two QEMUs."""
        for has_life in (False,) if monitor.has_life else (False, True):
            yield from (other for other in self.monitors.get(has_life, ()) if other is not monitor)
