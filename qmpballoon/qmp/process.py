"""The process behind a monitor's socket: QEMU itself, or something in between."""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from qmpballoon.errors import ConnectionLost, NoBalloon, QmpError
from qmpballoon.procfs import can_hold
from qmpballoon.qmp.asked import returned
from qmpballoon.qmp.balloon import find_balloon, memory_size
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.statistics import polling_interval, set_polling_interval

_BEFORE_MACHINE: Final = ("'preconfig'", "machine initialization")
PRECONFIG: Final = "QEMU waits for x-exit-preconfig; nothing is known of the VM before that"

_MARKS: Final = range(100_000, 1_000_000)  # polling intervals, in seconds, that nobody uses
_TRIES: Final = 3  # the other monitor's session may set its own interval between writing and reading


@dataclass(frozen=True, slots=True)
class Machine:
    """What is known of a VM's machine; ``size`` is its memory in bytes, None if QEMU does not tell."""

    is_there: bool
    size: int | None = None


async def look_at_machine(session: Session, summary: object | QmpError = None) -> Machine:
    """Tell whether QEMU has made its machine; with ``-preconfig`` it waits for x-exit-preconfig before that.

    ``summary`` is the answer to query-memory-size-summary, where the caller has it.

    Until then most commands are refused, with an error class of no name: QEMU 5.2 says that the command
    "isn't permitted in 'preconfig' state", 7.2 to 11.1 "only after machine initialization has completed".

    Raises:
        ConnectionLost: the session ended meanwhile, or QEMU reports an impossible size.
    """
    try:
        return Machine(True, await memory_size(session, returned(summary)))
    except QmpError as error:
        return Machine(not any(words in error.description for words in _BEFORE_MACHINE))


def qemu_pid(session: Session, machine: Machine) -> int | None:
    """Return the pid of the VM's QEMU; None where the process behind the socket cannot be it.

    The kernel tells the process that listens on the socket. That is a proxy behind socat, ``ssh -L`` or
    libvirt's virt-qemu-qmp-proxy. Its resident memory and its life tell nothing about the guest.
    """
    if (
        session.peer_pid is None or machine.size is None
    ):  # where no process can be ruled out, none is believed
        return None
    return session.peer_pid if can_hold(session.peer_pid, machine.size) else None


async def is_same_qemu(session: Session, other: Session) -> bool:
    """Tell whether two monitors are of one QEMU: a value that is set over one is read over the other.

    Where no process is known, nothing else proves it: name, UUID and all ids may be equal in two containers.
    The value is the polling interval of the balloon's statistics; it is restored. ``other`` may have to set
    its own again, as it may change it in the same moment.

    Raises:
        ConnectionLost: ``session`` ended meanwhile.
    """
    try:
        device = await find_balloon(session)
        found_s = await polling_interval(session, device)
    except (NoBalloon, QmpError):
        return False
    try:
        for mark in random.sample(_MARKS, _TRIES):
            await set_polling_interval(session, device, mark)
            with suppress(ConnectionLost, QmpError):
                if await polling_interval(other, device) == mark:
                    return True
        return False
    finally:
        await set_polling_interval(session, device, found_s)
