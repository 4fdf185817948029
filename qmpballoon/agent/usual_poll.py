"""The poll of a VM whose guest reports: its requests are made once, and a reply as before is not decoded.

What is not usual is left to `VmSession`, which asks for everything again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

from qmpballoon.errors import QmpError
from qmpballoon.model.records import GuestStats, Sample
from qmpballoon.qmp import balloon
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.commands import DRIVER_STATUS, may_be_sent
from qmpballoon.qmp.repeated import Numbers, Repeated
from qmpballoon.qmp.statistics import INTERVAL, MINOR_FAULTS, Sampler, parse_statistics

REPORTS_WITHIN_S: Final = 0.01  # a guest that was asked mostly takes 3 ms, 9 at worst
MOST_LOOKS: Final = 3  # at the figures of a guest that was asked, if it is sampled at the short interval


class Polled(Protocol):
    """What a poll needs of the VM's state over its session. Every call must return at once."""

    actual: int | None
    sample: Sample | None
    stats_interval_s: int

    @property
    def deflates_on_oom(self) -> bool: ...  # noqa: D102

    def known(self, command: str) -> object:
        """Return what is known of what a command reads, in the form of its parser in `qmp.balloon`."""

    def take_actual(self, actual: int) -> None:
        """Take ``actual`` in bytes."""

    def take_newest(self, actual_before: int | None) -> bool:
        """Take the sampler's newest sample; return whether it is new."""

    def look_at_process(self, *, closely: bool) -> None:
        """Read what the kernel tells of the QEMU process."""


Done = Callable[[bool, bool, bool], None]
"""Called when a poll is over: is its sample new, is it the one before (seen again), and has everything to be
asked for again?"""

_Other = tuple[str, Mapping[str, object] | None, Callable[[object], object]]


class UsualPoll:
    """The poll of one VM over one session: its requests, and what is made of their replies."""

    def __init__(self, session: Session, device: balloon.BalloonDevice, sampler: Sampler, vm: Polled) -> None:
        self._session = session
        self._sampler = sampler
        self._vm = vm
        self._done: Done = _ignore
        self._actual_before = vm.actual  # at the poll before this one, or when the guest was asked
        self._looks_left = 0  # at what the guest answers, which was asked
        self._is_first_ask = True  # the sampler has just asked for the first sample
        self._has_changed = False
        self._rest = [
            session.repeated(name, arguments, _Rest(self, read, partial(vm.known, name)))
            for name, arguments, read in self._others(device)
        ]
        self._device = device
        self._interval_s = 0
        self._arm: list[Repeated] = []
        self._statistics_sink = _Statistics(session, self)
        statistics = session.repeated(
            "qom-get",
            {"path": device.path, "property": "guest-stats"},
            self._statistics_sink,
            volatile=("last-update", MINOR_FAULTS),
        )
        self._actual = session.repeated("query-balloon", None, _Actual(session, self))
        self._requests = {False: (statistics,), True: (self._actual, statistics)}  # by whether actual is read

    def _others(self, device: balloon.BalloonDevice) -> Iterator[_Other]:
        """Yield the other commands, with their arguments and what reads their replies."""
        session = self._session
        yield "query-status", None, partial(balloon.parse_run_state, session)
        yield "query-migrate", None, partial(balloon.parse_migrating, session)
        yield "query-memory-size-summary", None, partial(balloon.parse_memory_summary, session)
        if may_be_sent(DRIVER_STATUS, session.version):
            arguments = {"path": device.backend}
            yield DRIVER_STATUS, arguments, lambda answer: balloon.parse_driver(answer).state

    @property
    def is_ready(self) -> bool:
        """Tell whether QEMU asks the guest at the interval that is wanted."""
        return self._sampler.is_armed_with(self._vm.stats_interval_s)

    def poll(self, *, everything: bool, ask: bool, closely: bool, done: Done) -> bool:
        """Send the requests; ``done`` is called when the replies are there.

        With ``ask`` the guest is asked for figures first, and False is returned: call again in
        ``REPORTS_WITHIN_S``. That is left out if the sampler has just asked for the first ones. The sample
        gets ``actual`` if that is the same as at the poll before. With ``closely`` it is compared with
        ``actual`` when the guest was asked, because the balloon may move.
        """
        vm, was_asked = self._vm, False
        if ask and not self._looks_left:
            self._looks_left = MOST_LOOKS if closely else 1
            was_asked, self._is_first_ask = self._is_first_ask and self._sampler.is_first_awaited, False
            if not was_asked:
                arming = self._arming(vm.stats_interval_s)
                self._session.repeat(*((self._actual, *arming) if closely else arming))
                return False
        self._looks_left = max(0, self._looks_left - 1)
        self._has_changed = False
        self._done = done
        if not was_asked:  # else `actual` may have moved since
            self._actual_before = vm.actual
        self._statistics_sink.asked_at = self._sampler.generation
        if everything:
            self._session.repeat(*self._rest, *self._requests[True])
            vm.look_at_process(closely=True)
        else:
            self._session.repeat(*self._requests[ask or vm.deflates_on_oom])
        return True

    @property
    def is_unanswered(self) -> bool:
        """Tell whether a guest that was asked has not answered, and one more look may find its answer."""
        return self._looks_left > 0

    def actual_polled(self, actual: int) -> None:
        """Take ``actual`` in bytes."""
        self._vm.take_actual(actual)

    def statistics_polled(self, last_update: int, stats: GuestStats, *, asked_at: int) -> None:
        """Take the guest's statistics, the last reply; ``asked_at`` is what ``Sampler.generation`` was."""
        self._sampler.take(last_update, stats, asked_at=asked_at)
        self._vm.look_at_process(closely=False)
        before = self._vm.sample
        is_new = self._vm.take_newest(self._actual_before)
        if is_new:
            self._looks_left = 0
        self._done(is_new, self._vm.sample is before, self._has_changed)

    def statistics_refused(self) -> None:
        """End the poll: there are no statistics any more."""
        self._done(False, False, True)

    def something_changed(self) -> None:
        """Note that everything has to be asked for again."""
        self._has_changed = True

    def _arming(self, interval_s: int) -> Sequence[Repeated]:
        """Return what makes QEMU ask the guest now, and every ``interval_s`` from then on."""
        if interval_s != self._interval_s:
            self._interval_s = interval_s
            self._arm = [self._setting(0), self._setting(interval_s)]
        return self._arm

    def _setting(self, interval_s: int) -> Repeated:
        arguments = {"path": self._device.path, "property": INTERVAL, "value": interval_s}
        return self._session.repeated("qom-set", arguments, _Set(self))


