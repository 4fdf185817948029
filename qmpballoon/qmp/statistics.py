"""A guest's statistics, as its balloon's driver reports them: QEMU asks the guest, and keeps the last answer.

Facts about QEMU were observed on the wire with 7.2.22 and a Linux 6.1 guest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, Final

from qmpballoon.model.records import GuestStats, Sample
from qmpballoon.qmp.asked import Asked, returned
from qmpballoon.qmp.balloon import BalloonDevice, property_of
from qmpballoon.qmp.checked import fields_of, size_of
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.commands import QUEUE_STATUS, may_be_sent
from qmpballoon.units import MAX_SIZE

INTERVAL: Final = "guest-stats-polling-interval"
_STATISTICS_QUEUE: Final = 2  # after those to inflate and to deflate: virtio 1.2, 5.5.2

_FIRST_LOOK_AFTER_S: Final = 0.003  # fresh figures come after 3 ms, 9 at worst
_FIRST_WITHIN_S: Final = 1.0  # on a slow host
_ASK_AGAIN_AFTER_S: Final = (0.02, 0.02, 0.02, 0.3)  # first: the guest had not handed its buffer back

MINOR_FAULTS: Final = "stat-minor-faults"  # it mostly changes also in a guest at rest
_STATISTICS: Final = {
    "total": "stat-total-memory",
    "free": "stat-free-memory",
    "available": "stat-available-memory",
    "caches": "stat-disk-caches",
    "swap_in": "stat-swap-in",
    "swap_out": "stat-swap-out",
    "major_faults": "stat-major-faults",
    "minor_faults": MINOR_FAULTS,
    "hugetlb_allocs": "stat-htlb-pgalloc",
    "hugetlb_failures": "stat-htlb-pgfail",
    "oom_kills": "stat-oom-kills",
    "alloc_stalls": "stat-alloc-stalls",
    "async_scans": "stat-async-scans",
    "direct_scans": "stat-direct-scans",
    "async_reclaims": "stat-async-reclaims",
    "direct_reclaims": "stat-direct-reclaims",
}


async def polling_interval(session: Session, device: BalloonDevice) -> int:
    """Return how often QEMU asks the guest for statistics, in whole seconds; 0: never.

    Raises:
        QmpError: the device has no statistics (QEMU before 1.5).
        ConnectionLost: the session ended meanwhile.
    """
    return size_of(session, await session.request(*property_of(device, INTERVAL)))


async def set_polling_interval(session: Session, device: BalloonDevice, *intervals_s: int) -> None:
    """Set how often QEMU asks the guest for statistics, in whole seconds; errors as in `polling_interval`.

    Several intervals are set one after the other.
    """
    for answer in await session.request_all(*(interval_set(device, each_s) for each_s in intervals_s)):
        returned(answer)


def interval_set(device: BalloonDevice, interval_s: int) -> Asked:
    """Return the request that sets how often QEMU asks the guest for statistics."""
    return Asked("qom-set", {"path": device.path, "property": INTERVAL, "value": interval_s})


class Sampler:
    """Reads a guest's statistics and detects whether they are new.

    ``sample`` (without ``actual``) is the last one that changed on this connection. It is None until then,
    because the statistics found on connecting may be days old. A sample is new when its figures or QEMU's
    time stamp (whole seconds) changed.
    """

    def __init__(
        self, session: Session, device: BalloonDevice, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.sample: Sample | None = None
        self.found_s: int | None = None  # the interval found on connecting; None until it was read
        self._interval_s = 1  # wanted: whole seconds
        self._asked_at_s = float("-inf")  # when QEMU was last told to ask the guest
        self._armed_s: int | None = None  # set in QEMU, 0 is off; None while a change is under way
        self._session = session
        self._device = device
        self._statistics = property_of(device, "guest-stats")
        is_tried = may_be_sent(QUEUE_STATUS, session.version)
        where = {"path": device.backend, "queue": _STATISTICS_QUEUE}
        self._queue = (Asked(QUEUE_STATUS, where),) if is_tried else ()
        self._clock = clock
        self._last: tuple[int, GuestStats] | None = None
        self.generation = 0  # how often samples were discarded; reads from before that are not compared
        self._known_since = 0  # the ``generation`` at which ``_last`` was read

    @property
    def ever_reported(self) -> bool:
        """Tell whether the guest has reported since QEMU started and was not reset after that."""
        return self._last is not None and self._last[0] != 0 and not self.generation

    @property
    def is_first_awaited(self) -> bool:
        """Tell whether the guest was just asked for the first sample, which mostly comes within 3 ms."""
        return self.sample is None and self._clock() - self._asked_at_s < _FIRST_WITHIN_S

    async def start(self, interval_s: int) -> None:
        """Read the present statistics, then ask for a sample now and every ``interval_s``.

        Raises:
            QmpError: the device has no statistics (QEMU before 1.5).
            ConnectionLost: the session ended meanwhile.
        """
        # What was found is known before it is changed, so that `stop` can restore it whatever comes between.
        self._take_found(await self._session.request_all(*self._asked_first), interval_s)
        await self.rearm()

    def asked_to_start(self, interval_s: int) -> tuple[Asked, Asked, Asked]:
        """Return what `start` asks, all at once, for a caller that never calls `stop`."""
        self._asked_at_s = self._clock()
        return (*self._asked_first, interval_set(self._device, interval_s))

    async def started(self, answers: Sequence[object], interval_s: int) -> None:
        """Do what `start` does after the answers to `asked_to_start` came; the same errors."""
        *found, armed = answers
        self._take_found(found, interval_s)
        returned(armed)
        if self.found_s == 0:  # only then has QEMU asked the guest at once
            self._armed_s = interval_s
        else:
            await self.rearm()

    @property
    def _asked_first(self) -> tuple[Asked, Asked]:
        return self._statistics, property_of(self._device, INTERVAL)

    def _take_found(self, answers: Sequence[object], interval_s: int) -> None:
        statistics, interval = map(returned, answers)
        self._last = parse_statistics(self._session, statistics)
        self.found_s = size_of(self._session, interval)
        self._armed_s, self._interval_s = self.found_s, interval_s

    async def change_interval(self, interval_s: int) -> None:
        """Set the polling interval in whole seconds; nothing is sent if it is set already.

        A change that was cut off is made again.
        """
        if interval_s != self._interval_s or self._armed_s is None:
            self._interval_s = interval_s
            await self.rearm()

    async def stop(self) -> None:
        """Restore the polling interval that was found on connecting."""
        if self.found_s is not None and self.found_s != self._armed_s:
            await self._set_interval(self.found_s)

    def forget(self) -> None:
        """Drop the sample: the guest was reset, and QEMU returns its old figures until the driver is back.

        Figures that arrived before the reset and were not read yet count as old, too.
        """
        self.sample = None
        self.generation += 1

    async def poll(self) -> None:
        """Read the statistics once; new ones are then in ``sample``."""
        asked_at = self.generation
        self.take(*await self._read(), asked_at=asked_at)

    def take(self, last_update: int, stats: GuestStats, *, asked_at: int, is_known_new: bool = False) -> None:
        """Take statistics that were asked for when ``generation`` was ``asked_at``.

        ``is_known_new``: the guest has sent them since, whether or not they differ from the last.
        """
        if asked_at != self.generation:
            return  # requested before the guest was reset
        found = last_update, stats
        if found != self._last or is_known_new:
            self._last = found
            if asked_at == self._known_since:
                if self.sample is not None and self.sample.stats.has_sizes_of(stats):
                    self.sample.seen_again(stats, self._clock())
                else:
                    self.sample = Sample(stats, self._clock(), None)
        self._known_since = asked_at

    async def refresh(self, *, timeout_s: float) -> bool:
        """Ask the guest for figures at once and wait for them; return whether they arrived.

        Setting the interval to 0 and back makes QEMU ask now; the answer mostly takes 3 ms. If the figures of
        an idle guest do not change, the second time it is looked whether the guest has handed over a sample
        since. Where QEMU may not be asked that, they are known to be new at the next whole second only.
        """
        counted: int | None = None
        before_s = self.sample.seen_at_s if self.sample else None
        deadline_s = self._clock() + timeout_s
        for attempt, ask_again_after_s in enumerate(
            chain(_ASK_AGAIN_AFTER_S, repeat(_ASK_AGAIN_AFTER_S[-1]))
        ):
            if attempt == 1 and self._queue:
                counted = _handed_over((await self._session.request_all(*self._queue))[0])
            await self.rearm()
            again_s = min(self._clock() + ask_again_after_s, deadline_s)
            while True:
                await asyncio.sleep(max(_FIRST_LOOK_AFTER_S, ask_again_after_s / 5))
                await (self.poll() if counted is None else self._poll_with_queue(counted))
                if self.sample is not None and self.sample.seen_at_s != before_s:  # perhaps by another poll
                    return True
                if self._clock() >= again_s:
                    break
            if self._clock() >= deadline_s:
                break
        return False

    async def _poll_with_queue(self, counted: int) -> None:
        """Read the statistics once; they are new, too, if QEMU has taken more samples than ``counted``."""
        asked_at = self.generation
        queue, statistics = await self._session.request_all(*self._queue, self._statistics)
        self.take(
            *parse_statistics(self._session, returned(statistics)),
            asked_at=asked_at,
            is_known_new=_handed_over(queue) not in (counted, None),
        )

    async def rearm(self) -> None:
        """Set the interval, by way of 0: QEMU asks the guest now."""
        await self._set_interval(*(() if self._armed_s == 0 else (0,)), self._interval_s)

    async def _set_interval(self, *intervals_s: int) -> None:
        self._armed_s = None  # after a cancellation the interval in QEMU is unknown
        self._asked_at_s = self._clock()
        await set_polling_interval(self._session, self._device, *intervals_s)
        self._armed_s = intervals_s[-1]

    def is_armed_with(self, interval_s: int) -> bool:
        """Tell whether this interval is set in QEMU, as far as is known here."""
        return self._armed_s == self._interval_s == interval_s

    async def _read(self) -> tuple[int, GuestStats]:
        return parse_statistics(self._session, await self._session.request(*self._statistics))


def _handed_over(answer: object) -> int | None:
    """Return how many samples QEMU has taken from the guest's queue, modulo 2**16; None if not told."""
    count = answer.get("last-avail-idx") if isinstance(answer, dict) else None
    return count if isinstance(count, int) else None


def parse_statistics(session: Session, answer: object) -> tuple[int, GuestStats]:
    """Return ``last-update`` and the figures of the property ``guest-stats``.

    Raises:
        ConnectionLost: it is not of the documented form.
    """
    fields = fields_of(session, answer)
    return (
        size_of(session, fields.get("last-update")),
        parse_stats(fields_of(session, fields.get("stats"))),
    )


def parse_stats(stats: Mapping[str, object]) -> GuestStats:
    """Return a guest's figures; one that is not reported or impossible is None.

    QEMU prints an unreported statistic as 2**64 - 1.
    """
    figures: dict[str, Any] = {
        name: value if type(value := stats.get(key)) is int and 0 <= value <= MAX_SIZE else None
        for name, key in _STATISTICS.items()
    }
    return GuestStats(**figures)
