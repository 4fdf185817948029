"""Detection of guests whose balloon does not follow its target, or whose figures are wrong. Pure.

Each guest is judged on every tick. A balloon that makes no progress has one of three causes: the guest has
nothing left to give (no fault), it reports much available memory and gives none (contradicted), or it is
stuck.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Final

from qmpballoon.model.tolerance import is_reached
from qmpballoon.policy.estimate import is_refuted
from qmpballoon.policy.snapshot import GuestSnapshot
from qmpballoon.units import MIB

STUCK_AFTER_S: Final = 5.0
UNCOOPERATIVE_AFTER_S: Final = 20.0
FIRST_BACK_OFF_S: Final = 5.0
LAST_BACK_OFF_S: Final = 60.0
PROBE: Final = 12 * MIB
PROGRESS: Final = MIB
NOTHING_LEFT: Final = 0.15  # of actual: with less available the guest cannot give more
CONTRADICTED: Final = 0.25  # of actual: with more available a guest that gives none is contradicted
CONTRADICTED_FOR_S: Final = 60.0
LONG_STALE_S: Final = 30.0
FOREIGN_FOR_S: Final = 60.0
RSS_FOLLOWS_WITHIN_S: Final = 15.0
REFUTED_FOR_S: Final = 15.0  # a claim that RSS refutes for this long is reported
RSS_FOLLOWS: Final = 0.3  # of what the guest gave
RSS_CHECK_FROM: Final = 32 * MIB  # bytes given; smaller changes of RSS are noise
QEMU_OVERHEAD: Final = 128 * MIB  # resident beside the guest's memory: devices, caches, TCG's translations
LATE_TICK_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Safeties:
    """Switches that only tests turn off, each with a scenario that then fails."""

    staleness: bool = True
    grace: bool = True
    stuck_balloons: bool = True
    contradiction: bool = True  # RSS contradicts a guest's figures
    foreign_control: bool = True
    pause_and_migration: bool = True  # paused and migrating guests are not moved
    late_ticks: bool = True
    emergencies: bool = True
    enforce_budget: bool = True  # ordinary grows wait for the shrinks that free their memory


@dataclass(frozen=True, slots=True)
class Cooperation:
    """The state kept about a guest's balloon; it belongs to one life and boot."""

    life: str
    booted_at_s: float
    size: int = 0
    target: int | None = None
    asked_at_s: float = 0.0  # when the target last changed
    progress_at_s: float = 0.0  # when actual last came nearer to it
    best: int = 0  # the nearest that actual came to the target
    stuck_since_s: float | None = None
    stuck_count: int = 0  # times that it was found stuck without progress between
    backs_off_until_s: float = 0.0
    contradicted_until_s: float = 0.0
    foreign_until_s: float = 0.0
    settled: int | None = None  # actual when the last target was reached
    rss_check: tuple[float, int, int] | None = None  # time, actual and RSS before a shrink; RSS must follow
    untrusted: bool = False
    refuted_since_s: float | None = None  # since when RSS is less than the held memory that it reports
    stuck_growing: bool = False  # the balloon was last stuck while growing
    observed_since_s: float | None = None  # since when it could be sampled; None: not now


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a guest's state allows. ``health`` None: the guard found no fault."""

    why: str | None = None  # the reason of a hold; None: it may be moved as the policy decides
    may_shrink: bool = True
    may_grow: bool = True
    set_back: bool = False  # set target = actual, because the balloon does not reach its target
    proportional: bool = False  # no usable figures: its size follows from limits only
    probe: bool = False  # shrink by PROBE at most, to see whether it moves again
    emergency_only: bool = False  # grow in an emergency only, by PROBE at most: earlier grows were not taken
    awaits: bool = False  # until it sends fresh figures it is moved in an emergency only
    charge: int | None = None  # in place of the usual one
    health: str | None = None  # untrusted, uncooperative, stuck
    refuted: bool = False  # RSS has refuted its held memory for some time: held is capped, it may be moved


FREE: Final = Judgement()
_CONTRADICTED: Final = Judgement(
    "contradicted", may_shrink=False, set_back=True, proportional=True, health="untrusted"
)


def judge(
    state: Cooperation | None,
    guest: GuestSnapshot,
    now_s: float,
    *,
    stale_before_s: float,
    safeties: Safeties,
) -> tuple[Cooperation, Judgement]:
    """Return the guest's next state, and what may be done with it now."""
    if state is None or (state.life, state.booted_at_s) != (guest.life, guest.booted_at_s):
        state = _new_state(guest, now_s)
    state = _updated(state, guest, now_s, safeties)
    state, judgement = _judged(state, guest, now_s, stale_before_s, safeties)
    if state.stuck_growing and now_s < state.backs_off_until_s:  # in addition to any other judgement
        judgement = replace(judgement, emergency_only=True)
    if state.untrusted:
        judgement = replace(judgement, charge=_charge_by_rss(guest))
    if state.refuted_since_s is not None and now_s - state.refuted_since_s >= REFUTED_FOR_S:
        judgement = replace(judgement, refuted=True)
    return state, judgement


