"""The fleet, as a reader makes it of messages."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import msgpack  # type: ignore[import-untyped]
import pytest

from qmpballoon import fleet as fleet_module
from qmpballoon.fleet import EventLog, Fleet, FleetEvent
from qmpballoon.model.records import rfc3339
from qmpballoon.mqtt.topics import FleetTopics

NOW = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
ROOT = "qmpballoon/edge-7"


class Clock:
    """Both clocks; ``now_s`` seconds have passed."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def wall(self) -> datetime:
        return NOW + timedelta(seconds=self.now_s)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fleet(clock: Clock) -> Fleet:
    return Fleet(FleetTopics("qmpballoon"), clock=clock.monotonic, now=clock.wall)


def host_object(age_s: float = 0, **more: object) -> bytes:
    ts = rfc3339(NOW - timedelta(seconds=age_s))
    return json.dumps({"ts": ts, "heartbeat_s": 60, "name": "Edge 7", "used": 5, **more}).encode()


def take(fleet: Fleet, topic: str, payload: bytes, *, retained: bool = True) -> None:
    assert fleet.take(f"{ROOT}/{topic}", payload, retained=retained)


def test_a_host_and_its_vm_are_there_with_their_figures(fleet: Fleet) -> None:
    guest = {"available": 7, "age_s": 0.5}
    take(
        fleet,
        "vm/web1/state",
        json.dumps({"size": 20, "actual": 10, "health": "ok", "guest": guest}).encode(),
    )
    take(fleet, "vm/web1/availability", b"online")
    take(fleet, "host", host_object())
    take(fleet, "status", b"online")
    host, vm = fleet.hosts["edge-7"], fleet.vms["edge-7/web1"]
    assert (host.host, host.name, host.online, host.used, host.budget) == ("edge-7", "Edge 7", True, 5, None)
    assert (vm.id, vm.online, vm.health, vm.size, vm.actual, vm.target) == (
        "edge-7/web1", True, "ok", 20, 10, None,
    )  # fmt: skip
    assert vm.state is not None
    assert vm.state.guest is not None
    assert (vm.state.guest.available, vm.state.guest.age_s) == (7, 0.5)
    assert vm.document["health"] == "ok"


def test_objects_in_msgpack_are_read(fleet: Fleet) -> None:
    take(fleet, "vm/web1/state", msgpack.packb({"size": 20}))
    assert fleet.vms["edge-7/web1"].size == 20


def test_a_vm_is_online_only_with_its_host_and_its_monitor(fleet: Fleet) -> None:
    take(fleet, "vm/web1/availability", b"online")
    assert not fleet.vms["edge-7/web1"].online
    take(fleet, "status", b"online")
    assert fleet.vms["edge-7/web1"].online
    take(fleet, "vm/web1/availability", b"offline")
    assert not fleet.vms["edge-7/web1"].online
    take(fleet, "vm/web1/availability", b"online")
    take(fleet, "status", b"offline")
    assert not fleet.vms["edge-7/web1"].online


def test_a_host_is_gone_when_its_object_is_older_than_three_heartbeats(fleet: Fleet, clock: Clock) -> None:
    take(fleet, "status", b"online")
    take(fleet, "host", host_object())
    clock.now_s = 180
    assert fleet.hosts["edge-7"].online
    clock.now_s = 180.1
    assert not fleet.hosts["edge-7"].online


def test_a_host_whose_clock_is_wrong_is_online_while_its_heartbeats_arrive(
    fleet: Fleet, clock: Clock
) -> None:
    take(fleet, "status", b"online")
    take(fleet, "host", host_object(age_s=3600))
    assert not fleet.hosts["edge-7"].online
    take(fleet, "host", host_object(age_s=3600), retained=False)
    clock.now_s = 180
    assert fleet.hosts["edge-7"].online
    clock.now_s = 181
    assert not fleet.hosts["edge-7"].online


@pytest.mark.parametrize(
    "payload", [b"{}", b'{"ts": 5, "heartbeat_s": 60}', b'{"ts": "2026-01-01", "heartbeat_s": 1}']
)
def test_a_host_object_without_an_age_does_not_end_a_host(fleet: Fleet, payload: bytes) -> None:
    take(fleet, "status", b"online")
    take(fleet, "host", payload)
    assert fleet.hosts["edge-7"].online


