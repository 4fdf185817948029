"""The poll of a calm VM: its requests are made once, and a reply that is the same as before is not decoded.

What is not usual is left to `VmSession`, which asks for everything again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

from qmpballoon.errors import QmpError
from qmpballoon.model.records import GuestStats
from qmpballoon.qmp import balloon
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.commands import DRIVER_STATUS, may_be_sent
from qmpballoon.qmp.repeated import Repeated


class Polled(Protocol):
    """Takes what a poll finds. Every call must return at once."""

    def known(self, command: str) -> object:
        """Return what is known of what a command reads, in the form of its parser in `qmp.balloon`."""

    def actual_polled(self, actual: int) -> None:
        """Take ``actual`` in bytes."""

    def statistics_polled(self, last_update: int, stats: GuestStats, *, asked_at: int) -> None:
        """Take the guest's statistics; the poll is over. ``asked_at`` is what ``Sampler.generation`` was."""

    def statistics_refused(self) -> None:
        """Note that there are no statistics any more; the poll is over."""

    def something_changed(self) -> None:
        """Note that everything has to be asked for again."""


_Other = tuple[str, Mapping[str, object] | None, Callable[[object], object]]


class UsualPoll:
    """The requests of one VM's poll over one session."""

    def __init__(
        self, session: Session, device: balloon.BalloonDevice, sampler: balloon.Sampler, polled: Polled
    ) -> None:
        self._session = session
        self._sampler = sampler
        self._rest = [
            session.repeated(name, arguments, _Rest(polled, read, partial(polled.known, name)))
            for name, arguments, read in self._others(device)
        ]
        self._device = device
        self._polled = polled
        self._interval_s = 0
        self._arm: list[Repeated] = []
        self._statistics_sink = _Statistics(session, polled)
        statistics = session.repeated(
            "qom-get",
            {"path": device.path, "property": "guest-stats"},
            self._statistics_sink,
            volatile="last-update",
        )
        actual = session.repeated("query-balloon", None, _Actual(session, polled))
        self._requests = {False: (statistics,), True: (actual, statistics)}  # by whether actual is asked for

    def _others(self, device: balloon.BalloonDevice) -> Iterator[_Other]:
        """Yield the other commands, with their arguments and what reads their replies."""
        session = self._session
        yield "query-status", None, partial(balloon.parse_run_state, session)
        yield "query-migrate", None, partial(balloon.parse_migrating, session)
        yield "query-memory-size-summary", None, partial(balloon.parse_memory_summary, session)
        if may_be_sent(DRIVER_STATUS, session.version):
            arguments = {"path": device.backend}
            yield DRIVER_STATUS, arguments, lambda answer: balloon.parse_driver(answer).state

    def arm(self, interval_s: int) -> None:
        """Have QEMU ask the guest for statistics now, and every ``interval_s`` from then on."""
        if interval_s != self._interval_s:
            self._interval_s = interval_s
            self._arm = [self._setting(0), self._setting(interval_s)]
        self._session.repeat(*self._arm)

    def _setting(self, interval_s: int) -> Repeated:
        arguments = {"path": self._device.path, "property": balloon.INTERVAL, "value": interval_s}
        return self._session.repeated("qom-set", arguments, _Set(self._polled))

    def ask(self, *, actual: bool, rest: bool) -> None:
        """Ask for the guest's statistics, and before for ``actual`` and for the rest where wanted."""
        self._statistics_sink.asked_at = self._sampler.generation
        if rest:
            self._session.repeat(*self._rest, *self._requests[True])
        else:
            self._session.repeat(*self._requests[actual])


class _Rest:
    """What mostly stays as it is: the value that is read from a reply is compared with what is known."""

    __slots__ = ("_known", "_polled", "_read", "_value")

    def __init__(self, polled: Polled, read: Callable[[object], object], known: Callable[[], object]) -> None:
        self._polled = polled
        self._read = read
        self._known = known
        self._value: object = None

    def same(self, number: int | None) -> None:
        """The same as at the last poll; something else may have told another value since."""
        if self._value != self._known():
            self._polled.something_changed()

    def changed(self, result: object) -> None:
        """Another reply, or the first."""
        self._value = self._read(result)
        self.same(None)

    def refused(self, error: QmpError) -> None:
        """It was not refused before."""
        self._polled.something_changed()


class _Set:
    """What has no result; the first reply is not different from the others."""

    __slots__ = ("_polled",)

    def __init__(self, polled: Polled) -> None:
        self._polled = polled

    def same(self, number: int | None) -> None:
        """It was set."""

    def changed(self, result: object) -> None:
        """It was set."""

    def refused(self, error: QmpError) -> None:
        """The balloon was unplugged."""
        self._polled.something_changed()


class _Actual:
    __slots__ = ("_polled", "_session", "_value")

    def __init__(self, session: Session, polled: Polled) -> None:
        self._session = session
        self._polled = polled
        self._value = 0

    def same(self, number: int | None) -> None:
        """The same as at the last poll; an event may have told another value since."""
        self._polled.actual_polled(self._value)

    def changed(self, result: object) -> None:
        """Another value."""
        self._value = balloon.parse_actual(self._session, result)
        self._polled.actual_polled(self._value)

    def refused(self, error: QmpError) -> None:
        """The balloon was unplugged."""
        self._polled.something_changed()


class _Statistics:
    __slots__ = ("_last_update", "_polled", "_session", "_stats", "asked_at")

    def __init__(self, session: Session, polled: Polled) -> None:
        self.asked_at = 0
        self._session = session
        self._polled = polled
        self._stats = GuestStats()
        self._last_update = 0

    def same(self, number: int | None) -> None:
        """The same figures, perhaps of another second."""
        self._last_update = self._last_update if number is None else number
        self._polled.statistics_polled(self._last_update, self._stats, asked_at=self.asked_at)

    def changed(self, result: object) -> None:
        """Other figures."""
        self._last_update, self._stats = balloon.parse_statistics(self._session, result)
        self._polled.statistics_polled(self._last_update, self._stats, asked_at=self.asked_at)

    def refused(self, error: QmpError) -> None:
        """The balloon was unplugged."""
        self._polled.statistics_refused()
