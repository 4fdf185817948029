"""What is settled between a monitor's greeting and its service: whose monitor it is.

The machine has to be there, the process behind the socket has to be the QEMU, a migration to this QEMU has
to be over, and no other monitor may serve the same QEMU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from qmpballoon.agent.answering import Answering
from qmpballoon.agent.registry import Registry
from qmpballoon.agent.run import Identity
from qmpballoon.agent.vm_session import FirstLook, look_first
from qmpballoon.log import log_event
from qmpballoon.model.records import Life
from qmpballoon.qmp.asked import Asked, returned
from qmpballoon.qmp.balloon import query_run_state
from qmpballoon.qmp.client import Session, name_in
from qmpballoon.qmp.process import PRECONFIG, Machine, is_same_qemu, look_at_machine, qemu_pid

LOOK_AGAIN_S: Final = 1.0
LOOKS_AT_TWIN: Final = 10
_LONGEST_NAME: Final = 255  # longest name taken from QEMU: it is part of every message
_NOT_THE_VM: Final = {
    "inmigrate": "the destination of a migration of",
    "postmigrate": "the source of a finished migration of",
}
_MOST_COMPARED: Final = 8  # each takes some requests
_NO_UUID: Final = "00000000-0000-0000-0000-000000000000"

Report = Callable[[str | None], None]
"""Takes the reason why the monitor is not served yet; None: there is none any more."""

Answers = Sequence[object]
"""The answers to query-name and query-uuid."""


class SecondMonitor(Exception):
    """Another monitor of the same QEMU, at ``path``, serves the VM."""

    def __init__(self, path: str) -> None:
        super().__init__(f"its QEMU is served over {path}")
        self.path = path


async def until_machine_is_there(session: Session, report: Report) -> tuple[Machine, Answers, FirstLook]:
    """Wait while QEMU is in ``-preconfig``.

    Return its machine, who it reports to be, for `identify`, and what else was asked at once, to save time.
    """
    waits = False
    while True:
        first, who = await look_first(session, Asked("query-name"), Asked("query-uuid"))
        machine = await look_at_machine(session, first.memory)
        if machine.is_there:
            break
        report(PRECONFIG)
        if not waits:
            log_event("qemu-preconfig", PRECONFIG, socket=session.path)
        waits = True
        await asyncio.sleep(LOOK_AGAIN_S)
    report(None)
    return machine, who, first


def life_behind(session: Session, machine: Machine, life: Life | None) -> Life | None:
    """Return the life of the process behind the socket; None if that process is not the QEMU."""
    if life is None or qemu_pid(session, machine) == life.pid:
        return life
    log_event(
        "qemu-unknown",
        "the process behind the socket does not have the VM's memory (a proxy?): its RSS and its "
        "end say nothing about the VM",
        socket=session.path,
        pid=life.pid,
    )
    return None


def identify(who: Answers, *, stem: str, owner: int | None) -> Identity:
    """Return the name and UUID that QEMU reports; without ``-name`` its name is ``stem``.

    Raises:
        QmpError: QEMU refused to tell.
    """
    named, uuid = map(returned, who)
    given, number = name_in(named), uuid.get("UUID") if isinstance(uuid, dict) else None
    return Identity(
        name=(given or stem)[:_LONGEST_NAME],
        uuid=number[:64] if isinstance(number, str) and number != _NO_UUID else None,
        is_named=given is not None,
        owner=owner,
    )


async def until_arrived(session: Session, identity: Identity, registry: Registry, report: Report) -> None:
    """Wait while this QEMU is one end of a migration whose other end is the VM on this host."""
    looks_left = 0  # at a twin that runs as well, after this one was seen to arrive
    while (twin := registry.twin(session.path, identity)) is not None:
        state = await query_run_state(session)
        if registry.get(twin.id) is not twin:
            continue  # it was dropped meanwhile
        if state in _NOT_THE_VM:
            looks_left = LOOKS_AT_TWIN
            report(f"{_NOT_THE_VM[state]} {twin.id}")
        elif twin.has_left or (looks_left and twin.connection != "up"):
            log_event(
                "vm-migrated", "another process on this host is its QEMU now", vm=twin.id, socket=session.path
            )
            registry.take_over(twin, session.path)
            break
        elif not looks_left:
            break  # two VMs of one name, perhaps a clone of the other
        else:
            looks_left -= 1
        await asyncio.sleep(LOOK_AGAIN_S)
    report(None)


async def check_it_is_first(monitor: Answering, registry: Registry) -> None:
    """Find another monitor of this QEMU where no process tells, and settle which of the two serves the VM.

    The one whose process is known does, else the one whose path sorts first.

    Raises:
        SecondMonitor: the other one does.
    """
    alike = registry.enter(monitor)
    path, compared = monitor.connector.path, set[Answering]()
    while len(compared) < _MOST_COMPARED:
        other = next((other for other in alike.others(monitor) if other not in compared), None)
        if other is None:
            return
        compared.add(other)
        async with alike.lock:
            is_same = await is_same_qemu(monitor.session, other.session)
        if not is_same:
            continue
        there = other.connector.path
        if other.rank < monitor.rank:
            registry.are_one(serving=there, second=path)
            if (vm := registry.at(there)) is not None:
                await vm.rearm()
            raise SecondMonitor(there)
        log_event("socket-second", "another socket of the same QEMU comes first", socket=there)
        registry.are_one(serving=path, second=there)
        other.connector.kick()
