"""When state is published, on a clock that the test sets."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, HostStatus, Limits, VmStatus, utc_now
from qmpballoon.mqtt.outbox import Make, Rank
from qmpballoon.mqtt.publisher import Publisher
from qmpballoon.mqtt.topics import Topics
from qmpballoon.protocol.objects import Agent
from qmpballoon.units import MIB

TOPICS = Topics("qmpballoon", "edge-7")
STATE = TOPICS.state("web1")
RECORD = VmStatus(VmId("web1"), "web1", "/run/web1.qmp", "ok", size=256, actual=256)
HOST = HostStatus("ok", "fairshare", "auto", 10, 2, 3, 7, 100, 50, 0.5, 0.1, 2, 1, (), 4, 5)


class FakeBridge:
    """Calls each maker at once and records the value."""

    topics = TOPICS

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.makers: dict[str, Callable[[], Any]] = {}
        self.retained = asyncio.Event()
        self.ranks: dict[str, Rank] = {}

    def retain(self, topic: str, make: Make, *, rank: Rank = Rank.USUAL) -> None:
        self.ranks[topic] = rank
        self.makers[topic] = make
        self.sent.append((topic, make()))
        self.retained.set()

    def clear(self, topic: str) -> None:
        self.sent.append((topic, None))

    def event(self, topic: str, value: object) -> None:
        self.sent.append((topic, value))

    def sample(self, topic: str, make: Make) -> None:
        self.sent.append((topic, make()))

    def on(self, topic: str) -> list[Any]:
        return [value for sent, value in self.sent if sent == topic]


class Setup:
    def __init__(self, *, samples: bool = False, home_assistant: bool = False) -> None:
        self.now_s = 1000.0
        self.bridge = FakeBridge()
        self.publisher = Publisher(
            self.bridge,
            Agent("edge-7", "edge-7", "0.1.0", "f00", 60.0),
            min_interval_s=1.0,
            samples=samples,
            home_assistant=home_assistant,
            clock=lambda: self.now_s,
        )

    def at(self, now_s: float) -> Setup:
        self.now_s = 1000.0 + now_s
        self.publisher._publish_due()
        return self

    def actual(self, size: int) -> None:
        self.publisher.vm_changed(dataclasses.replace(RECORD, actual=size))


async def test_an_agent_without_vms_publishes_an_empty_list() -> None:
    assert Setup().bridge.sent == [(TOPICS.vms, [])]


async def test_a_new_vm_is_published_at_once_with_availability_and_list() -> None:
    setup = Setup()
    setup.at(2.0).publisher.vm_changed(RECORD)
    assert [topic for topic, _ in setup.bridge.sent[1:]] == [TOPICS.availability("web1"), TOPICS.vms, STATE]
    assert setup.bridge.on(TOPICS.availability("web1")) == ["online"]


async def test_a_change_waits_for_the_interval_and_the_last_value_is_published() -> None:
    setup = Setup()
    setup.publisher.vm_changed(RECORD)
    setup.at(0.2).actual(100)
    setup.at(0.4).actual(90)
    assert len(setup.bridge.on(STATE)) == 1
    setup.at(0.99)
    assert len(setup.bridge.on(STATE)) == 1
    setup.at(1.0)
    assert [state["actual"] for state in setup.bridge.on(STATE)] == [256, 90]


async def test_a_moving_host_is_published_once_an_interval_and_at_last_where_it_rests() -> None:
    setup = Setup()
    for tenths in range(0, 26, 5):
        host = dataclasses.replace(HOST, used=(100 - tenths) * MIB)
        setup.at(tenths / 10).publisher.host_changed(host)
    setup.at(9.0)
    assert [host["used"] // MIB for host in setup.bridge.on(TOPICS.host_object)] == [100, 95, 85, 75]


async def test_a_change_after_the_interval_is_published_at_once() -> None:
    setup = Setup()
    setup.publisher.vm_changed(RECORD)
    setup.at(5.0).actual(100)
    assert [state["actual"] for state in setup.bridge.on(STATE)] == [256, 100]


async def test_a_change_that_is_reverted_within_the_interval_is_not_published() -> None:
    setup = Setup()
    setup.publisher.vm_changed(RECORD)
    setup.at(0.2).actual(100)
    setup.at(0.4).publisher.vm_changed(RECORD)
    setup.at(2.0)
    assert len(setup.bridge.on(STATE)) == 1


async def test_what_has_not_changed_is_left_to_the_repetition_which_is_not_old() -> None:
    setup = Setup()
    setup.publisher.vm_changed(RECORD)
    setup.publisher.host_changed(HOST)
    setup.at(30.0).publisher.vm_changed(dataclasses.replace(RECORD))
    setup.publisher.host_changed(dataclasses.replace(HOST, mem_available=1))
    setup.at(120.0)
    assert len(setup.bridge.on(STATE)) == len(setup.bridge.on(TOPICS.host_object)) == 1
    repeated = setup.bridge.makers[TOPICS.host_object]()
    assert (repeated["seq"], repeated["mem_available"]) == (2, 1)


async def test_a_steady_stream_of_changes_keeps_the_heap_small() -> None:
    setup = Setup()
    for step in range(500):
        setup.at(step * 0.5).actual(step)
    assert len(setup.publisher._due) <= 4
    assert 245 <= len(setup.bridge.on(STATE)) <= 251


def vms(count: int, **changed: Any) -> list[VmStatus]:
    names = [VmId(f"vm{number}") for number in range(count)]
    return [dataclasses.replace(RECORD, id=name, name=name, **changed) for name in names]


@pytest.mark.parametrize("count", [10, 300])
async def test_what_is_published_of_a_vm_does_not_grow_with_the_number_of_vms(count: int) -> None:
    setup = Setup()
    for step in range(100):  # 10 s; each VM changes ten times a second
        setup.now_s = 1000.0 + step * 0.1
        while setup.publisher._publish_due():
            pass
        for record in vms(count, actual=step):
            setup.publisher.vm_changed(record)
    assert all(len(setup.bridge.on(TOPICS.state(record.id))) == 10 for record in vms(count))
    assert all(len(setup.bridge.on(TOPICS.availability(record.id))) == 1 for record in vms(count))
    assert len(setup.publisher._due) <= 3 * (count + 2)


async def test_the_rows_of_the_list_have_a_bounded_rate() -> None:
    setup = Setup()
    records = vms(1000)
    for step in range(200):  # 20 s; another VM's health changes each tenth of a second
        for record in records if step == 0 else [dataclasses.replace(records[step], health="stale")]:
            setup.publisher.vm_changed(record)
        setup.at(step * 0.1)
    lists = setup.bridge.on(TOPICS.vms)
    assert sum(len(rows) for rows in lists) <= 20 * 500 + 2 * 1000
    setup.at(22.0)
    last = setup.bridge.on(TOPICS.vms)[-1]
    assert sum(row["health"] == "stale" for row in last) == 199


@pytest.mark.parametrize("count", [10, 1000])
async def test_unchanged_vms_publish_nothing_and_queue_nothing(count: int) -> None:
    setup = Setup()
    for record in vms(count):
        setup.publisher.vm_changed(record)
    setup.at(5.0)
    sent, queued = len(setup.bridge.sent), len(setup.publisher._due)
    for step in range(20):
        setup.now_s = 1005.0 + step
        for record in vms(count):
            setup.publisher.vm_changed(record)
    assert len(setup.bridge.sent) == sent
    assert len(setup.publisher._due) == queued


async def test_the_changes_of_many_vms_are_published_over_several_turns_of_the_loop() -> None:
    setup = Setup()
    for record in vms(1000):
        setup.publisher.vm_changed(record)
    for record in vms(1000, actual=7):
        setup.publisher.vm_changed(record)
    setup.now_s += 2.0
    sent = len(setup.bridge.sent)
    publisher = asyncio.create_task(setup.publisher.run(), name="publisher")
    turns: list[int] = []
    try:
        while sum(turns) < 1000 + 1:  # states and list
            await asyncio.sleep(0)
            turns.append(len(setup.bridge.sent) - sent - sum(turns))
    finally:
        publisher.cancel()
        await asyncio.wait({publisher})
    assert max(turns) <= 20
    assert all(len(setup.bridge.on(TOPICS.state(record.id))) == 2 for record in vms(1000))


async def test_a_removed_vm_is_cleared_and_leaves_the_list() -> None:
    setup = Setup()
    setup.publisher.vm_changed(RECORD)
    setup.at(1.0)
    assert len(setup.bridge.on(TOPICS.vms)[-1]) == 1
    setup.at(2.0).publisher.vm_gone(RECORD.id)
    assert setup.bridge.on(STATE)[-1] is None
    assert setup.bridge.on(TOPICS.availability("web1"))[-1] is None
    assert setup.bridge.on(TOPICS.vms)[-1] == []
    setup.at(100.0)
    assert setup.bridge.on(STATE)[-1] is None
    setup.publisher.vm_gone(RECORD.id)
    setup.publisher.vm_changed(RECORD)
    assert setup.bridge.on(STATE)[-1]["actual"] == 256


async def test_availability_follows_the_monitor() -> None:
    setup = Setup()
    for health in ("ok", "stale", "unresponsive", "offline", "ok"):
        setup.publisher.vm_changed(dataclasses.replace(RECORD, health=health))
    assert setup.bridge.on(TOPICS.availability("web1")) == ["online", "offline", "online"]


async def test_events_and_samples_are_published_at_once() -> None:
    setup = Setup(samples=True)
    setup.publisher.vm_changed(RECORD)
    setup.publisher.vm_event(RECORD.id, Event("reset", utc_now()))
    setup.publisher.host_event(Event("level", utc_now(), {"from": "ok", "to": "soft"}))
    setup.publisher.sampled()
    assert setup.bridge.on(TOPICS.event("web1"))[0]["event"] == "reset"
    assert setup.bridge.on(TOPICS.event(None))[0]["data"] == {"from": "ok", "to": "soft"}
    assert list(setup.bridge.on(TOPICS.samples)[0]["vms"]) == ["web1"]


async def test_samples_are_off_by_default() -> None:
    setup = Setup()
    setup.publisher.sampled()
    assert setup.bridge.on(TOPICS.samples) == []


async def test_the_task_wakes_when_a_topic_becomes_due_before_its_planned_time() -> None:
    bridge = FakeBridge()
    publisher = Publisher(bridge, Agent("edge-7", "edge-7", "0", "f", 3600.0), min_interval_s=0.05)
    task = asyncio.create_task(publisher.run(), name="publisher")
    try:
        publisher.vm_changed(RECORD)
        bridge.retained.clear()
        publisher.vm_changed(dataclasses.replace(RECORD, actual=7))
        async with asyncio.timeout(5):
            await bridge.retained.wait()
        assert bridge.on(STATE)[-1]["actual"] == 7
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_home_assistant_is_told_of_a_vm_when_it_appears_changes_its_limits_and_goes() -> None:
    setup, device = Setup(home_assistant=True), TOPICS.device("web1")
    setup.publisher.vm_changed(RECORD)
    setup.at(5.0).actual(100)
    assert len(setup.bridge.on(device)) == 1
    limits = Limits(MIB, 2 * MIB, 1000)
    setup.at(5.1).publisher.vm_changed(dataclasses.replace(RECORD, limits=limits))  # not held back
    first, second = (json.loads(text)["components"]["target"] for text in setup.bridge.on(device))
    assert first == {"platform": "number"}
    assert (second["min"], second["max"]) == (1, 2)
    setup.publisher.vm_gone(RECORD.id)
    assert setup.bridge.on(device)[2:] == [None]


async def test_home_assistant_is_told_of_devices_when_no_more_vms_come() -> None:
    setup, second = Setup(home_assistant=True), VmId("web2")
    devices = [TOPICS.device("web1"), TOPICS.device("web2")]
    setup.publisher.vm_changed(RECORD)
    setup.at(0.9).publisher.vm_changed(dataclasses.replace(RECORD, id=second))
    limits = Limits(MIB, 2 * MIB, 1000)
    setup.at(1.0).publisher.vm_changed(dataclasses.replace(RECORD, id=second, limits=limits))
    setup.at(1.8)
    assert [setup.bridge.on(device) for device in devices] == [[], []]
    setup.at(1.9)
    assert [len(setup.bridge.on(device)) for device in devices] == [1, 1]
    assert {setup.bridge.ranks[device] for device in devices} == {Rank.LAST}
    assert setup.bridge.ranks[TOPICS.availability("web1")] is Rank.FIRST
    assert setup.bridge.ranks[TOPICS.state("web1")] is Rank.USUAL
    assert json.loads(setup.bridge.on(devices[1])[0])["components"]["target"]["max"] == 2


async def test_home_assistant_is_told_of_a_device_within_seconds_while_vms_keep_coming() -> None:
    setup = Setup(home_assistant=True)
    setup.publisher.vm_changed(RECORD)
    for number in range(1, 10):
        assert setup.bridge.on(TOPICS.device("web1")) == []
        setup.at(number / 2).publisher.vm_changed(dataclasses.replace(RECORD, id=VmId(f"new{number}")))
    setup.at(5.0)
    assert len(setup.bridge.on(TOPICS.device("web1"))) == 1


async def test_home_assistant_is_not_told_of_a_vm_that_was_gone_before() -> None:
    setup = Setup(home_assistant=True)
    setup.publisher.vm_changed(RECORD)
    setup.at(0.5).publisher.vm_gone(RECORD.id)
    setup.at(5.0)
    assert setup.bridge.on(TOPICS.device("web1")) == [None]


async def test_home_assistant_is_told_of_the_host_once() -> None:
    setup = Setup(home_assistant=True)
    setup.publisher.host_changed(HOST)
    setup.at(5.0).publisher.host_changed(dataclasses.replace(HOST, mode="manual"))
    assert len(setup.bridge.on(TOPICS.device(None))) == 1


async def test_home_assistant_is_told_nothing_unless_wanted() -> None:
    setup = Setup()
    setup.publisher.host_changed(HOST)
    setup.publisher.vm_changed(RECORD)
    setup.publisher.vm_gone(RECORD.id)
    assert not [topic for topic, _ in setup.bridge.sent if topic.startswith("homeassistant")]
