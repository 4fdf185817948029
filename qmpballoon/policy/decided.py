"""What was decided about a VM, with the figures from which it was decided. Pure.

A history of decisions is kept for each VM, so a decision is packed into some 200 bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Final, Literal

from qmpballoon.policy.estimate import TREND_KEEPS, Past
from qmpballoon.policy.snapshot import GuestSnapshot, Snapshot, critical

Outcome = Literal["sent", "observed", "failed", "held"]
"""What became of a decision: its target was sent; it was only published, in mode observe; QEMU did not take
it; or it was to leave the guest as it is."""

MOST_KEPT: Final = 32  # decisions of a VM


@dataclass(frozen=True, slots=True)
class Figures:
    """What a decision was made from, in bytes; None: not known then."""

    size: int | None = None
    actual: int | None = None
    floor: int | None = None
    ceiling: int | None = None
    held: int | None = None  # as the agent believes it: at most what QEMU has resident
    available: int | None = None  # actual minus held
    caches: int | None = None
    growth: int | None = None  # of held, bytes per second; 0: it does not grow
    critical: int | None = None  # available memory at which an emergency begins
    rss: int | None = None
    budget: int | None = None  # of all VMs
    used: int | None = None  # of the budget: the sum of charges
    free: int | None = None  # by the budget and the host's memory; negative: VMs must give that much
    mem_available: int | None = None  # of the host
    reserve: int | None = None  # of mem_available


NO_FIGURES: Final = Figures()
FIGURES: Final = tuple(entry.name for entry in fields(Figures))
_values_of: Final = attrgetter(*FIGURES)
_PACKED: Final = struct.Struct(f"<{len(FIGURES)}q")
_UNKNOWN: Final = -(2**63)
_MOST: Final = 2**63 - 1


class Decided:
    """One decision, packed. ``at`` is the wall clock in seconds, ``target`` bytes.

    ``target`` is None if the guest is left as it is, ``policy`` where no policy decided.
    """

    __slots__ = ("_figures", "at", "outcome", "policy", "target", "why")

    def __init__(
        self,
        at: float,
        why: str,
        outcome: Outcome,
        figures: Figures,
        *,
        target: int | None = None,
        policy: str | None = None,
    ) -> None:
        self.at = at
        self.why = why
        self.outcome = outcome
        self.target = target
        self.policy = policy
        known = _values_of(figures)
        self._figures = _PACKED.pack(
            *(_UNKNOWN if each is None else max(-_MOST, min(_MOST, each)) for each in known)
        )

    @property
    def figures(self) -> Figures:
        """The figures from which it was decided."""
        return Figures(*(None if each == _UNKNOWN else each for each in _PACKED.unpack(self._figures)))


class History:
    """The last decisions about one VM; the newest replace the oldest."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: list[Decided] = []

    def note(self, decided: Decided) -> None:
        """Keep a decision."""
        self._kept.append(decided)
        del self._kept[:-MOST_KEPT]

    def last(self, count: int) -> tuple[Decided, ...]:
        """Return the last ``count`` decisions, the newest last."""
        return tuple(self._kept[-count:]) if count > 0 else ()


def figures_of(
    guest: GuestSnapshot | None, past: Past | None = None, host: Snapshot | None = None
) -> Figures:
    """Return the figures from which a decision about this guest is made now.

    ``past`` is the guest's history, ``host`` the host as the last tick saw it.
    """
    if guest is None:
        return NO_FIGURES
    sample = guest.sample
    held = past.held if past is not None else sample.held if sample is not None else None
    growth = None
    if past is not None and host is not None:
        growth = round(past.trend * TREND_KEEPS ** max(0.0, host.now_s - past.seen_at_s))
    return Figures(
        size=guest.size,
        actual=guest.actual,
        floor=guest.floor,
        ceiling=guest.ceiling,
        held=held,
        available=None if held is None else max(0, guest.actual - held),
        caches=sample.stats.caches if sample is not None else None,
        growth=growth,
        critical=critical(guest.actual),
        rss=guest.rss,
        budget=host.budget if host is not None else None,
        used=host.charged if host is not None else None,
        free=host.free if host is not None else None,
        mem_available=host.mem_available if host is not None else None,
        reserve=host.reserve if host is not None else None,
    )
