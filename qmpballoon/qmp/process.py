"""The process behind a monitor's socket: QEMU itself, or something in between."""

from __future__ import annotations

from typing import Final

from qmpballoon.errors import QmpError
from qmpballoon.procfs import can_hold
from qmpballoon.qmp.balloon import memory_size
from qmpballoon.qmp.client import Session

_BEFORE_MACHINE: Final = ("'preconfig'", "machine initialization")
PRECONFIG: Final = "QEMU waits for x-exit-preconfig; nothing is known of the VM before that"


async def machine_is_there(session: Session) -> bool:
    """Tell whether QEMU has made its machine; with ``-preconfig`` it waits for x-exit-preconfig before that.

    Until then most commands are refused, with an error class of no name: QEMU 5.2 says that the command
    "isn't permitted in 'preconfig' state", 7.2 to 11.1 "only after machine initialization has completed".

    Raises:
        ConnectionLost: the session ended meanwhile.
    """
    try:
        await session.request("query-memory-size-summary")
    except QmpError as error:
        return not any(words in error.description for words in _BEFORE_MACHINE)
    return True


async def qemu_pid(session: Session) -> int | None:
    """Return the pid of the VM's QEMU; None where the process behind the socket cannot be it.

    The kernel tells the process that listens on the socket. That is a proxy behind socat, ``ssh -L`` or
    libvirt's virt-qemu-qmp-proxy. Its resident memory and its life tell nothing about the guest.

    Raises:
        ConnectionLost: the session ended meanwhile, or QEMU reports an impossible size.
    """
    if session.peer_pid is None:
        return None
    try:
        size = await memory_size(session)
    except QmpError:  # not known: no process can be ruled out, none is believed
        return None
    return session.peer_pid if can_hold(session.peer_pid, size) else None
