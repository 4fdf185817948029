"""Frozen records that several packages share. No I/O.

Sizes are bytes, durations seconds; ``*_at_s`` is a moment on the monotonic clock. None means
"not known", never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Final

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


def utc_now() -> datetime:
    """Return the wall clock, for time stamps only; do not compute with it."""
    return datetime.now(UTC)


def rfc3339(moment: datetime) -> str:
    """Return a stamp such as ``2026-11-23T08:31:05.123Z``."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Life:
    """One run of a QEMU: its pid and that process's start time in clock ticks since boot."""

    pid: int
    started: int

    def __str__(self) -> str:
        return f"{self.pid}-{self.started}"


@dataclass(frozen=True, slots=True)
class GuestStats:
    """What a guest's balloon driver claims, in bytes or counts since its boot; None: not reported.

    ``age_s`` is the monotonic time since the figures were seen to change, as of when they were handed out.
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
    # From QEMU 9.2 and Linux 6.12 on:
    oom_kills: int | None = None
    alloc_stalls: int | None = None  # allocations that had to wait for reclaim
    async_scans: int | None = None  # pages that kswapd looked at
    direct_scans: int | None = None  # pages that allocations looked at themselves
    async_reclaims: int | None = None
    direct_reclaims: int | None = None
    age_s: float = 0.0


STATISTICS: Final = tuple(entry.name for entry in fields(GuestStats) if entry.name != "age_s")
"""The names of a guest's figures."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A guest's figures of one moment, and what ``actual`` was at that moment.

    ``actual`` is None if the balloon moved too much around the sample, or ``actual`` was not read: the two
    values must not be combined then. ``held`` is what the guest cannot give without reclaim or kills, in
    bytes; right with and without deflate-on-oom.
    """

    stats: GuestStats
    seen_at_s: float
    actual: int | None = None
    held: int | None = field(init=False, repr=False, compare=False)  # computed once, because it is read often

    def __post_init__(self) -> None:
        """Compute what is held."""
        if self.actual is None or self.available is None:
            object.__setattr__(self, "held", None)
        else:
            object.__setattr__(self, "held", max(0, self.actual - self.available))

    @property
    def available(self) -> int | None:
        """What the guest could still get without reclaim, in bytes, as it claims.

        Guests that do not report it (Linux before 4.16, BSD) have at least what is free.
        """
        return self.stats.free if self.stats.available is None else self.stats.available

    def aged(self, now_s: float) -> GuestStats:
        """Return the figures with their age at ``now_s``."""
        return replace(self.stats, age_s=max(0.0, now_s - self.seen_at_s))


@dataclass(frozen=True, slots=True)
class VmState:
    """A VM as seen at one moment over its monitor.

    ``run_state`` is QMP's word; ``size`` what ``actual`` is with an empty balloon; ``actual`` what
    the guest has left; ``target`` the last target asked for over this connection.

    ``held`` is what the guest cannot give without reclaim or kills, in bytes: what ``actual`` was at the
    moment of the guest's figures, minus ``guest.available``. It is None without figures, and while the
    balloon moves too fast: the two values are then from different moments and must not be combined.
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
    """What is in force for a VM, in bytes: ``floor <= ceiling``; None until its size is known."""

    floor: int | None
    ceiling: int | None
    shares: int
    overridden: tuple[str, ...] = ()  # those of floor, ceiling, shares that were set over MQTT


@dataclass(frozen=True, slots=True)
class VmStatus:
    """All that the agent publishes of one VM, as one frozen snapshot by its only owner."""

    id: VmId
    name: str  # as QEMU or the configuration has it
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
    why: str | None = None
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
        """Tell whether the VM's monitor answers: what its availability topic says."""
        return self.health not in ("offline", "unresponsive", "busy")

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
    available: int | None  # of the budget: what is not charged
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
