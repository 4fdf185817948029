"""Frozen records that several packages share. No I/O.

Sizes are bytes, durations seconds; ``*_at_s`` is a time on the monotonic clock. None means
"not known", never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, Final

from qmpballoon.model.names import VmId
from qmpballoon.model.tolerance import is_reached

MODES: Final = ("auto", "manual", "observe")
POLICIES: Final = ("fairshare", "proportional", "proxmox", "mom", "fixed")
LEVELS: Final = ("ok", "soft", "hard", "low")
HEALTH_WORDS: Final = (
    "offline",
    "unresponsive",
    "busy",
    "no-balloon",
    "migrating",
    "paused",
    "starting",
    "no-driver",
    "no-stats",
    "stale",
    "untrusted",
    "uncooperative",
    "stuck",
    "ok",
)
"""In the order of precedence: a VM's health is the first that is true."""
SILENT: Final = ("offline", "unresponsive", "busy")
"""The health of a VM whose monitor does not answer."""


def utc_now() -> datetime:
    """Return the wall clock, for time stamps only; do not compute with it."""
    return datetime.now(UTC)


def rfc3339(time: datetime) -> str:
    """Return a stamp such as ``2026-11-23T08:31:05.123Z``."""
    return time.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Life:
    """One run of a QEMU: its pid and that process's start time in clock ticks since boot."""

    pid: int
    started: int

    def __str__(self) -> str:
        return f"{self.pid}-{self.started}"


@dataclass(frozen=True, slots=True)
class GuestStats:
    """The statistics that a guest's balloon driver reports: bytes, or counts since boot; None: not reported.

    ``age_s`` is the monotonic time since the statistics were seen to change, when this record was made.
    """

    total: int | None = None
    free: int | None = None
    available: int | None = None
    caches: int | None = None
    swap_in: int | None = None
    swap_out: int | None = None
    major_faults: int | None = None
    minor_faults: int | None = None
    hugetlb_allocs: int | None = None
    hugetlb_failures: int | None = None
    # Since QEMU 9.2 and Linux 6.12:
    oom_kills: int | None = None
    alloc_stalls: int | None = None  # allocations that had to wait for reclaim
    async_scans: int | None = None  # pages that kswapd scanned
    direct_scans: int | None = None  # pages that allocations scanned themselves
    async_reclaims: int | None = None
    direct_reclaims: int | None = None
    age_s: float = 0.0

    def has_sizes_of(self, other: GuestStats) -> bool:
        """Tell whether what decisions depend on is the same; counters of faults, for one, may differ."""
        return (
            self.available == other.available
            and self.free == other.free
            and self.caches == other.caches
            and self.total == other.total
            and self.oom_kills == other.oom_kills
        )

    def with_minor_faults(self, count: int) -> GuestStats:
        """Return the same statistics but for this count, quicker than `dataclasses.replace`."""
        values = list(_values_of(self))
        values[_MINOR_FAULTS] = count
        return GuestStats(*values)


_ALL: Final = tuple(entry.name for entry in fields(GuestStats))
_MINOR_FAULTS: Final = _ALL.index("minor_faults")
_values_of: Final[Callable[[GuestStats], tuple[Any, ...]]] = attrgetter(*_ALL)
STATISTICS: Final = tuple(name for name in _ALL if name != "age_s")
"""The names of a guest's statistics."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A guest's statistics at one time, and ``actual`` at that time.

    ``actual`` is None if it was not read, or if the balloon moved too much around the sample to combine the
    two. ``held`` is what the guest cannot give without reclaim or kills, in bytes, with and without
    deflate-on-oom. If the guest reports the same sizes again, the sample is the same, seen again.
    """

    stats: GuestStats
    seen_at_s: float
    actual: int | None = None
    held: int | None = field(init=False, repr=False, compare=False)  # computed once, because it is read often

    def __post_init__(self) -> None:
        """Compute ``held``."""
        if self.actual is None or self.available is None:
            object.__setattr__(self, "held", None)
        else:
            object.__setattr__(self, "held", max(0, self.actual - self.available))

    @property
    def available(self) -> int | None:
        """Bytes that the guest can allocate without reclaim, as it reports.

        For guests that do not report it (Linux before 4.16, BSD): the free bytes, a lower bound.
        """
        return self.stats.free if self.stats.available is None else self.stats.available

    def seen_again(self, stats: GuestStats, now_s: float) -> None:
        """Note that the guest has reported the same sizes again; only the owner of the sample calls this.

        Everything that refers to the sample is current then, and nothing has to be made anew.
        """
        object.__setattr__(self, "stats", stats)
        object.__setattr__(self, "seen_at_s", now_s)

    def aged(self, now_s: float) -> GuestStats:
        """Return the statistics with their age at ``now_s``."""
        return replace(self.stats, age_s=max(0.0, now_s - self.seen_at_s))


