"""Holds: memory that ``reclaim`` keeps free for a limited time, for the client that asked for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count

from qmpballoon.errors import OutOfRange, RequestRefused
from qmpballoon.model.records import Event, utc_now
from qmpballoon.units import format_size

MOST: int = 64


@dataclass(slots=True)
class Holds:
    """The holds on the budget, by name. All times are monotonic seconds.

    ``tell`` gets an event of the host for each hold that begins or ends; it must not wait.
    """

    tell: Callable[[Event], None] = lambda event: None
    _held: dict[str, tuple[int, float]] = field(default_factory=dict)
    _numbers: count[int] = field(default_factory=lambda: count(1))

    @property
    def total(self) -> int:
        """The sum of all holds, in bytes."""
        return sum(size for size, _ in self._held.values())

    def take(self, size: int, until_s: float, *, budget: int) -> str:
        """Hold ``size`` bytes back until ``until_s``; return the hold's name.

        Raises:
            OutOfRange: together with the present holds it is more than the budget.
            RequestRefused: ``busy``, there are too many holds.
        """
        if size + self.total > budget:
            raise OutOfRange(f"{format_size(size)} more would hold back all of {format_size(budget)}")
        if len(self._held) >= MOST:
            raise RequestRefused("busy", f"{MOST} holds are there already")
        name = f"hold-{next(self._numbers)}"
        self._held[name] = (size, until_s)
        self._tell(name, size, "taken")
        return name

    def keep_until(self, name: str, until_s: float) -> None:
        """Change when a hold ends; a hold that has ended is not restored."""
        if name in self._held:
            self._held[name] = (self._held[name][0], until_s)

    def release(self, name: str) -> int:
        """End a hold and return its bytes.

        Raises:
            OutOfRange: there is no hold of that name, or it has expired.
        """
        if name not in self._held:
            raise OutOfRange(f"there is no hold {name!r}; it may have ended by itself")
        size, _ = self._held.pop(name)
        self._tell(name, size, "released")
        return size

    def expire(self, now_s: float) -> None:
        """End the holds whose time is over."""
        for name in [name for name, (_, until_s) in self._held.items() if until_s <= now_s]:
            size, _ = self._held.pop(name)
            self._tell(name, size, "expired")

    def listed(self, now_s: float) -> tuple[Mapping[str, object], ...]:
        """Return the holds as they appear in the host object."""
        return tuple(
            {"hold": name, "size": size, "left_s": round(max(0.0, until_s - now_s), 1)}
            for name, (size, until_s) in self._held.items()
        )

    def _tell(self, name: str, size: int, change: str) -> None:
        self.tell(Event("hold", utc_now(), {"hold": name, "size": size, "change": change}))
