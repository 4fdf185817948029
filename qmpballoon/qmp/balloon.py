"""The virtio balloon over a session: its QOM path, the size of the VM, the guest's driver.

Facts about QEMU were observed on the wire with 7.2.22 and a Linux 6.1 guest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from qmpballoon.errors import ConnectionLost, NoBalloon, QmpError
from qmpballoon.qmp.asked import Asked, returned
from qmpballoon.qmp.checked import fields_of, rows_of, size_of
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.commands import DRIVER_STATUS, may_be_sent
from qmpballoon.qmp.resizer import DriverState
from qmpballoon.units import MAX_SIZE, MIB, PAGE

_BALLOON_TYPE: Final = re.compile(
    r"child<(virtio-balloon-(?:pci|ccw|device)(?:-transitional|-non-transitional)?)>"
)
_CONTAINERS: Final = ("/machine/peripheral", "/machine/peripheral-anon")

DEVICES_WITH_ID: Final = Asked("qom-list", {"path": _CONTAINERS[0]})
RUN_STATE: Final = Asked("query-status")
MEMORY: Final = Asked("query-memory-size-summary")
MIGRATION: Final = Asked("query-migrate")
_ACTUAL: Final = Asked("query-balloon")

DEFLATE_ON_OOM: Final = "VIRTIO_BALLOON_F_DEFLATE_ON_OOM"  # features, by QEMU's names
STATS_QUEUE: Final = "VIRTIO_BALLOON_F_STATS_VQ"
FREE_PAGE_REPORTING: Final = "VIRTIO_BALLOON_F_REPORTING"

_LEAST_MEMORY: Final = MIB
_LONGEST_NAME: Final = 255  # of a device: requests with it are kept


@dataclass(frozen=True, slots=True)
class BalloonDevice:
    """A balloon device in QEMU's object tree."""

    path: str  # "/machine/peripheral/balloon0", or ".../peripheral-anon/device[1]" without an id
    kind: str  # "virtio-balloon-pci", "virtio-balloon-ccw", "virtio-balloon-device", ...

    @property
    def backend(self) -> str:
        """The virtio device itself; the pci and ccw kinds are a bus proxy around it."""
        return self.path if self.kind == "virtio-balloon-device" else f"{self.path}/virtio-backend"


@dataclass(frozen=True, slots=True)
class DriverStatus:
    """What QEMU knows of the guest's driver."""

    up: bool
    features: frozenset[str]  # negotiated

    @property
    def has_statistics(self) -> bool:
        """Tell whether the driver took the statistics queue."""
        return STATS_QUEUE in self.features

    @property
    def state(self) -> DriverState:
        """The same as a `Resizer` tells it."""
        return DriverState(self.up, DEFLATE_ON_OOM in self.features, self.has_statistics)


async def find_balloon(session: Session, listed: object = None) -> BalloonDevice:
    """Return the VM's balloon device; QEMU allows one.

    ``listed`` is the answer to `DEVICES_WITH_ID`, where the caller has it.

    Raises:
        NoBalloon: it has none.
        ConnectionLost: the session ended meanwhile.
    """
    for container in _CONTAINERS:
        if listed is None:
            listed = await session.request("qom-list", {"path": container})
        rows, listed = rows_of(session, listed), None
        for child in rows:
            found, name = _BALLOON_TYPE.fullmatch(str(child.get("type"))), str(child.get("name"))
            if found and len(name) <= _LONGEST_NAME:
                return BalloonDevice(f"{container}/{name}", found[1])
    raise NoBalloon(
        f"{session.path}: this VM has no balloon; start QEMU with "
        "-device virtio-balloon-pci,deflate-on-oom=on,free-page-reporting=on"
    )


async def memory_size(session: Session, summary: object = None) -> int:
    """Return what ``actual`` is with an empty balloon, in bytes: base memory plus DIMMs.

    QEMU counts an nvdimm as plugged memory, the balloon does not. virtio-mem does not count for the balloon.
    ``summary`` is the answer to query-memory-size-summary, where the caller has it.

    Raises:
        ConnectionLost: the session ended meanwhile, or the size is impossible for a VM.
    """
    if summary is None:
        summary = await session.request(*MEMORY)
    size, plugged = parse_memory_summary(session, summary)
    for device in rows_of(session, await session.request("query-memory-devices")) if plugged else ():
        if device.get("type") == "dimm":
            size += size_of(session, fields_of(session, device.get("data")).get("size"))
    if not _LEAST_MEMORY <= size <= MAX_SIZE:  # a percentage of it would not be a valid size
        raise ConnectionLost(f"{session.path}: {size} bytes are not a VM memory size")
    return size


def parse_memory_summary(session: Session, answer: object) -> tuple[int, bool]:
    """Return the base memory in bytes, and whether any may be plugged; the errors of `qmp.checked`."""
    summary = fields_of(session, answer)
    # DIMMs among others; a machine that takes none has no key.
    return size_of(session, summary.get("base-memory")), summary.get("plugged-memory") != 0


async def query_actual(session: Session) -> int:
    """Return ``actual`` in bytes: what the guest has left.

    Raises:
        QmpError: no balloon (class DeviceNotActive).
        ConnectionLost: the session ended meanwhile.
    """
    return parse_actual(session, await session.request(*_ACTUAL))


