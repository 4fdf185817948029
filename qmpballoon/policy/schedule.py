"""The times of the next poll of a VM and of the next tick. Pure.

The agent and the simulator use the same two classes. The clock is a parameter, in seconds: the agent's is
monotonic, the simulator's is virtual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from qmpballoon.model.tolerance import is_reached
from qmpballoon.policy.estimate import corroborated
from qmpballoon.policy.snapshot import Decisions, GuestSnapshot, Hold, Snapshot, critical
from qmpballoon.units import MIB

FULL_POLL_EVERY_S: Final = 10.0  # changes without an event: migration, plugged memory, an unloaded driver
MOVING_FOR_S: Final = 30.0  # after a target was sent; slower guests are sampled at their usual rate
WATCHED_EVERY_S: Final = 0.05  # while a caller waits for the VM
BURST_BYTES_PER_S: Final = 40 * MIB  # growth that must be detected in time
BURST_OF_SIZE: Final = 1 / 32  # per second: the same for large guests
SAMPLES_BEFORE_EXHAUSTION: Final = 4  # at that growth, until nothing is available
GROWING_PER_S: Final = 0.01  # of what the guest holds
THIN: Final = 2  # times the available memory at which a guest is in an emergency
MUCH_FREE: Final = 1 / 8  # of the budget, or of the host if that is less
LITTLE: Final = 1 / 16  # of what is available: a change of held memory that alone changes no decision
CALM_TICK_S: Final = 2.0  # between ticks without a request
SHORTEST_TICK_S: Final = 0.1  # between a tick and a requested one; the longest wait of an urgent one
TICK_SHARE: Final = 0.1  # of a core; with hundreds of VMs ticks come less often


class SamplingSettings(Protocol):
    """How often a VM may be sampled."""

    @property
    def stats_interval_s(self) -> float:
        """Seconds between samples while the guest is calm."""

    @property
    def fast_interval_s(self) -> float:
        """The least number of seconds between samples; 0: always ``stats_interval_s``."""


class VmSchedule:
    """The polls of one VM during one life: rare while it is calm, frequent while it moves or boots.

    ``hurried`` is True while it moves or boots.
    """

    def __init__(self, settings: SamplingSettings, clock: Callable[[], float]) -> None:
        self.watchers = 0  # callers that wait for the VM
        self._clock = clock
        self.begin(settings)

    def begin(self, settings: SamplingSettings) -> None:
        """Forget the previous life; keep ``watchers``."""
        self._full_poll_at_s = self._moving_until_s = self._clock()
        self.forget_samples(settings)

    def forget_samples(self, settings: SamplingSettings) -> None:
        """Forget the samples because the guest's driver was unloaded."""
        self._interval_s = float(settings.stats_interval_s)  # until the next sample
        self._before: GuestSnapshot | None = None  # at the previous sample
        self._held_before: int | None = None  # at the last sample that could change decisions

    # ── full polls ───────────────────────────────────────────────────────────────────────────────

    def request_full_poll(self) -> None:
        """Make a full poll due now."""
        self._full_poll_at_s = self._clock()

    def defer_full_poll(self) -> None:
        """Make the next full poll due after the usual interval."""
        self._full_poll_at_s = self._clock() + FULL_POLL_EVERY_S

    @property
    def is_full_poll_due(self) -> bool:
        """Tell whether a full poll is due."""
        return self._clock() >= self._full_poll_at_s

    # ── samples ──────────────────────────────────────────────────────────────────────────────────

    def target_sent(self) -> None:
        """Record that a target was sent, so that the balloon moves now."""
        self._moving_until_s = self._clock() + MOVING_FOR_S

    @property
    def may_be_moving(self) -> bool:
        """Tell whether a target was sent so recently that the balloon may still move."""
        return self._clock() <= self._moving_until_s

    def sampled(self, guest: GuestSnapshot, settings: SamplingSettings) -> bool:
        """Take a new sample into account; return whether it needs a decision now."""
        before, self._before = self._before, guest
        self._interval_s = sampling_interval_s(
            guest, before, calm_s=settings.stats_interval_s, fast_s=settings.fast_interval_s
        )
        return is_urgent(guest, before)

    def may_change_decisions(self, guest: GuestSnapshot, *, hurried: bool) -> bool:
        """Tell whether the guest's new sample may change what is decided on a host at rest.

        It may while the guest is hurried, watched or thin. Otherwise what it holds must have changed by at
        least ``LITTLE`` since this was last true; slow growth adds up.
        """
        sample = guest.sample
        if sample is None or sample.held is None or sample.available is None:
            return True
        is_calm = not hurried and not self.watchers and self._held_before is not None and not is_thin(guest)
        if is_calm and abs(sample.held - (self._held_before or 0)) < LITTLE * sample.available:
            return False
        self._held_before = sample.held
        return True

    def sample_every_s(self, settings: SamplingSettings, *, hurried: bool) -> float:
        """Return how long to wait between samples."""
        if settings.fast_interval_s and (hurried or self.watchers):
            return min(float(settings.stats_interval_s), settings.fast_interval_s)
        return self._interval_s

    def pause_s(self, settings: SamplingSettings, *, hurried: bool) -> float:
        """Return how long to wait for the next poll."""
        if self.watchers:
            return WATCHED_EVERY_S
        return max(
            0.0, min(self.sample_every_s(settings, hurried=hurried), self._full_poll_at_s - self._clock())
        )


