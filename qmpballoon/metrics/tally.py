"""Counts decisions, emergencies and answers, and keeps the newest record of the host. No I/O.

It is a listener of the feed. Everything else that is shown is read when it is asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, HostStatus, VmStatus
from qmpballoon.protocol.verbs import VERBS

EMERGENCY: Final = "emergency"
UNKNOWN_VERB: Final = "unknown"
LAG_BUCKETS_S: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

_VERBS: Final = frozenset(verb for verbs in VERBS.values() for verb in verbs)


@dataclass(slots=True)
class Lag:
    """How late the event loop was, as a histogram: ``counts`` has one more element than LAG_BUCKETS_S."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LAG_BUCKETS_S) + 1))
    sum_s: float = 0.0

    def note(self, late_s: float) -> None:
        """Take one measurement."""
        late_s = max(0.0, late_s)
        self.counts[bisect_left(LAG_BUCKETS_S, late_s)] += 1
        self.sum_s += late_s


class Tally:
    """What is counted; ``clock`` is monotonic. The number of keys is bounded by words, verbs and VMs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.decisions: Counter[tuple[str, str]] = Counter()  # by why, and whether the target was sent
        self.emergencies: Counter[str] = Counter()  # by VM
        self.answers: Counter[tuple[str, str]] = Counter()  # by verb, and ``ok`` or an error word
        self.lag = Lag()
        self.host: HostStatus | None = None  # None: there was no tick yet
        self.host_at_s = 0.0
        self._clock = clock

    def note_answer(self, verb: str, outcome: str) -> None:
        """Count an answer; a verb that does not exist counts as ``unknown``, so that nobody makes series."""
        self.answers[verb if verb in _VERBS else UNKNOWN_VERB, outcome] += 1

    @property
    def host_age_s(self) -> float:
        """How old the host's record is."""
        return max(0.0, self._clock() - self.host_at_s)

    # ── a listener of the feed ───────────────────────────────────────────────────────────────────

    def vm_changed(self, vm: VmStatus) -> None:
        """Nothing is kept of it: records of VMs are read when they are asked for."""

    def vm_gone(self, vm: VmId) -> None:
        """Forget a VM."""
        self.emergencies.pop(vm, None)

    def vm_event(self, vm: VmId, event: Event) -> None:
        """Count a decision."""
        if event.event != "decision":
            return
        why, sent = str(event.data.get("why")), bool(event.data.get("sent"))
        self.decisions[why, "sent" if sent else "observed"] += 1
        if why == EMERGENCY and sent:
            self.emergencies[vm] += 1

    def host_changed(self, host: HostStatus) -> None:
        """Keep the host's newest record."""
        self.host, self.host_at_s = host, self._clock()

    def host_event(self, event: Event) -> None:
        """Nothing is kept of it: level and alarms are in the host's record."""

    def sampled(self) -> None:
        """Nothing is kept of it."""
