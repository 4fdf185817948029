"""The process behind a monitor's socket: QEMU itself, or something in between."""

from __future__ import annotations

from qmpballoon.errors import QmpError
from qmpballoon.procfs import can_hold
from qmpballoon.qmp.balloon import memory_size
from qmpballoon.qmp.client import Session


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
