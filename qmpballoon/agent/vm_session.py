"""What one session tells of a VM: all of it once, then what changes. It ends with the session."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

from qmpballoon.errors import NoBalloon, QmpError
from qmpballoon.policy.snapshot import Reading
from qmpballoon.procfs import ResidentMemory, hidden_of
from qmpballoon.qmp import balloon
from qmpballoon.qmp.client import Session
from qmpballoon.units import MIB

FRESH_WITHIN_S: Final = 0.06  # one fast look waits no longer for its sample
RESET_SHOWS_WITHIN_S: Final = 0.5  # DRIVER_OK went 30 ms after RESET, and came back after 2.7 s
LATE_EVENTS_S: Final = 1.5  # BALLOON_CHANGE comes up to a second late; no guest's driver is back so soon
_LITTLE: Final = 8 * MIB
_STEADY: Final = 2 * MIB  # actual that moved no more than this around a sample belongs to it

_DEFLATE_ON_OOM: Final = "VIRTIO_BALLOON_F_DEFLATE_ON_OOM"


class VmSession:
    """A VM over one session. ``None`` is not known; ``actual`` lies while ``driver_up`` is not true."""

    def __init__(self, session: Session, *, stats_interval_s: int, clock: Callable[[], float]) -> None:
        self.session = session
        self.run_state: str | None = None
        self.size: int | None = None
        self.actual: int | None = None
        self.migrating = False
        self.device: balloon.BalloonDevice | None = None
        self.driver: balloon.DriverStatus | None = None  # None: this QEMU is not asked
        self.offers_deflate_on_oom = False
        self.driver_since_s = clock()  # since when it is up, or could have been
        self.sampler: balloon.Sampler | None = None
        self.reading: Reading | None = None
        self.rss: int | None = None
        self.rss_tells = True  # False: much of its memory is in huge pages or swapped out
        self.stats_interval_s = stats_interval_s  # may change while it lasts
        self._clock = clock
        self._resident = ResidentMemory(session.pid) if session.pid else None
        self._doubts_driver_until_s = float("-inf")  # QEMU says "up" for some time after a reset
        self._unseen: int | None = None  # of actual, by the guest's total: constant while it runs
        self._counts_moves_from_s = float("-inf")  # until then what comes may be from before a reset
        self._size_at_actual: int | None = None  # ``size`` when ``actual`` was taken
        self._has_moved = False  # the balloon, since we came or the guest was reset: a driver moves it

    @property
    def driver_up(self) -> bool:
        """Tell whether the guest's driver is known to be up."""
        if self.driver is not None:
            return self.driver.up
        return self._has_moved or (self.sampler is not None and self.sampler.sample is not None)

    @property
    def deflates_on_oom(self) -> bool:
        """Tell whether the guest takes memory back by itself when it runs out.

        Negotiated, where QEMU tells; else offered: every Linux since 3.19 takes what is offered.
        """
        if self.driver is None:
            return self.offers_deflate_on_oom and self.driver_up
        return _DEFLATE_ON_OOM in self.driver.features

    @property
    def reports(self) -> bool:
        """Tell whether the driver, if it is up, took the statistics queue."""
        return self.driver is None or not self.driver.up or self.driver.has_statistics

    async def _find_device(self) -> None:
        """Look for the balloon, which may also be plugged later, and arm its statistics."""
        try:
            self.device = await balloon.find_balloon(self.session)
        except NoBalloon:
            return
        self.offers_deflate_on_oom = await balloon.offers_deflate_on_oom(self.session, self.device)
        sampler = balloon.Sampler(self.session, self.device, clock=self._clock)
        with suppress(QmpError):  # a device without statistics
            await sampler.start(self.stats_interval_s)
            self.sampler = sampler

    async def look(self) -> None:
        """Ask for everything that an event may have altered, or that no event tells."""
        self.run_state = await balloon.query_run_state(self.session)
        self.size = await balloon.memory_size(self.session)
        self.migrating = await balloon.is_migrating(self.session)
        if self.device is None:
            await self._find_device()
        if self.device is not None:
            try:
                await self.look_at_actual()
            except QmpError:
                self.device = self.sampler = self.driver = self.actual = None  # unplugged
                return
            await self.look_at_driver()
        self.look_at_process()
        self.rss_tells = not self.session.pid or hidden_of(self.session.pid) <= _LITTLE

    async def look_at_actual(self) -> None:
        """Ask for ``actual``: events are throttled to one a second."""
        self.take_actual(await balloon.query_actual(self.session))

    def take_actual(self, actual: int) -> None:
        """Take ``actual`` as QEMU told it; where it changed by more than plugged memory, a driver is up."""
        before, self.actual = self.actual, actual
        same_memory = before is not None and self.size == self._size_at_actual
        if same_memory and before != actual and self._clock() >= self._counts_moves_from_s:
            self._has_moved = True
        self._size_at_actual = self.size

    def lost_driver(self) -> None:
        """Take the driver for gone, where QEMU is not asked: it emptied the balloon against its target."""
        if self.driver is None:
            self._forget_figures()

    async def look_at_driver(self) -> None:
        """Ask whether the guest's driver is up."""
        if self.device is None:
            return
        was_up = self.driver_up
        driver = await balloon.query_driver(self.session, self.device)
        if driver is not None and driver.up and self._clock() < self._doubts_driver_until_s:
            return
        self.driver = driver
        if self.driver_up and not was_up:
            self.driver_since_s = self._clock()
        if was_up and not self.driver_up:
            self._forget_figures()

    def look_at_process(self) -> None:
        """Read the resident memory of the QEMU process."""
        self.rss = self._resident.read() if self._resident else None

    def close(self) -> None:
        """Let go of the QEMU process: the session is over."""
        if self._resident:
            self._resident.close()

    async def sample(self, *, fast: bool) -> bool:
        """Take the guest's figures, asked for now if ``fast``; return whether there are new ones.

        What ``actual`` was at their moment is taken along: the actual before and after, if it stood
        still; else, where the guest's total shrinks with the balloon, from that.
        """
        sampler = self.sampler
        if sampler is None:
            return False
        moves_unasked = fast or self.deflates_on_oom  # else events tell in time
        if moves_unasked:
            await self.look_at_actual()
        before = self.actual
        await sampler.change_interval(self.stats_interval_s)
        if fast:
            await sampler.refresh(timeout_s=FRESH_WITHIN_S)
        else:
            await sampler.poll()
        if moves_unasked:
            await self.look_at_actual()
        sample = sampler.sample
        if sample is None or (self.reading is not None and sample.seen_at_s == self.reading.seen_at_s):
            return False
        self.reading = Reading(
            sample.figures, sample.seen_at_s, self._actual_of(sample.figures.total, before)
        )
        return True

    def _actual_of(self, total: int | None, before: int | None) -> int | None:
        if before is None or self.actual is None:
            return None
        shrinks = not self.deflates_on_oom and (self.driver is not None or not self.offers_deflate_on_oom)
        if abs(self.actual - before) <= _STEADY:
            if shrinks and total is not None:
                self._unseen = self.actual - total
            return self.actual
        return total + self._unseen if shrinks and total is not None and self._unseen is not None else None

    def was_reset(self) -> None:
        """Forget what was true of the guest before its reset; its figures stand until the driver is back."""
        self.driver_since_s = self._clock()
        self._doubts_driver_until_s = self._clock() + RESET_SHOWS_WITHIN_S
        self._counts_moves_from_s = self._clock() + LATE_EVENTS_S
        if self.driver is not None:
            self.driver = balloon.DriverStatus(up=False, features=frozenset())
        self._forget_figures()

    def _forget_figures(self) -> None:
        """Drop what the driver told: it is gone."""
        if self.sampler is not None:
            self.sampler.forget()
        self.reading = None
        self._unseen = None
        self._has_moved = False
