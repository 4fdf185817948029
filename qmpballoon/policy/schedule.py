"""How often to look: which guests are sampled several times a second, and when the next tick is. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qmpballoon.model.tolerance import is_reached
from qmpballoon.policy.estimate import is_refuted
from qmpballoon.policy.snapshot import GuestSnapshot, critical
from qmpballoon.units import MIB

BURST_BYTES_PER_S: Final = 40 * MIB  # growth that must not come as a surprise
BURST_OF_SIZE: Final = 1 / 32  # per second: the same for large guests
LOOKS_BEFORE_DEATH: Final = 4  # at that growth, from where the guest is now to its last page
GROWING_PER_S: Final = 0.01  # of what the guest holds
THIN: Final = 2  # times the available memory at which a guest is in an emergency


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds between ticks."""

    calm_tick_s: float = 2.0
    moving_tick_s: float = 0.5  # while a balloon moves: what it freed can be given on
    thin_tick_s: float = 0.2  # while a guest is thin

    def tick_s(self, *, thin: bool, moving: bool) -> float:
        """Return how long to wait for the next tick."""
        return self.thin_tick_s if thin else self.moving_tick_s if moving else self.calm_tick_s


def is_thin(guest: GuestSnapshot) -> bool:
    """Tell whether the guest claims to be near an emergency, and the host cannot refute it."""
    reading = guest.reading
    available = reading.available if reading else None
    if reading is None or available is None:
        return False
    actual = guest.actual if reading.actual is None else reading.actual
    return available < THIN * critical(actual) and not is_refuted(guest)


def presses(guest: GuestSnapshot, previous: GuestSnapshot | None) -> bool:
    """Tell whether the guest's new sample is to be acted upon at once: it is thin, anew or the more so."""
    if not is_thin(guest):
        return False
    return previous is None or not is_thin(previous) or is_growing(guest, previous)


def is_moving(guest: GuestSnapshot, previous: GuestSnapshot | None) -> bool:
    """Tell whether the balloon is on its way: a target that is not reached, new or with progress since."""
    if guest.target is None or is_reached(guest.actual, guest.target, guest.size):
        return False
    return previous is None or guest.target != previous.target or guest.actual != previous.actual


def is_growing(guest: GuestSnapshot, previous: GuestSnapshot | None) -> bool:
    """Tell whether the guest holds more by 1 % a second or faster than at its sample before."""
    now, before = guest.reading, previous.reading if previous else None
    if now is None or before is None or now.held is None or before.held is None:
        return False
    passed_s = now.seen_at_s - before.seen_at_s
    return passed_s > 0 and now.held - before.held > GROWING_PER_S * before.held * passed_s


def sampling_interval_s(
    guest: GuestSnapshot, previous: GuestSnapshot | None, *, calm_s: float, fast_s: float
) -> float:
    """Return how long to wait for the guest's next sample, between ``fast_s`` and ``calm_s``.

    The less it has available, the sooner: four looks before a burst could use it up. ``fast_s`` 0:
    always ``calm_s``.
    """
    if not fast_s or not guest.driver_up or not guest.answers or guest.run_state != "running":
        return calm_s
    soonest_s = min(calm_s, fast_s)
    available = guest.reading.available if guest.reading else None
    interval_s = calm_s
    if available is not None:
        burst = max(BURST_BYTES_PER_S, BURST_OF_SIZE * guest.size)
        interval_s = min(calm_s, max(fast_s, available / burst / LOOKS_BEFORE_DEATH))
    if interval_s == soonest_s:  # no need to ask further
        return soonest_s
    hurries = is_moving(guest, previous) or is_growing(guest, previous) or is_thin(guest)
    return soonest_s if hurries else interval_s
