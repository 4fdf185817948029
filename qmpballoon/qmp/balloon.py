"""The virtio balloon over a session: its QOM path, the size of the VM, the guest's statistics.

Facts about QEMU were observed on the wire with 7.2.22 and a Linux 6.1 guest.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, Final

from qmpballoon.errors import ConnectionLost, NoBalloon, QmpError
from qmpballoon.model.records import GuestStats, Sample
from qmpballoon.qmp.asked import Asked, returned
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.commands import DRIVER_STATUS, QUEUE_STATUS, may_be_sent
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

INTERVAL: Final = "guest-stats-polling-interval"
_LEAST_MEMORY: Final = MIB
_STATISTICS_QUEUE: Final = 2  # after those to inflate and to deflate: virtio 1.2, 5.5.2

_FIRST_LOOK_AFTER_S: Final = 0.003  # fresh figures come after 3 ms, 9 at worst
_FIRST_WITHIN_S: Final = 1.0  # on a slow host
_ASK_AGAIN_AFTER_S: Final = (0.02, 0.02, 0.02, 0.3)  # first: the guest had not handed its buffer back

MINOR_FAULTS: Final = "stat-minor-faults"  # it mostly changes also in a guest at rest
_STATISTICS: Final = {
    "total": "stat-total-memory",
    "free": "stat-free-memory",
    "available": "stat-available-memory",
    "caches": "stat-disk-caches",
    "swap_in": "stat-swap-in",
    "swap_out": "stat-swap-out",
    "major_faults": "stat-major-faults",
    "minor_faults": MINOR_FAULTS,
    "hugetlb_allocs": "stat-htlb-pgalloc",
    "hugetlb_failures": "stat-htlb-pgfail",
    "oom_kills": "stat-oom-kills",
    "alloc_stalls": "stat-alloc-stalls",
    "async_scans": "stat-async-scans",
    "direct_scans": "stat-direct-scans",
    "async_reclaims": "stat-async-reclaims",
    "direct_reclaims": "stat-direct-reclaims",
}


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
        rows, listed = _rows(session, listed), None
        for child in rows:
            found = _BALLOON_TYPE.fullmatch(str(child.get("type")))
            if found:
                return BalloonDevice(f"{container}/{child.get('name')}", found[1])
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
    for device in _rows(session, await session.request("query-memory-devices")) if plugged else ():
        if device.get("type") == "dimm":
            size += _bytes(session, _fields(session, device.get("data")).get("size"))
    if not _LEAST_MEMORY <= size <= MAX_SIZE:  # a percentage of it would not be a valid size
        raise ConnectionLost(f"{session.path}: {size} bytes are not a VM memory size")
    return size


def parse_memory_summary(session: Session, answer: object) -> tuple[int, bool]:
    """Return the base memory in bytes, and whether any may be plugged; the errors of `parse_statistics`."""
    summary = _fields(session, answer)
    # DIMMs among others; a machine that takes none has no key.
    return _bytes(session, summary.get("base-memory")), summary.get("plugged-memory") != 0


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
    """Return the run state of query-status; the errors of `parse_statistics`."""
    return str(_fields(session, answer).get("status"))[:64]


def parse_migrating(session: Session, answer: object) -> bool:
    """Tell whether query-migrate reports a migration under way; the errors of `parse_statistics`."""
    return str(_fields(session, answer).get("status")) in _MIGRATION_UNDER_WAY


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
    (answer,) = await session.request_all(deflate_on_oom(device))
    return answer is True  # QEMU before 2.4 refuses it


def deflate_on_oom(device: BalloonDevice) -> Asked:
    """Return what tells, by True, whether QEMU offers deflate-on-oom to the guest."""
    return _property(device, "deflate-on-oom")


async def polling_interval(session: Session, device: BalloonDevice) -> int:
    """Return how often QEMU asks the guest for statistics, in whole seconds; 0: never.

    Raises:
        QmpError: the device has no statistics (QEMU before 1.5).
        ConnectionLost: the session ended meanwhile.
    """
    return _bytes(session, await session.request(*_property(device, INTERVAL)))


async def set_polling_interval(session: Session, device: BalloonDevice, *intervals_s: int) -> None:
    """Set how often QEMU asks the guest for statistics, in whole seconds; errors as in `polling_interval`.

    Several intervals are set one after the other.
    """
    asked = (
        Asked("qom-set", {"path": device.path, "property": INTERVAL, "value": interval_s})
        for interval_s in intervals_s
    )
    for answer in await session.request_all(*asked):
        returned(answer)


def _property(device: BalloonDevice, name: str) -> Asked:
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


class Sampler:
    """Reads a guest's statistics and detects whether they are new.

    ``sample`` (without ``actual``) is the last one that changed on this connection. It is None until then,
    because the statistics found on connecting may be days old. A sample is new when its figures or QEMU's
    time stamp (whole seconds) changed.
    """

    def __init__(
        self, session: Session, device: BalloonDevice, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.sample: Sample | None = None
        self.found_s: int | None = None  # the interval found on connecting; None until it was read
        self._interval_s = 1  # wanted: whole seconds
        self._asked_at_s = float("-inf")  # when QEMU was last told to ask the guest
        self._armed_s: int | None = None  # set in QEMU, 0 is off; None while a change is under way
        self._session = session
        self._device = device
        self._statistics = _property(device, "guest-stats")
        is_tried = may_be_sent(QUEUE_STATUS, session.version)
        where = {"path": device.backend, "queue": _STATISTICS_QUEUE}
        self._queue = (Asked(QUEUE_STATUS, where),) if is_tried else ()
        self._clock = clock
        self._last: tuple[int, GuestStats] | None = None
        self.generation = 0  # how often samples were discarded; reads from before that are not compared
        self._known_since = 0  # the ``generation`` at which ``_last`` was read

    @property
    def ever_reported(self) -> bool:
        """Tell whether the guest has reported since QEMU started and was not reset after that."""
        return self._last is not None and self._last[0] != 0 and not self.generation

    @property
    def is_first_awaited(self) -> bool:
        """Tell whether the guest was just asked for the first sample, which mostly comes within 3 ms."""
        return self.sample is None and self._clock() - self._asked_at_s < _FIRST_WITHIN_S

    async def start(self, interval_s: int) -> None:
        """Read the present statistics, then ask for a sample now and every ``interval_s``.

        Raises:
            QmpError: the device has no statistics (QEMU before 1.5).
            ConnectionLost: the session ended meanwhile.
        """
        await self.started(await self._session.request_all(*self.asked_to_start()), interval_s)

    def asked_to_start(self) -> tuple[Asked, Asked]:
        """Return what `start` asks first."""
        return self._statistics, _property(self._device, INTERVAL)

    async def started(self, answers: Sequence[object], interval_s: int) -> None:
        """Do what `start` does after the answers to `asked_to_start` came; the same errors."""
        statistics, interval = map(returned, answers)
        self._last = parse_statistics(self._session, statistics)
        self.found_s = _bytes(self._session, interval)
        self._armed_s, self._interval_s = self.found_s, interval_s
        await self.rearm()

    async def change_interval(self, interval_s: int) -> None:
        """Set the polling interval in whole seconds; nothing is sent if it is set already."""
        if interval_s != self._interval_s:
            self._interval_s = interval_s
            await self.rearm()

    async def stop(self) -> None:
        """Restore the polling interval that was found on connecting."""
        if self.found_s is not None and self.found_s != self._armed_s:
            await self._set_interval(self.found_s)

    def forget(self) -> None:
        """Drop the sample: the guest was reset, and QEMU returns its old figures until the driver is back.

        Figures that arrived before the reset and were not read yet count as old, too.
        """
        self.sample = None
        self.generation += 1

    async def poll(self) -> None:
        """Read the statistics once; new ones are then in ``sample``."""
        asked_at = self.generation
        self.take(*await self._read(), asked_at=asked_at)

    def take(self, last_update: int, stats: GuestStats, *, asked_at: int, is_known_new: bool = False) -> None:
        """Take statistics that were asked for when ``generation`` was ``asked_at``.

        ``is_known_new``: the guest has sent them since, whether or not they differ from the last.
        """
        if asked_at != self.generation:
            return  # requested before the guest was reset
        found = last_update, stats
        if found != self._last or is_known_new:
            self._last = found
            if asked_at == self._known_since:
                if self.sample is not None and self.sample.stats.has_sizes_of(stats):
                    self.sample.seen_again(stats, self._clock())
                else:
                    self.sample = Sample(stats, self._clock(), None)
        self._known_since = asked_at

    async def refresh(self, *, timeout_s: float) -> bool:
        """Ask the guest for figures at once and wait for them; return whether they arrived.

        Setting the interval to 0 and back makes QEMU ask now; the answer mostly takes 3 ms. If the figures of
        an idle guest do not change, the second time it is looked whether the guest has handed over a sample
        since. Where QEMU may not be asked that, they are known to be new at the next whole second only.
        """
        counted: int | None = None
        before_s = self.sample.seen_at_s if self.sample else None
        deadline_s = self._clock() + timeout_s
        for attempt, ask_again_after_s in enumerate(
            chain(_ASK_AGAIN_AFTER_S, repeat(_ASK_AGAIN_AFTER_S[-1]))
        ):
            if attempt == 1 and self._queue:
                counted = _handed_over((await self._session.request_all(*self._queue))[0])
            await self.rearm()
            again_s = min(self._clock() + ask_again_after_s, deadline_s)
            while True:
                await asyncio.sleep(max(_FIRST_LOOK_AFTER_S, ask_again_after_s / 5))
                await (self.poll() if counted is None else self._poll_with_queue(counted))
                if self.sample is not None and self.sample.seen_at_s != before_s:  # perhaps by another poll
                    return True
                if self._clock() >= again_s:
                    break
            if self._clock() >= deadline_s:
                break
        return False

    async def _poll_with_queue(self, counted: int) -> None:
        """Read the statistics once; they are new, too, if QEMU has taken more samples than ``counted``."""
        asked_at = self.generation
        queue, statistics = await self._session.request_all(*self._queue, self._statistics)
        self.take(
            *parse_statistics(self._session, returned(statistics)),
            asked_at=asked_at,
            is_known_new=_handed_over(queue) not in (counted, None),
        )

    async def rearm(self) -> None:
        """Set the interval, by way of 0: QEMU asks the guest now."""
        await self._set_interval(*(() if self._armed_s == 0 else (0,)), self._interval_s)

    async def _set_interval(self, *intervals_s: int) -> None:
        self._armed_s = None  # after a cancellation the interval in QEMU is unknown
        self._asked_at_s = self._clock()
        await set_polling_interval(self._session, self._device, *intervals_s)
        self._armed_s = intervals_s[-1]

    def is_armed_with(self, interval_s: int) -> bool:
        """Tell whether this interval is set in QEMU, as far as is known here."""
        return self._armed_s == self._interval_s == interval_s

    async def _read(self) -> tuple[int, GuestStats]:
        return parse_statistics(self._session, await self._session.request(*self._statistics))


def _handed_over(answer: object) -> int | None:
    """Return how many samples QEMU has taken from the guest's queue, modulo 2**16; None if not told."""
    count = answer.get("last-avail-idx") if isinstance(answer, dict) else None
    return count if isinstance(count, int) else None


