"""The host's memory, the budget of its VMs, and how short memory is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from qmpballoon import descriptors
from qmpballoon.agent.feed import Feed
from qmpballoon.agent.usable import MOST_RESERVE
from qmpballoon.cgroups import (
    MOUNTED_AT,
    CgroupMemory,
    is_within,
    read_cgroup,
    read_membership,
    read_own_cgroup,
)
from qmpballoon.config import CgroupBudget, HostSettings
from qmpballoon.log import log_event
from qmpballoon.model.records import Event, HostStatus, VmStatus, utc_now
from qmpballoon.policy.host_level import level_of, needs, reclaimable
from qmpballoon.policy.snapshot import Snapshot
from qmpballoon.procfs import HostSample, read_host, rss_of
from qmpballoon.units import MIB, Amount, format_size

Charges = Callable[[], Mapping[int | None, int]]
"""What each guest is charged, by the pid of its QEMU; None: what those of unknown processes hold in all."""

_FLOORS: Final = "the floors of the VMs together exceed the budget"
_NEEDS: Final = "what the guests hold exceeds the budget"
_HYSTERESIS: Final = 1.05  # hysteresis: the alarm ends when the guests hold this much less
_QEMU_ITSELF: Final = 32 * MIB  # resident beside the guest's memory; more shows when the guest fills its own
_LATE_S: Final = 1.0
_IN_TIME_S: Final = 0.25


@dataclass(frozen=True, slots=True)
class _Confinement:
    """The cgroup that limits the VMs, and what guests may hold in it; kept while it cannot be read."""

    memory: CgroupMemory
    for_guests: int
    configured: bool  # False: it is the agent's own


class HostMonitor:
    """Reads the host's figures, and tells when its level changes or its VMs need more than there is.

    ``proc`` and ``cgroups`` are where procfs and the control groups are mounted.
    """

    def __init__(self, feed: Feed, *, proc: str = "/proc", cgroups: str = MOUNTED_AT) -> None:
        self.sample = read_host(proc)  # a cgroup that limits the VMs lowers its figures
        self.budget: int | None = None  # None: not known
        self.reserve = 0
        self.for_guests: int | None = None  # what guests could hold if there were neither budget nor reserve
        self._feed = feed
        self._proc, self._cgroups = proc, cgroups
        self._total = self.sample.mem_total
        self._confined: _Confinement | None = None
        self._source: CgroupBudget | None = None
        self._remark: tuple[str, str] | None = None  # what was last logged about the cgroup
        self._in_force: tuple[str, str] | None = None  # policy and mode
        self._level = "ok"
        self._alarm: str | None = None
        self._exhausted = False
        self._lateness = _Lateness()

    def look(self, settings: HostSettings, charges: Charges = dict) -> None:
        """Read the host's figures now; what cannot be read keeps its last value."""
        self._look_at_descriptors()
        sample = read_host(self._proc)
        if sample.mem_total is None:  # otherwise a budget in percent would be zero
            sample = replace(sample, mem_total=self._total)
        self._total = total = sample.mem_total
        source = settings.budget if isinstance(settings.budget, CgroupBudget) else None
        if source != self._source:
            self._source, self._confined, self._remark = source, None, None
        self._look_at_cgroup(source, charges)
        share = HostSettings().budget if source is not None else settings.budget
        assert isinstance(share, Amount)
        if self._confined is None:
            self.sample, self.for_guests = sample, total
            self.budget, self.reserve = _size(share, total), _size(settings.reserve, total) or 0
            return
        memory, self.for_guests = self._confined.memory, self._confined.for_guests
        reserve = _size(settings.reserve, total) or 0
        self.reserve = min(reserve, memory.limit // MOST_RESERVE)
        self.sample = sample = _limited(sample, memory, reserve - self.reserve)
        self.budget = max(0, self.for_guests - self.reserve)
        if not self._confined.configured:
            self.budget = min(self.budget, _size(share, sample.mem_total) or 0)

    def _look_at_descriptors(self) -> None:
        """Log when no file descriptor is left for another VM or broker, and when there are some again."""
        exhausted = not descriptors.are_left()
        if exhausted and not self._exhausted:
            log_event(
                "descriptors-exhausted",
                "no monitor or broker can be connected to and no state saved: raise the limit (LimitNOFILE= "
                "in a systemd unit)",
                level=logging.ERROR,
                most=descriptors.limit(),
            )
        elif self._exhausted and not exhausted:
            log_event("descriptors-left", "there are some again")
        self._exhausted = exhausted

    def _look_at_cgroup(self, source: CgroupBudget | None, charges: Charges) -> None:
        """Read the configured cgroup, or that of this process; if it cannot be read, the last values stay."""
        try:
            configured = read_cgroup(source.path, self._cgroups, self._proc) if source is not None else None
            memory = configured or self._own_cgroup(charges)
        except ValueError as error:
            self._remark_once("budget-unknown", f"the last value stays: {error}", level=logging.ERROR)
            return
        if source is not None and configured is None:
            why = f"no limit applies to {source.group}: the VMs get the default share of the host"
            self._remark_once("budget-unlimited", why, level=logging.WARNING)
        elif memory is None:
            self._remark = None
        else:
            where = min(memory.levels, key=lambda level: level.limit).path
            why = f"the VMs share the memory of cgroup {where}"
            self._remark_once("budget-limited", why, level=logging.INFO)
        if memory is None:
            self._confined = None
            return
        resident = sum(_guest_memory(pid, charge) for pid, charge in charges().items())
        self._confined = _Confinement(memory, memory.for_guests(resident), configured is not None)

    def _own_cgroup(self, charges: Charges) -> CgroupMemory | None:
        """Return the limits of this process that hold for all VMs too: a unit may limit the agent alone."""
        memory = read_own_cgroup(self._proc, self._cgroups)
        pids = [pid for pid in charges() if pid is not None] if memory is not None else []
        groups = [read_membership(str(pid), self._proc) for pid in pids]
        if memory is None or not groups:
            return None
        levels = [level for level in memory.levels if all(is_within(group, level.path) for group in groups)]
        return replace(memory, levels=tuple(levels)) if levels else None

    def _remark_once(self, word: str, remark: str, *, level: int) -> None:
        if self._remark != (word, remark):
            self._remark = (word, remark)
            log_event(word, remark, level=level)

    def note_in_force(self, policy: str, mode: str) -> None:
        """Take the host's policy and mode, and publish an event of each that is another than before."""
        before, self._in_force = self._in_force or (policy, mode), (policy, mode)
        for word, was, now in zip(("policy", "mode"), before, self._in_force, strict=True):
            if was != now:
                self._feed.host_event(Event(word, utc_now(), {"from": was, "to": now}))

    def note_lateness(self, late_s: float) -> None:
        """Take how late VMs were polled at most; log when that begins to matter, and when it is over."""
        self._lateness.note(late_s)

    def judge(self, snapshot: Snapshot, *, lent: int) -> None:
        """Publish a new level, and an alarm that begins or ends."""
        level = level_of(
            self._level,
            mem_available=snapshot.mem_available,
            reserve=snapshot.reserve,
            psi_full_avg10=self.sample.psi_full_avg10,
            needs=needs(snapshot),
            budget=snapshot.budget,
        )
        if level != self._level:
            before, self._level = self._level, level
            log_event(
                "level", level=logging.INFO if level == "ok" else logging.WARNING, was=before, now=level
            )
            self._feed.host_event(Event("level", utc_now(), {"from": before, "to": level}))
        was, self._alarm = self._alarm, _alarm_of(snapshot, self._alarm)
        if was is not None and was != self._alarm:
            self._tell_of_alarm("alarm-over", was, snapshot, lent, level=logging.INFO)
        if self._alarm is not None and was != self._alarm:
            self._tell_of_alarm("alarm", self._alarm, snapshot, lent, level=logging.ERROR)

    def _tell_of_alarm(self, word: str, reason: str, snapshot: Snapshot, lent: int, *, level: int) -> None:
        log_event(word, reason, level=level, budget=format_size(snapshot.budget), lent=format_size(lent))
        details = {"reason": reason, "budget": snapshot.budget, "lent": lent}
        self._feed.host_event(Event(word, utc_now(), details))

    def status(
        self,
        snapshot: Snapshot,
        statuses: Sequence[VmStatus],
        *,
        policy: str,
        mode: str,
        unidentified: tuple[tuple[str, str], ...],
        holds: tuple[Mapping[str, object], ...],
    ) -> HostStatus:
        """Return everything that the agent publishes about the host."""
        known = self.budget is not None
        return HostStatus(
            level=self._level,
            policy=policy,
            mode=mode,
            budget=self.budget,
            reserve=self.reserve,
            used=snapshot.charged,
            available=max(0, snapshot.budget - snapshot.charged) if known else None,
            mem_total=self.sample.mem_total,
            mem_available=self.sample.mem_available,
            psi_some_avg10=self.sample.psi_some_avg10,
            psi_full_avg10=self.sample.psi_full_avg10,
            vms_total=len(statuses),
            vms_online=sum(status.answers for status in statuses),
            unidentified=unidentified,
            reclaimable=sum(reclaimable(status) for status in statuses),
            room=max(0, snapshot.free) if known else 0,
            holds=holds,
            alarms=() if self._alarm is None else (self._alarm,),
            sampling_late_s=round(self._lateness.late_s, 1),
        )


@dataclass(slots=True)
class _Lateness:
    """How late VMs are polled, in seconds; 0: in time."""

    late_s: float = 0.0
    is_logged: bool = False

    def note(self, late_s: float) -> None:
        """Take the newest value."""
        self.late_s = late_s if late_s >= _IN_TIME_S else 0.0
        if late_s >= _LATE_S and not self.is_logged:
            self.is_logged = True
            log_event(
                "sampling-late",
                "there is more to do than processor time: VMs are sampled later than configured",
                level=logging.WARNING,
                late_s=round(late_s, 1),
            )
        elif self.is_logged and late_s < _IN_TIME_S:
            self.is_logged = False
            log_event("sampling-in-time", "VMs are sampled as configured again")


def _alarm_of(snapshot: Snapshot, before: str | None) -> str | None:
    if snapshot.guests and sum(guest.floor for guest in snapshot.guests) > snapshot.budget:
        return _FLOORS
    needed = needs(snapshot) * (_HYSTERESIS if before == _NEEDS else 1)
    return _NEEDS if snapshot.guests and needed > snapshot.budget else None


def _limited(sample: HostSample, memory: CgroupMemory, kept: int) -> HostSample:
    """Return what processes of the cgroup have of the host; lxcfs may have told the same already.

    ``kept`` is how much more of the host than of the group is reserved, in bytes.
    """
    total, available, left = sample.mem_total, sample.mem_available, memory.left
    if available is not None and total is not None and total > memory.limit:
        left = min(left, max(0, available - kept))
    elif available is not None:
        left = min(left, available)
    if memory.psi_full_avg10 is not None:
        sample = replace(sample, psi_some_avg10=memory.psi_some_avg10, psi_full_avg10=memory.psi_full_avg10)
    return replace(
        sample, mem_total=memory.limit if total is None else min(total, memory.limit), mem_available=left
    )


def _guest_memory(pid: int | None, charge: int) -> int:
    """Return how much of a QEMU's resident memory is its guest's, in bytes."""
    return charge if pid is None else max(0, min((rss_of(pid) or 0) - _QEMU_ITSELF, charge))


def _size(amount: Amount, total: int | None) -> int | None:
    return None if amount.relative and total is None else amount.of(total)
