"""What belongs to one run of a QEMU, and ends with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import Final

from qmpballoon.agent.boot import Boot
from qmpballoon.model.facts import Seen
from qmpballoon.model.records import Life
from qmpballoon.policy.in_force import Reason

_SERIALS: Final = count(1)


def new_serial() -> int:
    """Return a number that no target had before, in any life."""
    return next(_SERIALS)


@dataclass(frozen=True, slots=True)
class Identity:
    """The name and UUID that a QEMU reports, and whose process it is."""

    name: str  # QEMU's -name, or the socket's file stem
    uuid: str | None
    is_named: bool = True  # False: QEMU has no -name
    owner: int | None = None  # uid of the process that listens; None: not known

    @property
    def reported(self) -> tuple[str | None, str | None]:
        """The name and UUID that all monitors of one QEMU report; None: it has none."""
        return self.name if self.is_named else None, self.uuid


@dataclass(slots=True)
class Run:
    """What belongs to one run of a QEMU and ends with it."""

    life: Life | None
    boot: Boot
    identity: Identity | None = None
    qemu: str | None = None  # version
    size: int | None = None
    target: int | None = None  # last sent
    halted_at: int | None = None  # actual when the guest was stopped; it could not move since
    may_be_replugged: bool = False  # the agent was away, and has not seen its balloon since
    returns_to: int | None = None  # the target after a pulse that is under way, or was cut off
    is_pulsed: bool = False  # a pulse is under way, and sets that target itself
    reason: Reason | None = None  # in force; None: nothing was decided yet
    judged: str | None = None  # untrusted, uncooperative or stuck: the guard's word
    serial: int = field(default_factory=new_serial)  # changes with each target that is asked for
    seen: Seen | None = None  # by its last session
    is_ending: bool = False  # QEMU has announced its end; with -no-shutdown it stays, and stops the guest
    gone: bool = False  # it has ended, or is silent for long and no process tells
