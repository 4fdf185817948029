"""A policy's input and output: the frozen snapshot of a host, and decisions about its VMs. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Final, Protocol, TypeAlias, TypeVar

from qmpballoon.model.names import VmId
from qmpballoon.model.records import Sample
from qmpballoon.units import MIB

S = TypeVar("S")

LEAST_RELIEF: Final = 4 * MIB


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a guest has and needs now, in bytes; computed by ``estimate``."""

    held: int
    counted: int  # the part of held that it is entitled to: of a guest that is doubted, the mean
    available: int  # at the present actual
    trend: float  # bytes per second
    uses: int  # held with the headroom that it should have now, within floor and ceiling
    want: int  # the same, with what it held in the last minute, before a collapse, or at a peak
    emergency: bool  # until it has eased
    acute: bool  # it is an emergency now, not only not eased yet
    thin: bool  # less than twice the critical available memory
    doubted: bool  # it often was given memory that it did not use
    caches: int  # page cache
    caching: bool  # it could use more page cache: almost nothing is free


@dataclass(frozen=True, slots=True)
class GuardView:
    """What the guard adds to a guest before a policy sees it."""

    estimate: Estimate | None = None
    asked_at_s: float = float("-inf")  # when its target was last changed
    gives_at_most: int | None = None  # bytes that may be taken from it now; None: no limit


@dataclass(frozen=True, slots=True)
class GuestSnapshot:
    """One VM at the moment of a tick; sizes in bytes."""

    id: VmId
    life: str  # a new life resets rates, peaks and back-off
    size: int  # what actual is with an empty balloon
    actual: int
    target: int | None  # the last one that the agent sent in this life
    floor: int
    ceiling: int
    shares: int = 1000
    mode: str = "auto"  # auto: the policy may move it · manual, observe: only counted
    run_state: str = "running"  # QMP's word
    migrating: bool = False
    answers: bool = True  # its monitor answers
    driver_up: bool = True
    deflate_on_oom: bool = False
    booted_at_s: float = 0.0  # when its life began or the guest was reset, the later one
    fresh_since_s: float | None = None  # when its first fresh figures after that came
    sample: Sample | None = None  # the newest figures, None before the first fresh ones
    stats_interval_s: float = 2.0
    grace_s: float = 3.0
    rss: int | None = None  # of its QEMU process, huge pages included
    rss_is_complete: bool = True  # False: much of its memory is swapped out, where RSS does not count it
    oom_kills: int | None = None  # since the guest's boot; None: not reported
    charge_at_least: int = 0  # lower bound, by the host's figures
    guard: GuardView = GuardView()  # what the guard adds

    @property
    def estimate(self) -> Estimate | None:
        """What it has and needs, as the guard estimates; None without a usable sample."""
        return self.guard.estimate

    def sample_age_s(self, now_s: float) -> float | None:
        """Return the age of the newest figures; None if there are none."""
        return None if self.sample is None else max(0.0, now_s - self.sample.seen_at_s)

    @property
    def is_stale_after_s(self) -> float:
        """How old figures may be before they are stale."""
        return max(3 * self.stats_interval_s, 5.0)

    @property
    def charge(self) -> int:
        """What it counts against the budget, in bytes."""
        if not self.driver_up:
            return self.size
        return max(self.highest, self.charge_at_least)

    @property
    def highest(self) -> int:
        """The larger of actual and target, in bytes."""
        return max(self.actual, self.target or 0)

    @property
    def promised(self) -> int:
        """The part of its target that it has not taken yet, in bytes."""
        return max(0, (self.target or 0) - self.actual) if self.driver_up else 0

    @property
    def critical(self) -> int:
        """Available memory below which a guest of this actual is in an emergency."""
        return critical(self.actual)

    @property
    def least_relief(self) -> int:
        """The smallest grow in an emergency that is worth a command, in bytes.

        It is half of the distance to the emergency threshold, so that steady growth does not cause a small
        grow at each tick.
        """
        if self.estimate is None:
            return LEAST_RELIEF
        headroom = self.highest - self.estimate.held
        return max(LEAST_RELIEF, min((headroom - self.critical) // 2, int(self.estimate.trend)))

    def clamp(self, target: int) -> int:
        """Return the target within floor and ceiling."""
        return max(self.floor, min(self.ceiling, target))


_FIELDS: Final = tuple(field.name for field in fields(GuestSnapshot))
_PLACES: Final = {name: place for place, name in enumerate(_FIELDS)}
_values_of: Final = attrgetter(*_FIELDS)


def replaced(guest: GuestSnapshot, **changes: object) -> GuestSnapshot:
    """Return the guest with changes: ``dataclasses.replace`` in two thirds of its time.

    The guard does this for each guest at each tick.
    """
    values = list(_values_of(guest))
    for name, value in changes.items():
        values[_PLACES[name]] = value
    return GuestSnapshot(*values)


def critical(actual: int) -> int:
    """Return the available memory below which a guest of this ``actual`` is in an emergency, in bytes.

    A fixed threshold would always apply to small guests, and come too late for large ones.
    """
    return max(actual * 6 // 100, min(24 * MIB, actual // 10))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole host at the moment of a tick."""

    now_s: float  # monotonic
    guests: tuple[GuestSnapshot, ...]
    budget: int  # what all VMs together may be charged
    mem_total: int
    mem_available: int | None = None
    reserve: int = 0  # of mem_available, never given to VMs
    held_back: int = 0  # of the budget: kept free by reclaim
    overload: str = "guests"  # which limit yields when needs exceed the budget: guests | host
    elapsed_s: float = 2.0  # since the tick before
    charged: int = field(init=False, repr=False, compare=False)  # the sum of charges in bytes
    promised: int = field(init=False, repr=False, compare=False)  # the sum of what is not taken yet, in bytes

    def __post_init__(self) -> None:
        """Compute the sums once, because they are read often."""
        object.__setattr__(self, "charged", sum([guest.charge for guest in self.guests]))
        object.__setattr__(self, "promised", sum([guest.promised for guest in self.guests]))

    @property
    def free(self) -> int:
        """The bytes that may still be granted, by the budget and by the host's memory above its reserve.

        If it is negative, VMs must give that much back.
        """
        of_budget = self.budget - self.held_back - self.charged
        if self.mem_available is None:
            return of_budget
        return min(of_budget, self.mem_available - self.reserve - self.promised)


@dataclass(frozen=True, slots=True)
class Hold:
    """Send nothing; ``why`` is the reason."""

    why: str


@dataclass(frozen=True, slots=True)
class SetTarget:
    """Set this target in bytes; ``why`` is the reason. ``urgent``: do not wait for pending shrinks."""

    target: int
    why: str
    urgent: bool = False


Decision: TypeAlias = Hold | SetTarget
Decisions: TypeAlias = Mapping[VmId, Decision]


class Policy(Protocol[S]):
    """A pure step over the whole host. Nothing but the frozen state S is kept between ticks."""

    @property
    def name(self) -> str:
        """The stable name, as configured."""
        ...

    def start(self) -> S:
        """Return the state before the first tick."""
        ...

    def step(self, state: S, snapshot: Snapshot) -> tuple[S, Decisions]:
        """Return the next state and what to do; a VM without a decision is held."""
        ...