async def query_run_state(session: Session) -> str:
    """Return QMP's run state, such as ``running`` or ``paused``."""
    return parse_run_state(session, await session.request(*RUN_STATE))


def parse_run_state(session: Session, answer: object) -> str:
    """Return the run state of query-status; the errors of `qmp.checked`."""
    return str(fields_of(session, answer).get("status"))[:64]


def parse_migrating(session: Session, answer: object) -> bool:
    """Tell whether query-migrate reports a migration under way; the errors of `qmp.checked`."""
    return str(fields_of(session, answer).get("status")) in _MIGRATION_UNDER_WAY


_MIGRATION_UNDER_WAY: Final = frozenset(
    (
        "setup",
        "cancelling",
        "active",
        "postcopy-active",
        "postcopy-paused",
        "postcopy-recover",
        "pre-switchover",
        "device",
        "wait-unplug",
    )
)


async def query_driver(session: Session, device: BalloonDevice) -> DriverStatus | None:
    """Return the state of the guest's driver; None where this QEMU may not be asked (see ``commands``).

    In that case statistics and BALLOON_CHANGE show that a driver is up.
    """
    asked = driver_is_asked(session, device)
    return driver_status(await session.request_all(*asked)) if asked else None


def driver_is_asked(session: Session, device: BalloonDevice) -> tuple[Asked, ...]:
    """Return what this QEMU may be asked about the guest's driver: one command, or none."""
    is_tried = may_be_sent(DRIVER_STATUS, session.version)
    return (Asked(DRIVER_STATUS, {"path": device.backend}),) if is_tried else ()


def driver_status(answers: Sequence[object]) -> DriverStatus | None:
    """Return what the answers to `driver_is_asked` tell; None also for a build without the command."""
    return parse_driver(answers[0]) if answers and not isinstance(answers[0], QmpError) else None


def parse_driver(answer: object) -> DriverStatus:
    """Return the state of the guest's driver as x-query-virtio-status has it."""
    status, features = _part(answer, "status"), _part(answer, "guest-features")
    up = any(name.startswith("VIRTIO_CONFIG_S_DRIVER_OK") for name in _names(status, "statuses"))
    negotiated = frozenset(name.partition(":")[0] for name in _names(features, "dev-features"))
    return DriverStatus(up, negotiated if up else frozenset())


async def offers_deflate_on_oom(session: Session, device: BalloonDevice) -> bool:
    """Tell whether QEMU offers deflate-on-oom to the guest; every Linux since 3.19 takes it."""
    (answer,) = await session.request_all(asked_deflate_on_oom(device))
    return answer is True  # QEMU before 2.4 refuses it


def asked_deflate_on_oom(device: BalloonDevice) -> Asked:
    """Return what tells, by True, whether QEMU offers deflate-on-oom to the guest."""
    return property_of(device, "deflate-on-oom")


def property_of(device: BalloonDevice, name: str) -> Asked:
    """Return what reads a property of the device."""
    return Asked("qom-get", {"path": device.path, "property": name})


class VirtioBalloon:
    """The balloon as a `qmpballoon.qmp.resizer.Resizer`."""

    granularity: Final = PAGE

    def __init__(self, session: Session, device: BalloonDevice) -> None:
        self.device: Final = device
        self.asked: int | None = None  # QEMU does not tell what was asked before
        self._session = session

    async def actual(self) -> int:
        """Return what the guest has left, in bytes.

        Raises:
            QmpError: the balloon was unplugged.
            ConnectionLost: the session ended meanwhile.
        """
        return await query_actual(self._session)

    async def driver(self) -> DriverState | None:
        """Return the state of the guest's driver; None where this QEMU may not be asked."""
        status = await query_driver(self._session, self.device)
        return None if status is None else status.state

    async def look(self) -> tuple[int, DriverState | None]:
        """Return `actual` and `driver`, asked for together; the errors of `actual`."""
        return self.looked(await self._session.request_all(*self.asked_to_look()))

    def asked_to_look(self) -> tuple[Asked, ...]:
        """Return what `look` asks."""
        return (_ACTUAL, *driver_is_asked(self._session, self.device))

    def looked(self, answers: Sequence[object]) -> tuple[int, DriverState | None]:
        """Return what the answers to `asked_to_look` tell; the errors of `actual`."""
        status = driver_status(answers[1:])
        return (
            parse_actual(self._session, returned(answers[0])),
            None if status is None else status.state,
        )

    async def ask(self, target: int) -> None:
        """Set the target in bytes; QEMU takes it also where no driver is there to follow.

        Raises:
            QmpError: QEMU refused it.
            ConnectionLost: the session ended meanwhile; QEMU may have taken it or not.
        """
        await self._session.request("balloon", {"value": target})
        self.asked = target


def parse_actual(session: Session, answer: object) -> int:
    """Return ``actual`` of query-balloon in bytes; the errors of `qmp.checked`."""
    return size_of(session, fields_of(session, answer).get("actual"))


def _part(answer: object, key: str) -> object:
    return answer.get(key) if isinstance(answer, dict) else None


def _names(part: object, key: str) -> list[str]:
    names = _part(part, key)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
