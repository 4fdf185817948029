"""The state of a VM as read over one session: everything once, then what changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from qmpballoon.agent.usual_poll import UsualPoll
from qmpballoon.errors import NoBalloon, QmpError
from qmpballoon.model.facts import Seen
from qmpballoon.model.records import Sample
from qmpballoon.model.tolerance import is_steady
from qmpballoon.procfs import ResidentMemory
from qmpballoon.qmp import balloon
from qmpballoon.qmp.asked import Asked, returned
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.resizer import DriverState, Resizer
from qmpballoon.qmp.statistics import Sampler
from qmpballoon.units import MIB

FRESH_WITHIN_S: Final = 0.06  # how long a turn waits for its sample
RESET_SHOWS_WITHIN_S: Final = 0.5  # DRIVER_OK went 30 ms after RESET, and came back after 2.7 s
LATE_EVENTS_S: Final = 1.5  # BALLOON_CHANGE comes up to a second late; no guest's driver is back so soon
_LITTLE: Final = 8 * MIB
_FIRST_LOOK_HOLDS_S: Final = 1.0
_ASKED: Final = (balloon.RUN_STATE, balloon.MEMORY, balloon.MIGRATION)

_DOWN: Final = DriverState(up=False)


@dataclass(slots=True)
class FirstLook:
    """The answers to what a `VmSession` asks at first, where they were asked for with something else."""

    answers: Sequence[object]
    events: int  # that had come before
    at_s: float  # monotonic

    @property
    def memory(self) -> object:
        """The answer to query-memory-size-summary."""
        return self.answers[_ASKED.index(balloon.MEMORY)]

    def take(self, session: Session) -> Sequence[object]:
        """Return the answers, once; none if an event has come since, or they are old."""
        answers, self.answers = self.answers, ()
        is_new = time.monotonic() - self.at_s < _FIRST_LOOK_HOLDS_S
        return answers if is_new and session.events_taken == self.events else ()


async def look_first(session: Session, *others: Asked) -> tuple[FirstLook, list[object]]:
    """Ask what a `VmSession` asks at first, and ``others``; return the answers of both.

    Raises:
        ConnectionLost: the session ended meanwhile.
    """
    events, at_s = session.events_taken, time.monotonic()
    answers = await session.request_all(*others, *_ASKED, balloon.DEVICES_WITH_ID)
    return FirstLook(answers[len(others) :], events, at_s), answers[: len(others)]


@dataclass(slots=True)
class _Device:
    """The VM's resizer, and the statistics that its guest sends through it."""

    path: str  # in QEMU's object tree
    resizer: Resizer
    offers_deflate_on_oom: bool
    sampler: Sampler | None = None  # None: a device without statistics
    usual_poll: UsualPoll | None = None


class _Driver:
    """Whether the guest's driver is up: by QEMU's word, or where it is not asked by what moves.

    ``state`` is QEMU's word, None where it is not asked.
    """

    def __init__(self, now_s: float) -> None:
        self.state: DriverState | None = None
        self.since_s = now_s  # since when it is up, or could have been
        self.has_moved = False  # the balloon, since we came or the guest was reset: a driver moves it
        self._doubted_until_s = float("-inf")  # QEMU says "up" for some time after a reset
        self._moves_count_from_s = float("-inf")  # what comes before that may be from before a reset

    def told(self, state: DriverState | None, now_s: float) -> None:
        """Note the driver state that QEMU reports."""
        if state is None or not state.up or now_s >= self._doubted_until_s:
            self.state = state

    def moved(self, now_s: float) -> None:
        """Note that the balloon moved."""
        if now_s >= self._moves_count_from_s:
            if not self.has_moved:
                self.since_s = now_s
            self.has_moved = True

    def was_reset(self, now_s: float) -> None:
        """Note that the guest was reset: its driver is gone."""
        self.since_s = now_s
        self._doubted_until_s = now_s + RESET_SHOWS_WITHIN_S
        self._moves_count_from_s = now_s + LATE_EVENTS_S
        if self.state is not None:
            self.state = _DOWN


