"""Decides when the state of the VMs and of the host is published.

A change is published at once, but not within ``min_interval_s`` of the previous message; the last value
is always published. The list of VMs, whose size is that of the host, waits longer if there are many.
Home Assistant is told of a device when VMs have ceased to come, because states are wanted first. The bridge
repeats what is retained.
One task sleeps until the earliest of these times; a bounded number of topics is published in one
turn of the loop.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

from qmpballoon.model.names import VmId
from qmpballoon.model.records import Event, HostStatus, VmStatus, utc_now
from qmpballoon.mqtt.dead_band import host_changed, vm_changed
from qmpballoon.mqtt.home_assistant import HomeAssistant, announced_facts
from qmpballoon.mqtt.outbox import Make, Rank
from qmpballoon.mqtt.topics import Topics
from qmpballoon.protocol.objects import Agent, event_object, host_object, samples_object, vm_object, vms_list


class Retained(Protocol):
    """What the publisher needs of a bridge."""

    @property
    def topics(self) -> Topics: ...  # noqa: D102
    def retain(self, topic: str, make: Make, *, rank: Rank = Rank.USUAL) -> None: ...  # noqa: D102
    def clear(self, topic: str) -> None: ...  # noqa: D102
    def event(self, topic: str, value: object) -> None: ...  # noqa: D102
    def sample(self, topic: str, make: Make) -> None: ...  # noqa: D102


_Key: TypeAlias = tuple[str, str]  # ("vm", its name), ("host", ""), ("vms", ""), ("devices", "")
_HOST: Final = ("host", "")
_VMS: Final = ("vms", "")
_DEVICES: Final = ("devices", "")  # that Home Assistant is to be told of
_NEVER: Final = float("-inf")
_NO_END: Final = float("inf")
_LISTED_PER_S: Final = 500  # rows of the list of VMs: of 1000 VMs it is published every 2 s at most
_MOST_AT_ONCE: Final = 20  # topics
_CALM_S: Final = 1.0  # no VM has come for so long: the devices, 7 KB each, are announced
_CALM_WITHIN_S: Final = 5.0  # or a VM waits for so long
_SHORTEST_SLEEP_S: Final = 0.02  # the due times of many VMs lie close together


@dataclass(slots=True)
class _Slot:
    """When a topic was published last, when it is due again, and the times of its heap entries.

    A heap entry is never removed before its time. If it comes up before the topic is due, the topic is
    queued again. So changes at a high rate do not fill the heap.
    """

    published_at_s: float = _NEVER
    due_at_s: float = _NO_END
    heap_times_s: list[float] = field(default_factory=list)


class Publisher:
    """Takes frozen records and keeps the bridge's topics current. All calls return at once.

    ``agent`` identifies the publisher; its ``host`` must be the one of ``bridge.topics``. With
    ``home_assistant`` the host and its VMs are announced to Home Assistant.
    """

    def __init__(
        self,
        bridge: Retained,
        agent: Agent,
        *,
        min_interval_s: float,
        samples: bool = False,
        home_assistant: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bridge = bridge
        self._agent = agent
        self._min_interval_s = min_interval_s
        self._samples = samples
        self._home_assistant = HomeAssistant(bridge.topics, agent) if home_assistant else None
        self._clock = clock
        self._started_at_s = clock()
        self._sequence = itertools.count(1)
        self._vms: dict[VmId, VmStatus] = {}
        self._published_vms: dict[VmId, VmStatus] = {}
        self._host: HostStatus | None = None
        self._published_host: HostStatus | None = None
        self._unannounced: dict[VmId, None] = {}
        self._announce_at_s = self._announce_until_s = _NO_END
        self._slots: dict[_Key, _Slot] = {}
        self._due: list[tuple[float, _Key]] = []
        self._wake = asyncio.Event()
        self._sleeps_until_s = _NEVER
        self._schedule(_VMS, changed=True)  # an empty list is published, too

    def vm_changed(self, record: VmStatus) -> None:
        """Take a VM's newest snapshot; a new VM is added."""
        before = self._vms.get(record.id)
        if before is record:
            return
        self._vms[record.id] = record
        if before is None or before.answers != record.answers:
            word = "online" if record.answers else "offline"
            availability = self._bridge.topics.availability(record.id)
            self._bridge.retain(availability, lambda: word, rank=Rank.FIRST)
        if self._home_assistant is not None:
            if before is None:
                self._announce_soon(record.id)
            elif record.id not in self._unannounced and announced_facts(before) != announced_facts(record):
                self._announce(self._home_assistant, record.id)
        if before is None or _listed(before) != _listed(record):
            self._schedule(_VMS, changed=True)
        changed = vm_changed(self._published_vms.get(record.id), record)
        self._schedule(("vm", record.id), changed=changed)

    def vm_gone(self, vm: VmId) -> None:
        """Remove a VM: its retained topics are cleared."""
        if self._vms.pop(vm, None) is None:
            return
        self._published_vms.pop(vm, None)
        self._slots.pop(("vm", vm), None)
        self._unannounced.pop(vm, None)
        if self._home_assistant is not None:
            self._bridge.clear(self._home_assistant.topic(vm))  # first: it would read an empty state
        self._bridge.clear(self._bridge.topics.availability(vm))
        self._bridge.clear(self._bridge.topics.state(vm))
        self._schedule(_VMS, changed=True)

    def host_changed(self, record: HostStatus) -> None:
        """Take the host's newest snapshot."""
        if self._host is None and self._home_assistant is not None:
            self._bridge.retain(self._home_assistant.topic(None), self._home_assistant.host_message)
        self._host = record
        self._schedule(_HOST, changed=host_changed(self._published_host, record))

    def vm_event(self, vm: VmId, event: Event) -> None:
        """Publish an event of a VM."""
        self._bridge.event(self._bridge.topics.event(vm), event_object(vm, event))

    def host_event(self, event: Event) -> None:
        """Publish an event of the host."""
        self._bridge.event(self._bridge.topics.event(None), event_object(None, event))

    def sampled(self) -> None:
        """Publish the figures of all VMs in one message, if samples are on."""
        if self._samples:
            self._bridge.sample(
                self._bridge.topics.samples,
                lambda: samples_object(self._vms.values(), self._host, self._clock(), utc_now()),
            )

    def _announce_soon(self, vm: VmId) -> None:
        now_s = self._clock()
        if not self._unannounced:
            self._announce_until_s = now_s + _CALM_WITHIN_S
        self._unannounced[vm] = None
        self._announce_at_s = min(now_s + _CALM_S, self._announce_until_s)
        self._schedule(_DEVICES, changed=True)

    def _announce(self, home_assistant: HomeAssistant, vm: VmId) -> None:
        self._bridge.retain(
            home_assistant.topic(vm), lambda: home_assistant.vm_message(self._vms[vm]), rank=Rank.LAST
        )

    async def run(self) -> None:
        """Publish what becomes due, until cancelled."""
        while True:
            self._wake.clear()
            if self._publish_due():
                await asyncio.sleep(0)  # requests and answers come first
                continue
            due_s = self._due[0][0] if self._due else _NO_END
            now_s = self._clock()
            self._sleeps_until_s = max(now_s + _SHORTEST_SLEEP_S, due_s)
            left_s = max(0.0, self._sleeps_until_s - self._clock())
            with suppress(TimeoutError):
                async with asyncio.timeout(None if left_s == _NO_END else left_s):
                    await self._wake.wait()

    def _publish_due(self) -> bool:
        """Publish a bounded number of due topics; return whether more are due."""
        now_s = self._clock()
        for _ in range(_MOST_AT_ONCE):
            if not self._due or self._due[0][0] > now_s:
                return False
            heap_time_s, key = heapq.heappop(self._due)
            slot = self._slots.get(key)
            if slot is None or heap_time_s not in slot.heap_times_s:
                continue  # the VM was removed, and perhaps added again
            slot.heap_times_s.remove(heap_time_s)
            if slot.due_at_s <= now_s:
                if self._is_changed(key):
                    self._publish(key, slot, now_s)
                slot.due_at_s = self._due_at_s(key, slot, changed=False)
            self._queue(key, slot)
        return True

    def _schedule(self, key: _Key, *, changed: bool) -> None:
        """Publish now if the topic is due, else queue it."""
        slot = self._slots.get(key)
        if slot is None:
            slot = self._slots[key] = _Slot()
        now_s = self._clock()
        slot.due_at_s = self._due_at_s(key, slot, changed=changed)
        if changed and slot.due_at_s <= now_s:
            self._publish(key, slot, now_s)
            slot.due_at_s = self._due_at_s(key, slot, changed=False)
        self._queue(key, slot)

    def _due_at_s(self, key: _Key, slot: _Slot, *, changed: bool) -> float:
        if key == _DEVICES:
            return self._announce_at_s if self._unannounced else _NO_END
        if not changed:
            return _NO_END
        min_interval_s = self._min_interval_s
        if key == _VMS:
            min_interval_s = max(min_interval_s, len(self._vms) / _LISTED_PER_S)
        return slot.published_at_s + min_interval_s

    def _queue(self, key: _Key, slot: _Slot) -> None:
        """Add a heap entry at the time the slot is due, unless one is earlier."""
        if slot.due_at_s < min(slot.heap_times_s, default=_NO_END):
            slot.heap_times_s.append(slot.due_at_s)
            heapq.heappush(self._due, (slot.due_at_s, key))
            if slot.due_at_s < self._sleeps_until_s:
                self._wake.set()

    def _publish(self, key: _Key, slot: _Slot, now_s: float) -> None:
        slot.published_at_s = now_s
        if key == _HOST:
            self._published_host = self._host
            self._bridge.retain(self._bridge.topics.host_object, self._make_host)
        elif key == _DEVICES:
            if self._home_assistant is not None and self._unannounced:
                vm = next(iter(self._unannounced))
                del self._unannounced[vm]
                self._announce(self._home_assistant, vm)
        elif key == _VMS:
            self._bridge.retain(self._bridge.topics.vms, lambda: vms_list(self._vms.values()))
        else:
            vm = VmId(key[1])
            self._published_vms[vm] = self._vms[vm]
            self._bridge.retain(self._bridge.topics.state(vm), lambda: self._make_vm(vm))

    def _is_changed(self, key: _Key) -> bool:
        if key == _HOST:
            return self._host is not None and host_changed(self._published_host, self._host)
        if key in (_VMS, _DEVICES):
            return True
        vm = VmId(key[1])
        return vm_changed(self._published_vms.get(vm), self._vms[vm])

    def _make_vm(self, vm: VmId) -> object:
        record = self._vms[vm]
        self._published_vms[vm] = record
        return vm_object(record, self._agent.host, self._clock(), utc_now())

    def _make_host(self) -> object:
        if self._host is None:
            raise RuntimeError("the host's topic is retained before its first record")
        self._published_host = self._host
        uptime_s = self._clock() - self._started_at_s
        return host_object(self._host, self._agent, next(self._sequence), uptime_s, utc_now())


def _listed(record: VmStatus) -> tuple[str, str, str]:
    return record.name, record.socket, record.health