def _judged(
    state: Cooperation, guest: GuestSnapshot, now_s: float, stale_before_s: float, safeties: Safeties
) -> tuple[Cooperation, Judgement]:
    immovable = _immovable(guest, safeties)
    if immovable is not None:
        if not guest.driver_up:  # the driver was unloaded; the balloon was not stuck
            return _new_state(guest, now_s, untrusted=state.untrusted), immovable
        return replace(
            state, progress_at_s=now_s, stuck_since_s=None, settled=None, observed_since_s=None
        ), immovable
    if state.observed_since_s is None:
        state = replace(state, observed_since_s=now_s)
    if _awaits_figures(state, guest, now_s, stale_before_s, safeties):
        why = "grace" if safeties.grace and _is_young(guest, now_s) else "awaits-figures"
        return replace(state, progress_at_s=now_s), Judgement(why, may_shrink=False, awaits=True)
    if state.foreign_until_s > now_s:
        return state, Judgement("foreign-hand", may_shrink=False, may_grow=False)
    if safeties.stuck_balloons and _makes_no_progress(state, guest, now_s):
        return _stuck(state, guest, now_s)
    if state.untrusted:
        return state, Judgement("untrusted", may_shrink=False, health="untrusted")
    if state.contradicted_until_s > now_s:
        return state, _CONTRADICTED
    by_figures = _by_figures(guest, now_s, safeties)
    backs_off = state.backs_off_until_s > now_s or state.stuck_count > 0
    return state, _backing_off(state, now_s) if backs_off and by_figures.may_shrink else by_figures


def _new_state(guest: GuestSnapshot, now_s: float, *, untrusted: bool = False) -> Cooperation:
    return Cooperation(
        guest.life,
        guest.booted_at_s,
        guest.size,
        guest.target,
        now_s,
        now_s,
        best=guest.actual,
        untrusted=untrusted,
    )


def _immovable(guest: GuestSnapshot, safeties: Safeties) -> Judgement | None:
    if not guest.answers:
        return Judgement("silent", may_shrink=False, may_grow=False)
    if safeties.pause_and_migration and guest.migrating:
        return Judgement("migrating", may_shrink=False, may_grow=False)
    if safeties.pause_and_migration and guest.run_state != "running":
        return Judgement("paused", may_shrink=False, may_grow=False)
    if not guest.driver_up:
        return Judgement("booting", may_shrink=False, may_grow=False)
    return None


def _awaits_figures(
    state: Cooperation, guest: GuestSnapshot, now_s: float, stale_before_s: float, safeties: Safeties
) -> bool:
    """Tell whether the guest has sent nothing fresh since it could be observed, and not for long.

    The agent has just started or was stopped, or the guest was silent, paused or migrating.
    """
    if not safeties.staleness or _is_silent_for_long(state, guest, now_s, stale_before_s):
        return False
    return _is_of_before(guest, stale_before_s, safeties) or _age_s(guest, now_s) > LONG_STALE_S


def _is_of_before(guest: GuestSnapshot, stale_before_s: float, safeties: Safeties) -> bool:
    """Tell whether its figures are from before a delay of the agent's own."""
    return safeties.late_ticks and guest.sample is not None and guest.sample.seen_at_s < stale_before_s


def _is_silent_for_long(
    state: Cooperation, guest: GuestSnapshot, now_s: float, stale_before_s: float
) -> bool:
    """Tell whether the guest has sent nothing for LONG_STALE_S in which the agent observed it."""
    since_s = max(stale_before_s, now_s if state.observed_since_s is None else state.observed_since_s)
    return min(_age_s(guest, now_s), now_s - since_s) > LONG_STALE_S


def _age_s(guest: GuestSnapshot, now_s: float) -> float:
    age_s = guest.sample_age_s(now_s)
    return inf if age_s is None else age_s


def _is_young(guest: GuestSnapshot, now_s: float) -> bool:
    return guest.fresh_since_s is None or now_s - guest.fresh_since_s < guest.grace_s


def _by_figures(guest: GuestSnapshot, now_s: float, safeties: Safeties) -> Judgement:
    if safeties.grace and _is_young(guest, now_s):
        return Judgement("grace", may_shrink=False)
    if guest.sample is not None and guest.sample.available is None:
        return Judgement("figures-missing", may_shrink=False, proportional=True)
    age_s = _age_s(guest, now_s)
    if not safeties.staleness:
        return FREE
    if age_s > LONG_STALE_S:
        return Judgement("long-stale", may_shrink=False, proportional=True)
    return Judgement("stale", may_shrink=False) if age_s > guest.is_stale_after_s else FREE


