"""When things go out, on a clock that the test moves."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, HostStatus, VmStatus, utc_now
from qmpballoon.mqtt.outbox import Make
from qmpballoon.mqtt.publisher import Publisher
from qmpballoon.mqtt.topics import Topics
from qmpballoon.protocol.objects import Agent

TOPICS = Topics("qmpballoon", "edge-7")
STATE = TOPICS.state("web1")
RECORD = VmStatus(VmId("web1"), "web1", "/run/web1.qmp", "ok", size=256, actual=256)
HOST = HostStatus("ok", "fairshare", "auto", 10, 2, 3, 7, 100, 50, 0.5, 0.1, 2, 1, (), 4, 5)


class FakeBridge:
    """Makes each value at once and keeps it."""

    topics = TOPICS

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.came = asyncio.Event()

    def retain(self, topic: str, make: Make) -> None:
        self.sent.append((topic, make()))
        self.came.set()

    def clear(self, topic: str) -> None:
        self.sent.append((topic, None))

    def event(self, topic: str, value: object) -> None:
        self.sent.append((topic, value))

    def sample(self, topic: str, make: Make) -> None:
        self.sent.append((topic, make()))

    def on(self, topic: str) -> list[Any]:
        return [value for sent, value in self.sent if sent == topic]


class Room:
    def __init__(self, *, samples: bool = False) -> None:
        self.now_s = 1000.0
        self.bridge = FakeBridge()
        self.publisher = Publisher(
            self.bridge,
            Agent("edge-7", "edge-7", "0.1.0", "f00", 60.0),
            min_interval_s=1.0,
            samples=samples,
            clock=lambda: self.now_s,
        )

    def at(self, now_s: float) -> Room:
        self.now_s = 1000.0 + now_s
        self.publisher._publish_due()
        return self

    def actual(self, size: int) -> None:
        self.publisher.vm_changed(dataclasses.replace(RECORD, actual=size))


async def test_an_agent_without_vms_publishes_an_empty_list() -> None:
    assert Room().bridge.sent == [(TOPICS.vms, [])]


async def test_a_new_vm_goes_out_at_once_with_availability_and_list() -> None:
    room = Room()
    room.at(2.0).publisher.vm_changed(RECORD)
    assert [topic for topic, _ in room.bridge.sent[1:]] == [TOPICS.availability("web1"), TOPICS.vms, STATE]
    assert room.bridge.on(TOPICS.availability("web1")) == ["online"]


async def test_a_change_waits_for_the_interval_and_the_last_value_goes_out() -> None:
    room = Room()
    room.publisher.vm_changed(RECORD)
    room.at(0.2).actual(100)
    room.at(0.4).actual(90)
    assert len(room.bridge.on(STATE)) == 1
    room.at(0.99)
    assert len(room.bridge.on(STATE)) == 1
    room.at(1.0)
    assert [state["actual"] for state in room.bridge.on(STATE)] == [256, 90]


async def test_a_change_after_a_quiet_time_goes_out_in_the_same_moment() -> None:
    room = Room()
    room.publisher.vm_changed(RECORD)
    room.at(5.0).actual(100)
    assert [state["actual"] for state in room.bridge.on(STATE)] == [256, 100]


async def test_a_change_that_was_taken_back_within_the_interval_is_not_published() -> None:
    room = Room()
    room.publisher.vm_changed(RECORD)
    room.at(0.2).actual(100)
    room.at(0.4).publisher.vm_changed(RECORD)
    room.at(2.0)
    assert len(room.bridge.on(STATE)) == 1


async def test_everything_is_published_again_at_the_heartbeat_and_not_before() -> None:
    room = Room()
    room.publisher.vm_changed(RECORD)
    room.publisher.host_changed(HOST)
    room.at(30.0).publisher.vm_changed(dataclasses.replace(RECORD))
    room.publisher.host_changed(dataclasses.replace(HOST, mem_available=1))
    room.at(59.9)
    assert len(room.bridge.on(STATE)) == len(room.bridge.on(TOPICS.host_object)) == 1
    room.at(60.0)
    assert len(room.bridge.on(STATE)) == 2
    assert [host["seq"] for host in room.bridge.on(TOPICS.host_object)] == [1, 2]
    assert room.bridge.on(TOPICS.host_object)[1]["mem_available"] == 1
    room.at(120.0)
    assert len(room.bridge.on(STATE)) == 3


async def test_a_steady_stream_of_changes_keeps_the_heap_small() -> None:
    room = Room()
    for step in range(500):
        room.at(step * 0.5).actual(step)
    assert len(room.publisher._due) <= 4
    assert 245 <= len(room.bridge.on(STATE)) <= 251


async def test_a_vm_that_is_gone_is_cleared_and_leaves_the_list() -> None:
    room = Room()
    room.publisher.vm_changed(RECORD)
    room.at(1.0)
    assert len(room.bridge.on(TOPICS.vms)[-1]) == 1
    room.at(2.0).publisher.vm_gone(RECORD.id)
    assert room.bridge.on(STATE)[-1] is None
    assert room.bridge.on(TOPICS.availability("web1"))[-1] is None
    assert room.bridge.on(TOPICS.vms)[-1] == []
    room.at(100.0)
    assert room.bridge.on(STATE)[-1] is None
    room.publisher.vm_gone(RECORD.id)
    room.publisher.vm_changed(RECORD)
    assert room.bridge.on(STATE)[-1]["actual"] == 256


async def test_availability_follows_the_monitor() -> None:
    room = Room()
    for health in ("ok", "stale", "unresponsive", "offline", "ok"):
        room.publisher.vm_changed(dataclasses.replace(RECORD, health=health))
    assert room.bridge.on(TOPICS.availability("web1")) == ["online", "offline", "online"]


async def test_events_and_samples_go_out_as_they_come() -> None:
    room = Room(samples=True)
    room.publisher.vm_changed(RECORD)
    room.publisher.vm_event(RECORD.id, Event("reset", utc_now()))
    room.publisher.host_event(Event("level", utc_now(), {"from": "ok", "to": "soft"}))
    room.publisher.sampled()
    assert room.bridge.on(TOPICS.event("web1"))[0]["event"] == "reset"
    assert room.bridge.on(TOPICS.event(None))[0]["data"] == {"from": "ok", "to": "soft"}
    assert list(room.bridge.on(TOPICS.samples)[0]["vms"]) == ["web1"]


async def test_samples_are_off_unless_wanted() -> None:
    room = Room()
    room.publisher.sampled()
    assert room.bridge.on(TOPICS.samples) == []


async def test_the_task_wakes_for_what_became_due_earlier_than_it_meant_to_sleep() -> None:
    bridge = FakeBridge()
    publisher = Publisher(bridge, Agent("edge-7", "edge-7", "0", "f", 3600.0), min_interval_s=0.05)
    task = asyncio.create_task(publisher.run(), name="publisher")
    try:
        publisher.vm_changed(RECORD)
        bridge.came.clear()
        publisher.vm_changed(dataclasses.replace(RECORD, actual=7))
        async with asyncio.timeout(5):
            await bridge.came.wait()
        assert bridge.on(STATE)[-1]["actual"] == 7
    finally:
        task.cancel()
        await asyncio.wait({task})