class VmSession:
    """A VM over one session. ``None`` is not known; ``actual`` is untrue while ``driver_up`` is False."""

    def __init__(
        self,
        session: Session,
        pid: int | None,
        *,
        stats_interval_s: int,
        clock: Callable[[], float],
        first: FirstLook | None = None,
    ) -> None:
        self.session = session
        self.run_state: str | None = None
        self.size: int | None = None
        self.actual: int | None = None
        self.migrating = False
        self.sample: Sample | None = None  # with what actual was at its moment
        self.rss: int | None = None
        self.stats_interval_s = stats_interval_s  # may change while it lasts
        self._rss_is_complete = True
        self._device: _Device | None = None
        self._driver = _Driver(clock())
        self._clock = clock
        self._first = first
        self._resident = ResidentMemory(pid) if pid else None
        self._size_at_actual: int | None = None  # ``size`` when ``actual`` was taken
        self._unseen: int | None = None  # of actual, by the guest's total: constant while it runs

    # ── what is known ────────────────────────────────────────────────────────────────────────────

    @property
    def resizer(self) -> Resizer | None:
        """The device that changes the guest's size; None: it has none."""
        return self._device.resizer if self._device else None

    @property
    def driver_up(self) -> bool:
        """Tell whether the guest's driver is known to be up."""
        if self._driver.state is not None:
            return self._driver.state.up
        return self._driver.has_moved or self.sample is not None

    @property
    def deflates_on_oom(self) -> bool:
        """Tell whether the guest takes memory back by itself when it runs out.

        Negotiated, where QEMU tells; else offered: every Linux since 3.19 takes what is offered.
        """
        if self._driver.state is not None:
            return self._driver.state.deflates_on_oom
        return self._device is not None and self._device.offers_deflate_on_oom and self.driver_up

    @property
    def seen(self) -> Seen:
        """Everything that is known, frozen."""
        state, sampler = self._driver.state, self._device.sampler if self._device else None
        return Seen(
            run_state=self.run_state,
            migrating=self.migrating,
            has_balloon=self._device is not None,
            actual=self.actual,
            driver=state.up if state else None,
            driver_up=self.driver_up,
            driver_since_s=self._driver.since_s,
            driver_reports=state is None or not state.up or state.reports,
            deflates_on_oom=self.deflates_on_oom,
            ever_reported=sampler is not None and sampler.ever_reported,
            sample=self.sample,
            rss_is_complete=self._rss_is_complete,
        )

    # ── looks ────────────────────────────────────────────────────────────────────────────────────

    async def look(self) -> None:
        """Query everything that an event may have changed, or that no event reports."""
        session, is_device_known = self.session, self._device is not None
        asked = _ASKED if is_device_known else (*_ASKED, balloon.DEVICES_WITH_ID)
        first = self._first.take(session) if self._first is not None else ()
        answers = first or await session.request_all(*asked)
        run_state, memory, migration, *listed = (returned(answer) for answer in answers)
        self.run_state = balloon.parse_run_state(session, run_state)
        self.size = await balloon.memory_size(session, memory)
        self.migrating = balloon.parse_migrating(session, migration)
        try:
            if not is_device_known:
                await self._find_device(listed[0])
            elif (device := self._device) is not None:
                looked = await device.resizer.look()
                if device is self._device:  # else it was unplugged meanwhile
                    self._looked(*looked)
        except QmpError:  # unplugged
            self._forget_device()
            return
        self.look_at_process(closely=True)

    async def _find_device(self, listed: object) -> None:
        """Look for the balloon, which may also be plugged later, ask it everything, and arm its statistics.

        Raises:
            QmpError: it was unplugged meanwhile.
        """
        try:
            found = await balloon.find_balloon(self.session, listed)
        except NoBalloon:
            return
        resizer = balloon.VirtioBalloon(self.session, found)
        sampler = Sampler(self.session, found, clock=self._clock)
        interval_s = self.stats_interval_s
        offers, statistics, interval, armed, *looked = await self.session.request_all(
            balloon.asked_deflate_on_oom(found),
            *sampler.asked_to_start(interval_s),
            *resizer.asked_to_look(),
        )
        self._looked(*resizer.looked(looked))
        device = _Device(found.path, resizer, offers is True)
        with suppress(QmpError):  # a device without statistics
            await sampler.started((statistics, interval, armed), interval_s)
            device.sampler = sampler
            device.usual_poll = UsualPoll(self.session, found, sampler, self)
        self._device = device  # complete, or not at all: events come meanwhile, and a look may be cancelled

    def _looked(self, actual: int, driver: DriverState | None) -> None:
        self.take_actual(actual)
        self._take_driver(driver)

    async def look_at_actual(self) -> None:
        """Ask for ``actual``: events are throttled to one a second."""
        if (device := self._device) is not None:
            actual = await device.resizer.actual()
            if device is self._device:
                self.take_actual(actual)

    def take_actual(self, actual: int) -> None:
        """Take ``actual`` as QEMU told it; where it changed and no memory was plugged, a driver is up."""
        before, self.actual = self.actual, actual
        if before is not None and before != actual and self.size == self._size_at_actual:
            self._driver.moved(self._clock())
        self._size_at_actual = self.size

    async def look_at_driver(self) -> None:
        """Ask whether the guest's driver is up."""
        if (device := self._device) is not None:
            state = await device.resizer.driver()
            if device is self._device:
                self._take_driver(state)

    def _take_driver(self, state: DriverState | None) -> None:
        was_up = self.driver_up
        self._driver.told(state, self._clock())
        if self.driver_up and not was_up:
            self._driver.since_s = self._clock()
        if was_up and not self.driver_up:
            self._forget_samples()

    def look_at_process(self, *, closely: bool = False) -> None:
        """Read the resident memory of the QEMU process; ``closely``: also how much of it is swapped out."""
        if self._resident is None:
            return
        if closely:
            self.rss, swapped = self._resident.look_closely()
            self._rss_is_complete = swapped <= _LITTLE
        else:
            self.rss = self._resident.read()

    async def rearm(self) -> None:
        """Set the polling interval again, which another client may have changed."""
        if self._device is not None and self._device.sampler is not None:
            await self._device.sampler.rearm()

    def close(self) -> None:
        """Let go of the QEMU process: the session is over."""
        if self._resident:
            self._resident.close()

    async def take_sample(self, *, ask: bool, wait_s: float = FRESH_WITHIN_S) -> bool:
        """Take the guest's figures, asked for now with ``ask``; return whether there are new ones.

        The sample also gets the ``actual`` of its moment: the value read before and after it, if that did
        not change; otherwise it is derived from the guest's total, where that shrinks with the balloon.
        """
        sampler = self._device.sampler if self._device else None
        if sampler is None:
            return False
        moves_unasked = ask or self.deflates_on_oom  # otherwise events report it in time
        if moves_unasked:
            await self.look_at_actual()
        before = self.actual
        await sampler.change_interval(self.stats_interval_s)
        if ask:
            await sampler.refresh(timeout_s=wait_s)
        else:
            await sampler.poll()
        if moves_unasked:
            await self.look_at_actual()
        return self.take_newest(before)

    def take_newest(self, actual_before: int | None) -> bool:
        """Take the newest sample, if it was not taken yet; return whether it was new."""
        found = self._device.sampler.sample if self._device and self._device.sampler else None
        if found is None or (self.sample is not None and found.seen_at_s == self.sample.seen_at_s):
            return False
        actual = self._actual_of(found.stats.total, actual_before)
        last = self.sample
        if last is not None and last.actual == actual and last.stats.has_sizes_of(found.stats):
            last.seen_again(found.stats, found.seen_at_s)
        else:
            self.sample = Sample(found.stats, found.seen_at_s, actual)
        return True

    # ── the usual poll ───────────────────────────────────────────────────────────────────────────

    @property
    def usual_poll(self) -> UsualPoll | None:
        """The poll of a calm VM; None: it lacks what it needs."""
        usual = self._device.usual_poll if self._device else None
        return usual if usual is not None and usual.is_ready else None

    @property
    def is_first_sample_awaited(self) -> bool:
        """Tell whether the guest was just asked for its first sample."""
        sampler = self._device.sampler if self._device else None
        return sampler is not None and sampler.is_first_awaited

    def known(self, command: str) -> object:
        """Return what is known of what a command of the usual poll reads."""
        match command:
            case "query-status":
                return self.run_state
            case "query-migrate":
                return self.migrating
            case "query-memory-size-summary":
                return self.size, False  # with memory that is plugged everything is asked for
            case _:
                return self._driver.state

    def _actual_of(self, total: int | None, before: int | None) -> int | None:
        if before is None or self.actual is None:
            return None
        offered = self._device is not None and self._device.offers_deflate_on_oom
        shrinks = not self.deflates_on_oom and (self._driver.state is not None or not offered)
        if is_steady(before, self.actual):
            if shrinks and total is not None:
                self._unseen = self.actual - total
            return self.actual
        return total + self._unseen if shrinks and total is not None and self._unseen is not None else None

    # ── what ends the figures ────────────────────────────────────────────────────────────────────

    def was_reset(self) -> None:
        """Forget the state from before the reset; QEMU returns old figures until the driver is back."""
        self._driver.was_reset(self._clock())
        self._forget_samples()

    def was_unplugged(self, path: object) -> bool:
        """Note that the device at this QOM path was unplugged; return whether it was the balloon."""
        if self._device is None or path != self._device.path:
            return False
        self._forget_device()
        return True

    def emptied_against_target(self) -> None:
        """Treat the driver as gone where QEMU is not asked: unloading it empties the balloon."""
        if self._driver.state is None:
            self._forget_samples()

    def age_sample(self, seconds: float) -> None:
        """Add to the age of the sample, for time that the monotonic clock did not count."""
        sampler = self._device.sampler if self._device else None
        if sampler is not None and sampler.sample is not None:
            sampler.sample = replace(sampler.sample, seen_at_s=sampler.sample.seen_at_s - seconds)
        if self.sample is not None:
            self.sample = replace(self.sample, seen_at_s=self.sample.seen_at_s - seconds)

    def _forget_device(self) -> None:
        self._forget_samples()
        self._device = self.actual = None
        self._driver = _Driver(self._clock())

    def _forget_samples(self) -> None:
        """Drop everything that the driver reported: it is gone."""
        if self._device is not None and self._device.sampler is not None:
            self._device.sampler.forget()
        self.sample = None
        self._unseen = None
        self._driver.has_moved = False