def _updated(state: Cooperation, guest: GuestSnapshot, now_s: float, safeties: Safeties) -> Cooperation:
    """Compare actual with the target: progress, target reached, moved by another controller, RSS."""
    if guest.size != state.size:  # memory was plugged or unplugged: actual and QEMU's target follow
        state = replace(state, size=guest.size, settled=None, foreign_until_s=0.0)
    if guest.target != state.target:
        rss_check = state.rss_check
        if (
            rss_check is None  # a new check would postpone the pending one indefinitely
            and guest.target is not None
            and guest.actual - guest.target >= RSS_CHECK_FROM
            and guest.rss is not None
        ):
            rss_check = (now_s, guest.actual, guest.rss)
        state = replace(
            state,
            target=guest.target,
            asked_at_s=now_s,
            progress_at_s=now_s,
            best=guest.actual,
            settled=None,
            rss_check=rss_check,
        )
    elif guest.target is not None:
        near, before = abs(guest.actual - guest.target), abs(state.best - guest.target)
        if near <= before - PROGRESS:
            state = replace(
                state,
                best=guest.actual,
                progress_at_s=now_s,
                stuck_since_s=None,
                stuck_count=0,
                backs_off_until_s=0.0,
                stuck_growing=False,
            )
        if is_reached(guest.actual, guest.target, guest.size):
            if state.settled != guest.actual:
                state = replace(state, settled=guest.actual)
        elif safeties.foreign_control and _is_foreign(state, guest):
            state = replace(state, foreign_until_s=now_s + FOREIGN_FOR_S, settled=guest.actual)
    if safeties.contradiction:
        state = _checked_by_rss(state, guest, now_s)
        if is_refuted(guest) != (state.refuted_since_s is not None):
            state = replace(state, refuted_since_s=now_s if is_refuted(guest) else None)
    return state


def _is_foreign(state: Cooperation, guest: GuestSnapshot) -> bool:
    """Tell whether actual moved away from a target that it had reached, other than by deflate-on-oom."""
    if state.settled is None or guest.target is None:
        return False
    rises_by_itself = guest.deflate_on_oom and guest.actual > state.settled
    return not rises_by_itself and not is_reached(guest.actual, state.settled, guest.size)


def _checked_by_rss(state: Cooperation, guest: GuestSnapshot, now_s: float) -> Cooperation:
    """Set ``untrusted`` if RSS did not fall after the guest gave memory; clear it when RSS fits actual."""
    if guest.rss is None or not guest.rss_is_complete:
        is_clear = state.rss_check is None and not state.untrusted
        return state if is_clear else replace(state, rss_check=None, untrusted=False)
    over = guest.rss - QEMU_OVERHEAD - guest.actual
    if state.untrusted and over <= 0:
        return replace(state, untrusted=False)
    if state.rss_check is None:
        return state
    at_s, actual, rss = state.rss_check
    if now_s - at_s < RSS_FOLLOWS_WITHIN_S:
        return state
    given, freed = actual - guest.actual, rss - guest.rss
    contradicted = given >= RSS_CHECK_FROM and freed < RSS_FOLLOWS * given and over > 0
    return replace(state, rss_check=None, untrusted=state.untrusted or contradicted)


def _charge_by_rss(guest: GuestSnapshot) -> int | None:
    return None if guest.rss is None else max(guest.charge, min(guest.size, guest.rss - QEMU_OVERHEAD))


def _makes_no_progress(state: Cooperation, guest: GuestSnapshot, now_s: float) -> bool:
    """Tell whether the balloon has not reached its target and does not move.

    A guest that had reached a target and is below it now was moved by another controller."""
    if guest.target is None or (guest.target > guest.actual and state.settled is not None):
        return False
    return (
        not is_reached(guest.actual, guest.target, guest.size)
        and now_s - state.progress_at_s >= STUCK_AFTER_S
    )


def _stuck(state: Cooperation, guest: GuestSnapshot, now_s: float) -> tuple[Cooperation, Judgement]:
    grows = guest.target is not None and guest.target > guest.actual
    available = guest.sample.available if guest.sample else None
    part = None if grows or available is None else available / max(1, guest.actual)
    if part is not None and part < NOTHING_LEFT:
        return replace(state, progress_at_s=now_s), Judgement("nothing-left", may_shrink=False, set_back=True)
    state = replace(
        state,
        stuck_since_s=state.progress_at_s if state.stuck_since_s is None else state.stuck_since_s,
        stuck_count=min(state.stuck_count + 1, 10),
        backs_off_until_s=now_s + min(LAST_BACK_OFF_S, FIRST_BACK_OFF_S * 2**state.stuck_count),
        progress_at_s=now_s,
        stuck_growing=grows,
    )
    if part is not None and part > CONTRADICTED:
        return replace(state, contradicted_until_s=now_s + CONTRADICTED_FOR_S), _CONTRADICTED
    word = _word(state, now_s)
    return state, Judgement("stuck", may_shrink=False, set_back=True, health=word)


def _backing_off(state: Cooperation, now_s: float) -> Judgement:
    word = _word(state, now_s)
    if state.backs_off_until_s > now_s:
        return Judgement("backs-off", may_shrink=False, health=word)
    return Judgement("probe", probe=True, health=word)


def _word(state: Cooperation, now_s: float) -> str:
    stuck_s = now_s - (state.stuck_since_s if state.stuck_since_s is not None else now_s)
    return "uncooperative" if stuck_s > UNCOOPERATIVE_AFTER_S else "stuck"