def _ignore(is_new: bool, is_same: bool, has_changed: bool) -> None:
    pass


class _Rest:
    """What mostly stays as it is: the value that is read from a reply is compared with what is known."""

    __slots__ = ("_known", "_poll", "_read", "_value")

    def __init__(
        self, poll: UsualPoll, read: Callable[[object], object], known: Callable[[], object]
    ) -> None:
        self._poll = poll
        self._read = read
        self._known = known
        self._value: object = None

    def same(self, numbers: Numbers) -> None:
        """The same as at the last poll; something else may have told another value since."""
        if self._value != self._known():
            self._poll.something_changed()

    def changed(self, result: object) -> None:
        """Another reply, or the first."""
        self._value = self._read(result)
        self.same(())

    def refused(self, error: QmpError) -> None:
        """It was not refused before."""
        self._poll.something_changed()


class _Set:
    """What has no result; the first reply is not different from the others."""

    __slots__ = ("_poll",)

    def __init__(self, poll: UsualPoll) -> None:
        self._poll = poll

    def same(self, numbers: Numbers) -> None:
        """It was set."""

    def changed(self, result: object) -> None:
        """It was set."""

    def refused(self, error: QmpError) -> None:
        """The balloon was unplugged."""
        self._poll.something_changed()


class _Actual:
    __slots__ = ("_poll", "_session", "_value")

    def __init__(self, session: Session, poll: UsualPoll) -> None:
        self._session = session
        self._poll = poll
        self._value = 0

    def same(self, numbers: Numbers) -> None:
        """The same as at the last poll; an event may have told another value since."""
        self._poll.actual_polled(self._value)

    def changed(self, result: object) -> None:
        """Another value."""
        self._value = balloon.parse_actual(self._session, result)
        self._poll.actual_polled(self._value)

    def refused(self, error: QmpError) -> None:
        """The balloon was unplugged."""
        self._poll.something_changed()


class _Statistics:
    __slots__ = ("_last_update", "_poll", "_session", "_stats", "asked_at")

    def __init__(self, session: Session, poll: UsualPoll) -> None:
        self.asked_at = 0
        self._session = session
        self._poll = poll
        self._stats = GuestStats()
        self._last_update = 0

    def same(self, numbers: Numbers) -> None:
        """The same sizes, perhaps of another second."""
        last_update, minor_faults = numbers
        if last_update is not None:
            self._last_update = last_update
        if minor_faults != self._stats.minor_faults and minor_faults is not None:
            self._stats = self._stats.with_minor_faults(minor_faults)
        self._poll.statistics_polled(self._last_update, self._stats, asked_at=self.asked_at)

    def changed(self, result: object) -> None:
        """Other figures."""
        self._last_update, self._stats = parse_statistics(self._session, result)
        self._poll.statistics_polled(self._last_update, self._stats, asked_at=self.asked_at)

    def refused(self, error: QmpError) -> None:
        """The balloon was unplugged."""
        self._poll.statistics_refused()
