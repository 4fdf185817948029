"""The requests of a usual poll, and what is made of their replies: no socket, no clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from qmpballoon.agent.usual_poll import MOST_LOOKS, UsualPoll
from qmpballoon.model.records import Sample
from qmpballoon.qmp.asked import Asked
from qmpballoon.qmp.balloon import BalloonDevice
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.repeated import Outstanding, Repeated, Sink
from qmpballoon.qmp.statistics import MINOR_FAULTS, Sampler
from qmpballoon.units import MIB

DEVICE = BalloonDevice("/machine/peripheral/balloon0", "virtio-balloon-pci")
ASKED = ["qom-set 0", "qom-set 1"]
READ = ["query-balloon", "qom-get"]


class Monitor:
    """A QEMU's side of a session: it replies when the test says so."""

    path = "/run/a.qmp"
    version = "11.1.0"

    def __init__(self) -> None:
        self.actual = 512 * MIB
        self.available = 100 * MIB
        self.minor_faults = 40
        self.sent: list[str] = []  # since the test looked last
        self._outstanding = Outstanding()
        self._unanswered: list[Mapping[str, Any]] = []

    def repeated(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        sink: Sink,
        *,
        volatile: Sequence[str] = (),
    ) -> Repeated:
        return Repeated(f"{command} {arguments}", command, arguments, sink, volatile=volatile)

    def repeat(self, *requests: Repeated) -> None:
        for line in self._outstanding.add(requests, 0.0).splitlines():
            request = json.loads(line)
            self._unanswered.append(request)
            value = request.get("arguments", {}).get("value", "")
            self.sent.append(f"{request['execute']} {value}".strip())

    async def request_all(self, *asked: Asked) -> list[object]:
        return [{} for _ in asked]

    @property
    def statistics(self) -> dict[str, object]:
        stats = {"stat-available-memory": self.available, MINOR_FAULTS: self.minor_faults}
        return {"last-update": 7, "stats": stats}

    def reply(self) -> list[str]:
        """Reply to everything; return what was asked since the last time."""
        for request in self._unanswered:
            result: dict[str, object] = {}
            match request["execute"]:
                case "query-balloon":
                    result = {"actual": self.actual}
                case "qom-get":
                    result = self.statistics
            reply = {"return": result, "id": request["id"]}
            line = json.dumps(reply).encode()
            assert self._outstanding.takes_same(line) or self._outstanding.takes(line, reply)
        self._unanswered.clear()
        sent, self.sent = self.sent, []
        return sent


class Vm:
    """What the poll finds."""

    stats_interval_s = 1
    deflates_on_oom = False

    def __init__(self, sampler: Sampler) -> None:
        self.actual: int | None = 512 * MIB
        self.sample: Sample | None = None
        self.befores: list[int | None] = []
        self._sampler = sampler

    def known(self, command: str) -> object:
        return None

    def take_actual(self, actual: int) -> None:
        self.actual = actual

    def take_newest(self, actual_before: int | None) -> bool:
        self.befores.append(actual_before)
        before, self.sample = self.sample, self._sampler.sample
        return self.sample is not before

    def look_at_process(self, *, closely: bool) -> None:
        pass


class Setup:
    def __init__(self) -> None:
        self.monitor = Monitor()
        session = cast(Session, self.monitor)
        self.sampler = Sampler(session, DEVICE, clock=lambda: 100.0)
        self.vm = Vm(self.sampler)
        self.usual = UsualPoll(session, DEVICE, self.sampler, self.vm)
        self.done: list[bool] = []

    def poll(self, *, ask: bool, closely: bool = False) -> bool:
        def done(is_new: bool, is_same: bool, has_changed: bool) -> None:
            assert not has_changed
            self.done.append(is_new)

        return self.usual.poll(everything=False, ask=ask, closely=closely, done=done)


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_a_guest_that_is_not_asked_is_read_once(setup: Setup) -> None:
    assert setup.poll(ask=False)
    assert setup.monitor.reply() == ["qom-get"]
    assert setup.done == [True]
    assert not setup.usual.is_unanswered


def test_a_guest_that_is_asked_is_read_once_afterwards(setup: Setup) -> None:
    for _ in range(2):
        assert not setup.poll(ask=True)
        assert setup.monitor.reply() == ASKED
        assert setup.poll(ask=True)
        assert setup.monitor.reply() == READ
        assert not setup.usual.is_unanswered  # with the same figures, too
    assert setup.done == [True, False]


def test_actual_is_read_when_a_guest_is_asked_whose_balloon_may_move(setup: Setup) -> None:
    assert not setup.poll(ask=True, closely=True)
    setup.monitor.actual = 480 * MIB
    assert setup.monitor.reply() == ["query-balloon", *ASKED]
    assert setup.poll(ask=True, closely=True)
    setup.monitor.actual = 470 * MIB
    assert setup.monitor.reply() == READ
    assert setup.vm.befores == [480 * MIB]
    assert setup.vm.actual == 470 * MIB


def test_a_guest_that_only_counts_more_faults_is_the_same_but_for_them(setup: Setup) -> None:
    assert setup.poll(ask=False)
    setup.monitor.reply()
    before = setup.vm.sample
    setup.monitor.minor_faults = 55
    assert setup.poll(ask=False)
    setup.monitor.reply()
    assert setup.vm.sample is before is not None
    assert (before.stats.minor_faults, before.stats.available) == (55, 100 * MIB)


def test_an_answer_that_comes_late_is_looked_for_again(setup: Setup) -> None:
    setup.poll(ask=False)
    setup.monitor.reply()
    setup.poll(ask=True, closely=True)
    setup.monitor.reply()
    for _ in range(2):
        assert setup.poll(ask=True, closely=True)
        assert setup.monitor.reply() == READ  # it is not asked again
        assert setup.usual.is_unanswered
    setup.monitor.available = 90 * MIB
    assert setup.poll(ask=True, closely=True)
    setup.monitor.reply()
    assert not setup.usual.is_unanswered
    assert setup.done == [True, False, False, True]
    assert not setup.poll(ask=True, closely=True)  # asked for the next sample


def test_a_guest_that_does_not_answer_is_asked_again_after_a_few_looks(setup: Setup) -> None:
    setup.poll(ask=False)
    setup.monitor.reply()
    setup.poll(ask=True, closely=True)
    setup.monitor.reply()
    unanswered = []
    for _ in range(MOST_LOOKS):
        assert setup.poll(ask=True, closely=True)
        setup.monitor.reply()
        unanswered.append(setup.usual.is_unanswered)
    assert unanswered == [True] * (MOST_LOOKS - 1) + [False]
    assert not setup.poll(ask=True, closely=True)


def test_a_guest_that_was_just_asked_for_its_first_figures_is_read_before_it_is_asked_again(
    setup: Setup,
) -> None:
    answers = [setup.monitor.statistics, 0, {}]
    assert len(setup.sampler.asked_to_start(1)) == len(answers)
    asyncio.run(setup.sampler.started(answers, 1))
    for _ in range(MOST_LOOKS):
        assert setup.poll(ask=True, closely=True)
        assert setup.monitor.reply() == READ
    assert not setup.poll(ask=True, closely=True)
    assert setup.monitor.reply() == ["query-balloon", *ASKED]
    assert setup.done == [False] * MOST_LOOKS
