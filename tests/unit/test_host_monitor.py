"""What is told of the host: alarms begin and end."""

from __future__ import annotations

import pytest
from policy_makers import a_guest, a_host

from qmpballoon.agent import host_monitor as host_monitor_module
from qmpballoon.agent.feed import Feed
from qmpballoon.agent.host_monitor import HostMonitor
from qmpballoon.model.records import Event
from qmpballoon.policy.host_level import needs
from qmpballoon.policy.snapshot import Snapshot
from qmpballoon.units import MIB

FLOORS = "the floors of the VMs together exceed the budget"
NEEDS = "what the guests hold exceeds the budget"


class _Listener(Feed):
    """Keeps the host's alarms."""

    def __init__(self) -> None:
        super().__init__()
        self.alarms: list[tuple[str, object]] = []

    def host_event(self, event: Event) -> None:
        if event.event.startswith("alarm"):
            assert event.data.keys() == {"reason", "budget", "lent"}
            self.alarms.append((event.event, event.data["reason"]))


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words that are logged of alarms."""
    words: list[str] = []

    def say(word: str, *_: object, **__: object) -> None:
        if word.startswith("alarm"):
            words.append(word)

    monkeypatch.setattr(host_monitor_module, "say", say)
    return words


def holding(mib: int, **more: int) -> Snapshot:
    """Return a host whose one guest holds so much."""
    return a_host(a_guest(available=1024 - mib), **more)


def told(*snapshots: Snapshot) -> list[tuple[str, object]]:
    listener = _Listener()
    monitor = HostMonitor(listener)
    for snapshot in snapshots:
        monitor.judge(snapshot, lent=0)
    return listener.alarms


def test_each_alarm_ends(words: list[str]) -> None:
    calm, short = holding(200, budget=900), holding(950, budget=900)
    assert told(calm, short, short, calm, calm, short, calm) == [("alarm", NEEDS), ("alarm-over", NEEDS)] * 2
    assert words == ["alarm", "alarm-over"] * 2


@pytest.mark.usefixtures("words")
def test_one_alarm_ends_before_another_begins() -> None:
    needed, floors = holding(950, budget=900), holding(200, budget=100)
    assert told(needed, floors, holding(200, budget=900)) == [
        ("alarm", NEEDS),
        ("alarm-over", NEEDS),
        ("alarm", FLOORS),
        ("alarm-over", FLOORS),
    ]


@pytest.mark.usefixtures("words")
def test_a_host_without_guests_has_no_alarm() -> None:
    assert told(holding(950, budget=900), a_host(budget=900)) == [("alarm", NEEDS), ("alarm-over", NEEDS)]


@pytest.mark.usefixtures("words")
def test_an_alarm_does_not_come_and_go_with_each_mebibyte() -> None:
    needed = needs(holding(600)) // MIB
    above, just_below, well_below = needed - 1, needed + 10, needed * 107 // 100
    budgets = (above, just_below, above, just_below, well_below, just_below)
    assert told(*(holding(600, budget=budget) for budget in budgets)) == [
        ("alarm", NEEDS),
        ("alarm-over", NEEDS),
    ]