class TickSchedule:
    """The time of the next tick. All pauses count from the end of the previous tick.

    Without a request: after ``calm_s``. With a request: after ``shortest_s``, and not before the share of
    processor time allows it: a tick that took ``spent_s`` delays the next by ``spent_s / share``. With an
    urgent request: after ``shortest_s`` at the latest, so that an emergency never waits because of the cost
    of earlier ticks. The cost of an urgent tick delays later ticks that are not urgent. Requests do not
    queue; one tick serves any number of them.

    ``rests`` is set by the caller after each tick (see `is_at_rest`). While it is true, samples that changed
    little request nothing.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        calm_s: float = CALM_TICK_S,
        shortest_s: float = SHORTEST_TICK_S,
        share: float = TICK_SHARE,
    ) -> None:
        """The first tick is due now."""
        self.calm_s = calm_s
        self.rests = False
        self._clock = clock
        self._shortest_s = shortest_s
        self._share = share
        self._paid_at_s = clock()  # when the share of processor time covers all ticks so far
        self._calm_at_s = self._asked_at_s = self._urgent_at_s = self._paid_at_s
        self._is_asked = self._is_urgent = False

    def began(self) -> None:
        """Record that a tick begins; it serves all requests."""
        self._is_asked = self._is_urgent = False

    def ended(self, spent_s: float) -> None:
        """Record that the tick has ended and took ``spent_s`` seconds of processor time."""
        now_s, cost_s = self._clock(), spent_s / self._share
        self._calm_at_s = now_s + self.calm_s
        self._paid_at_s = min(self._calm_at_s, max(now_s, self._paid_at_s) + cost_s)
        self._asked_at_s = max(self._paid_at_s, min(self._calm_at_s, now_s + self._shortest_s))
        self._urgent_at_s = now_s + min(self._shortest_s, cost_s)

    def ask(self, *, little: bool = False) -> bool:
        """Request a tick soon; return False if one was requested already.

        ``little``: because of a sample that may change nothing (see `VmSchedule.may_change_decisions`).
        """
        if little and self.rests:
            return False
        was_asked, self._is_asked = self._is_asked, True
        return not was_asked

    def ask_urgently(self) -> bool:
        """Request a tick for a guest that is short of memory; return False if one was requested already."""
        was_urgent, self._is_urgent = self._is_urgent, True
        return not was_urgent

    @property
    def due_at_s(self) -> float:
        """The time of the next tick, unless it is requested earlier."""
        if self._is_urgent:
            return min(self._urgent_at_s, self._calm_at_s)
        return self._asked_at_s if self._is_asked else self._calm_at_s

    @property
    def pause_s(self) -> float:
        """How long to wait for the next tick, unless it is requested earlier."""
        return max(0.0, self.due_at_s - self._clock())


def is_at_rest(snapshot: Snapshot, decisions: Decisions) -> bool:
    """Tell whether a tick moved no guest, and much memory is free.

    Where memory is short, small changes decide who gets it.
    """
    limit = min(snapshot.budget, snapshot.mem_total or snapshot.budget)
    return snapshot.free >= MUCH_FREE * limit and all(isinstance(made, Hold) for made in decisions.values())


def is_thin(guest: GuestSnapshot) -> bool:
    """Tell whether the guest is near an emergency, by its figures as far as its RSS allows them."""
    sample = guest.sample
    available = sample.available if sample else None
    if sample is None or available is None:
        return False
    actual = guest.actual if sample.actual is None else sample.actual
    return actual - corroborated(actual - available, guest) < THIN * critical(actual)


def is_urgent(guest: GuestSnapshot, previous: GuestSnapshot | None) -> bool:
    """Tell whether the guest's new sample needs a decision now: it became thin, or thinner."""
    if not is_thin(guest):
        return False
    return previous is None or not is_thin(previous) or is_growing(guest, previous)


def is_moving(guest: GuestSnapshot, previous: GuestSnapshot | None) -> bool:
    """Tell whether the balloon moves: its target is not reached, and target or actual has changed."""
    if guest.target is None or is_reached(guest.actual, guest.target, guest.size):
        return False
    return previous is None or guest.target != previous.target or guest.actual != previous.actual


def is_growing(guest: GuestSnapshot, previous: GuestSnapshot | None) -> bool:
    """Tell whether the guest's held memory grew by more than 1 % a second since its previous sample."""
    now, before = guest.sample, previous.sample if previous else None
    if now is None or before is None or now.held is None or before.held is None:
        return False
    passed_s = now.seen_at_s - before.seen_at_s
    return passed_s > 0 and now.held - before.held > GROWING_PER_S * before.held * passed_s


def sampling_interval_s(
    guest: GuestSnapshot, previous: GuestSnapshot | None, *, calm_s: float, fast_s: float
) -> float:
    """Return how long to wait for the guest's next sample, between ``fast_s`` and ``calm_s``.

    It allows four samples before a burst could use up the available memory. With ``fast_s`` 0 it is always
    ``calm_s``.
    """
    if not fast_s or not guest.driver_up or not guest.answers or guest.run_state != "running":
        return calm_s
    soonest_s = min(calm_s, fast_s)
    available = guest.sample.available if guest.sample else None
    interval_s = calm_s
    if available is not None:
        burst = max(BURST_BYTES_PER_S, BURST_OF_SIZE * guest.size)
        interval_s = min(calm_s, max(fast_s, available / burst / SAMPLES_BEFORE_EXHAUSTION))
    if interval_s == soonest_s:  # the lower bound
        return soonest_s
    is_hurried = is_moving(guest, previous) or is_growing(guest, previous) or is_thin(guest)
    return soonest_s if is_hurried else interval_s
