"""What a soak did and found: actions, violations and counts, and who was away when."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Final

AGENT: Final = "agent"
BROKER: Final = "broker"

_KEPT_ACTIONS: Final = 40  # the last ones are reported with each violation
_KEPT_ABSENCES: Final = 500  # of one party; the checks look back two minutes
_MOST_LISTED: Final = 20  # violations of one invariant; the others are only counted


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the journal; ``at_s`` counts from the start of the soak."""

    at_s: float
    word: str
    text: str

    def __str__(self) -> str:
        minutes, seconds = divmod(self.at_s, 60)
        return f"{int(minutes):3d}:{seconds:05.2f}  {self.word:<18}{self.text}"


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that did not hold, with the actions before it."""

    at_s: float
    invariant: str
    text: str
    actions: tuple[str, ...]


class Journal:
    """Records and prints the actions, and records what they led to."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._began_s = clock()
        self.counts: Counter[str] = Counter()
        self.violations: list[Violation] = []
        self.absences = Absences(clock)
        self._write = write
        self._last: deque[str] = deque(maxlen=_KEPT_ACTIONS)

    @property
    def found(self) -> int:
        """The number of violations."""
        return sum(number for what, number in self.counts.items() if what.startswith("violation "))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start of the soak."""
        return self.clock() - self._began_s

    def action(self, word: str, text: str = "") -> None:
        """Record an action; its word is counted."""
        self.counts[f"action {word}"] += 1
        self.note(word, text)

    def note(self, word: str, text: str = "") -> None:
        """Print a line that is no action."""
        line = str(Entry(self.elapsed_s, word, text))
        self._last.append(line)
        self._write(line)

    def count(self, what: str, number: int = 1) -> None:
        """Count something for the table at the end."""
        self.counts[what] += number

    def violation(self, invariant: str, text: str) -> None:
        """Record that an invariant did not hold."""
        self.counts[f"violation {invariant}"] += 1
        if self.counts[f"violation {invariant}"] <= _MOST_LISTED:
            self._write(str(Entry(self.elapsed_s, "VIOLATION", f"{invariant}: {text}")))
            self.violations.append(Violation(self.elapsed_s, invariant, text, tuple(self._last)))

    def as_json(self) -> dict[str, object]:
        """Return the counts and the violations."""
        return {
            "elapsed_s": round(self.elapsed_s, 1),
            "counts": dict(sorted(self.counts.items())),
            "violations": [asdict(violation) for violation in self.violations],
        }

    def table(self) -> Iterator[str]:
        """Yield the lines of the table at the end."""
        width = max(map(len, self.counts), default=0)
        for what, number in sorted(self.counts.items()):
            yield f"  {what:<{width}}  {number:7d}"


class Absences:
    """When the agent, the broker or a VM was away: killed, stopped, starting, or with faults.

    Several absences of one party may overlap.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._open: dict[str, list[float]] = defaultdict(list)
        self._closed: dict[str, deque[tuple[float, float]]] = defaultdict(
            lambda: deque(maxlen=_KEPT_ABSENCES)
        )

    def begin(self, who: str) -> float:
        """Note that somebody is away from now on; return what `end` takes."""
        began_s = self._clock()
        self._open[who].append(began_s)
        return began_s

    def end(self, who: str, began_s: float) -> None:
        """Note that an absence is over."""
        self._open[who].remove(began_s)
        self._closed[who].append((began_s, self._clock()))

    @contextmanager
    def of(self, who: str) -> Iterator[None]:
        """Note that somebody is away while the body runs."""
        began_s = self.begin(who)
        try:
            yield
        finally:
            self.end(who, began_s)

    def any(self, who: str, from_s: float, until_s: float) -> bool:
        """Tell whether somebody was away at any moment of a period on the monotonic clock."""
        return any(began_s <= until_s for began_s in self._open[who]) or any(
            began_s <= until_s and ended_s >= from_s for began_s, ended_s in self._closed[who]
        )