@dataclass(frozen=True, slots=True)
class VmState:
    """The state of a VM at one time, read over its monitor.

    ``run_state`` is QMP's word; ``size`` is ``actual`` with an empty balloon; ``actual`` is the memory that
    the guest has; ``target`` the last target set over this connection.

    ``held`` is what the guest cannot give without reclaim or kills, in bytes: ``actual`` at the time of the
    guest's statistics, minus ``guest.available``. It is None without statistics, and while the balloon
    moves too fast: the two values are then from different times and must not be combined.
    """

    run_state: str
    size: int
    actual: int
    target: int | None
    guest: GuestStats | None
    held: int | None = None

    @property
    def balloon(self) -> int:
        """Bytes that the balloon holds."""
        return self.size - self.actual


@dataclass(frozen=True, slots=True)
class Event:
    """An event: its word, its wall-clock time and its details."""

    event: str
    ts: datetime
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits in force for a VM, in bytes: ``floor <= ceiling``; None until its size is known."""

    floor: int | None
    ceiling: int | None
    shares: int
    overridden: tuple[str, ...] = ()  # which of floor, ceiling, shares were set over MQTT


@dataclass(frozen=True, slots=True)
class VmStatus:
    """All that the agent publishes of one VM: a frozen snapshot, made by its only owner."""

    id: VmId
    name: str  # from QEMU or the configuration
    socket: str  # path
    health: str
    life: Life | None = None
    uuid: str | None = None
    qemu: str | None = None
    run_state: str | None = None
    size: int | None = None
    actual: int | None = None
    target: int | None = None
    limits: Limits = Limits(None, None, 1000)
    mode: str = "auto"
    policy: str = "fairshare"
    why: str | None = None  # the stable word that is in force; None: nothing was decided yet
    why_since: datetime | None = None  # wall-clock time
    sample: Sample | None = None
    rss: int | None = None
    pid: int | None = None
    driver_up: bool = False  # while False, ``actual`` is unreliable and the VM may hold its whole size

    def is_at(self, target: int) -> bool:
        """Tell whether ``target`` is reached; False without a driver, when ``actual`` is unreliable."""
        if self.actual is None or self.size is None or not self.driver_up:
            return False
        return is_reached(self.actual, target, self.size)

    @property
    def answers(self) -> bool:
        """Tell whether the VM's monitor answers; published on its availability topic."""
        return self.health not in SILENT

    @property
    def balloon(self) -> int | None:
        """Bytes that the balloon holds."""
        return None if self.size is None or self.actual is None else self.size - self.actual


@dataclass(frozen=True, slots=True)
class HostStatus:
    """All that the agent publishes of the host; percentages for PSI, bytes for memory."""

    level: str
    policy: str
    mode: str
    budget: int | None
    reserve: int | None
    used: int
    available: int | None  # of the budget: what no VM is charged for
    mem_total: int | None
    mem_available: int | None
    psi_some_avg10: float | None
    psi_full_avg10: float | None
    vms_total: int
    vms_online: int
    unidentified: tuple[tuple[str, str], ...]  # path and reason of sockets for which no VM is known
    reclaimable: int
    room: int
    holds: tuple[Mapping[str, object], ...] = ()
    alarms: tuple[str, ...] = ()  # the reasons of those that have begun and not ended, as in their events
    sampling_late_s: float = 0.0  # how late VMs were polled at most; 0: in time
