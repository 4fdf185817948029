"""The host's memory, the budget of its VMs, and how short memory is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from qmpballoon import descriptors
from qmpballoon.agent.feed import Feed
from qmpballoon.config import HostSettings
from qmpballoon.log import say
from qmpballoon.model.records import Event, HostStatus, VmStatus, utc_now
from qmpballoon.policy.host_level import level_of, needs, reclaimable
from qmpballoon.policy.snapshot import Snapshot
from qmpballoon.procfs import cgroup_limit, read_host
from qmpballoon.units import Amount, format_size

_FLOORS: Final = "the floors of the VMs together exceed the budget"
_NEEDS: Final = "what the guests hold exceeds the budget"
_HYSTERESIS: Final = 1.05  # hysteresis: the alarm ends when the guests hold this much less


class HostMonitor:
    """Reads the host's figures, and tells when its level changes or its VMs need more than there is."""

    def __init__(self, feed: Feed) -> None:
        self.sample = read_host()
        self.budget: int | None = None  # None: not known
        self.reserve = 0
        self._feed = feed
        self._limit_missed = False
        self._level = "ok"
        self._alarm: str | None = None
        self._exhausted = False

    def look(self, settings: HostSettings) -> None:
        """Read the host's figures now; a total that cannot be read keeps its last value."""
        self._look_at_descriptors()
        total = self.sample.mem_total
        self.sample = read_host()
        if self.sample.mem_total is None:  # otherwise a budget in percent would be zero
            self.sample = replace(self.sample, mem_total=total)
        total = self.sample.mem_total
        if isinstance(settings.budget, Amount):
            self.budget = _size(settings.budget, total)
        else:
            self._take_limit(settings.budget.path)
        self.reserve = _size(settings.reserve, total) or 0

    def _look_at_descriptors(self) -> None:
        """Log when no file descriptor is left for another VM or broker, and when there are some again."""
        exhausted = not descriptors.are_left()
        if exhausted and not self._exhausted:
            say(
                "descriptors-exhausted",
                "no monitor or broker can be connected to and no state saved: raise the limit (LimitNOFILE= "
                "in a systemd unit)",
                level=logging.ERROR,
                most=descriptors.most(),
            )
        elif self._exhausted and not exhausted:
            say("descriptors-left", "there are some again")
        self._exhausted = exhausted

    def _take_limit(self, path: str) -> None:
        """Take a cgroup's limit as the budget; if it cannot be read, the last value stays."""
        limit = cgroup_limit(path)
        if limit is None and not self._limit_missed:
            say(
                "budget-unknown",
                "this cgroup has no limit that can be read",
                level=logging.ERROR,
                cgroup=path,
            )
        self._limit_missed = limit is None
        self.budget = limit if limit is not None else self.budget

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
            say("level", level=logging.INFO if level == "ok" else logging.WARNING, was=before, now=level)
            self._feed.host_event(Event("level", utc_now(), {"from": before, "to": level}))
        was, self._alarm = self._alarm, _alarm_of(snapshot, self._alarm)
        if was is not None and was != self._alarm:
            self._tell_of_alarm("alarm-over", was, snapshot, lent, level=logging.INFO)
        if self._alarm is not None and was != self._alarm:
            self._tell_of_alarm("alarm", self._alarm, snapshot, lent, level=logging.ERROR)

    def _tell_of_alarm(self, word: str, reason: str, snapshot: Snapshot, lent: int, *, level: int) -> None:
        say(word, reason, level=level, budget=format_size(snapshot.budget), lent=format_size(lent))
        details = {"reason": reason, "budget": snapshot.budget, "lent": lent}
        self._feed.host_event(Event(word, utc_now(), details))

    def status(
        self,
        snapshot: Snapshot,
        statuses: Sequence[VmStatus],
        *,
        policy: str,
        mode: str,
        unidentified: tuple[str, ...],
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
        )


def _alarm_of(snapshot: Snapshot, before: str | None) -> str | None:
    if snapshot.guests and sum(guest.floor for guest in snapshot.guests) > snapshot.budget:
        return _FLOORS
    needed = needs(snapshot) * (_HYSTERESIS if before == _NEEDS else 1)
    return _NEEDS if snapshot.guests and needed > snapshot.budget else None


def _size(amount: Amount, total: int | None) -> int | None:
    return None if amount.relative and total is None else amount.of(total)