def parse_statistics(session: Session, answer: object) -> tuple[int, GuestStats]:
    """Return ``last-update`` and the figures of the property ``guest-stats``.

    Raises:
        ConnectionLost: it is not of the documented form.
    """
    fields = _fields(session, answer)
    return (
        _bytes(session, fields.get("last-update")),
        parse_stats(_fields(session, fields.get("stats"))),
    )


def parse_actual(session: Session, answer: object) -> int:
    """Return ``actual`` of query-balloon in bytes; the errors of `parse_statistics`."""
    return _bytes(session, _fields(session, answer).get("actual"))


def parse_stats(stats: Mapping[str, object]) -> GuestStats:
    """Return a guest's figures; one that is not reported or impossible is None.

    QEMU prints an unreported statistic as 2**64 - 1.
    """
    figures: dict[str, Any] = {
        name: value if type(value := stats.get(key)) is int and 0 <= value <= MAX_SIZE else None
        for name, key in _STATISTICS.items()
    }
    return GuestStats(**figures)


def _fields(session: Session, answer: object) -> Mapping[str, object]:
    if not isinstance(answer, dict):
        raise ConnectionLost(f"{session.path}: QEMU returned {str(answer)[:80]!r} where an object belongs")
    return answer


def _rows(session: Session, answer: object) -> list[Mapping[str, object]]:
    if not isinstance(answer, list):
        raise ConnectionLost(f"{session.path}: QEMU returned {str(answer)[:80]!r} where a list belongs")
    return [_fields(session, row) for row in answer]


def _bytes(session: Session, value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SIZE:
        raise ConnectionLost(f"{session.path}: QEMU returned {str(value)[:80]!r} where a number belongs")
    return value


def _part(answer: object, key: str) -> object:
    return answer.get(key) if isinstance(answer, dict) else None


def _names(part: object, key: str) -> list[str]:
    names = _part(part, key)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