@pytest.mark.parametrize("old", [b"", b"offline"])
def test_new_objects_tell_what_is_online_when_the_retained_words_are_missing_or_old(
    fleet: Fleet, old: bytes
) -> None:
    take(fleet, "status", old)
    take(fleet, "vm/web1/availability", old)
    take(fleet, "host", host_object())
    take(fleet, "vm/web1/state", b'{"health": "ok"}')
    assert not fleet.hosts["edge-7"].online
    assert not fleet.vms["edge-7/web1"].online
    take(fleet, "host", host_object(), retained=False)
    take(fleet, "vm/web1/state", b'{"health": "ok"}', retained=False)
    assert fleet.hosts["edge-7"].online
    assert fleet.vms["edge-7/web1"].online
    take(fleet, "vm/web1/state", b'{"health": "busy"}', retained=False)
    assert not fleet.vms["edge-7/web1"].online
    take(fleet, "vm/web1/state", b'{"health": "ok"}', retained=False)
    take(fleet, "status", b"offline", retained=False)
    assert not fleet.vms["edge-7/web1"].online


def test_what_is_cleared_is_gone(fleet: Fleet) -> None:
    take(fleet, "status", b"online")
    take(fleet, "host", host_object())
    take(fleet, "vm/web1/availability", b"online")
    take(fleet, "vm/web1/state", b'{"size": 1}')
    for topic in ("vm/web1/availability", "vm/web1/state", "status", "host"):
        take(fleet, topic, b"", retained=False)
    assert not fleet.vms
    assert not fleet.hosts


def test_views_are_live_and_may_be_iterated_while_vms_come(fleet: Fleet) -> None:
    vms = fleet.vms
    take(fleet, "vm/a/availability", b"online")
    for _ in vms:
        take(fleet, "vm/b/availability", b"online")
    assert list(vms) == ["edge-7/a", "edge-7/b"]
    assert len(vms) == 2
    assert "edge-7/c" not in vms


def test_events_are_taken_unless_they_are_retained(fleet: Fleet) -> None:
    event = {"ts": rfc3339(NOW), "event": "health", "data": {"to": "ok"}}
    take(fleet, "vm/web1/event", json.dumps(event).encode(), retained=True)
    assert fleet.events.since(0) is None
    take(fleet, "vm/web1/event", json.dumps(event).encode(), retained=False)
    take(fleet, "event", b'{"event": "level"}', retained=False)
    assert fleet.events.since(0) == (1, FleetEvent("edge-7", "web1", "health", NOW, {"to": "ok"}))
    assert fleet.events.since(1) == (2, FleetEvent("edge-7", None, "level", NOW, {}))
    assert fleet.events.since(2) is None


def test_a_slow_reader_is_told_how_much_it_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "MOST_EVENTS", 3)
    log = EventLog()
    for number in range(5):
        log.add(FleetEvent("h", None, str(number), NOW), 0)
    found = log.since(1)
    assert found is not None
    assert (found[0], found[1].event, found[1].data) == (2, "lagged", {"missed": 1})
    read, words = found[0], []
    while (found := log.since(read)) is not None:
        read = found[0]
        words.append(found[1].event)
    assert words == ["2", "3", "4"]


def test_large_events_push_more_out_than_small_ones(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "MOST_EVENT_BYTES", 2500)
    for word in ("first", "second", "third"):
        event = json.dumps({"event": word, "data": {"text": "x" * 1000}}).encode()
        take(fleet, "event", event, retained=False)
    found = fleet.events.since(0)
    assert found is not None
    assert found[1].data == {"missed": 1}
    assert fleet.events.count == 3
    found = fleet.events.since(found[0])
    assert found is not None
    assert found[1].event == "second"


def test_a_vm_object_or_event_that_is_far_too_large_is_ignored(fleet: Fleet) -> None:
    filler = "x" * 64 * 1024
    take(fleet, "vm/web1/state", json.dumps({"size": 20, "actual": 10, "filler": filler}).encode())
    take(fleet, "vm/web1/event", json.dumps({"event": "reset", "filler": filler}).encode(), retained=False)
    assert not fleet.vms
    assert fleet.events.count == 0
    take(fleet, "host", host_object(unidentified=[filler]))
    assert fleet.hosts["edge-7"].used == 5


def test_true_is_no_size(fleet: Fleet) -> None:
    take(fleet, "vm/web1/state", b'{"size": true, "actual": 1, "guest": {}}')
    assert fleet.vms["edge-7/web1"].state is None
    take(
        fleet,
        "vm/web1/state",
        b'{"size": 9, "actual": 1, "target": true, "guest": {"age_s": 1, "free": true}}',
    )
    state = fleet.vms["edge-7/web1"].state
    assert state is not None
    assert state.guest is not None
    assert (state.target, state.guest.free) == (None, None)


def test_the_number_of_hosts_and_vms_is_bounded(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "MOST_HOSTS", 2)
    monkeypatch.setattr(fleet_module, "MOST_VMS", 2)
    for number in range(5):
        fleet.take(f"qmpballoon/h{number}/status", b"online", retained=True)
        fleet.take(f"qmpballoon/h/vm/v{number}/availability", b"online", retained=True)
    assert (len(fleet.hosts), len(fleet.vms)) == (2, 2)
