"""The fleet as a broker has it: hosts, their VMs, and events. No I/O.

A VM is there when its host's agent is online and its own availability is ``online``. An agent is online
while its status says so, and its host object is not older than three heartbeats: a clustered broker may
never send a will. The age is that of the object's time stamp, or the time since the object arrived as a new
message, whichever is less: clocks of hosts differ. An object that arrives as a new message tells the same as
these words, by its health that of a VM: a cluster that lost a node may have given old words, or none.

What arrives is untrusted: a value of another type than expected counts as unknown.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, TypeVar

from qmpballoon.errors import RequestRefused
from qmpballoon.model.records import SILENT, VmState, utc_now
from qmpballoon.mqtt.topics import FleetTopics, Published
from qmpballoon.protocol.objects import state_of
from qmpballoon.protocol.payloads import decode_object

HEARTBEATS: Final = 3
MOST_HOSTS: Final = 10_000
MOST_VMS: Final = 100_000
MOST_EVENTS: Final = 10_000  # that wait for a slow reader
MOST_EVENT_BYTES: Final = 32 * 1024 * 1024  # of their payloads
LARGEST_OF_VM: Final = 64 * 1024  # bytes of a VM object or event; the host object lists sockets
_LONGEST_STATUS: Final = 64
_LARGEST_NUMBER: Final = 2**53

_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class FleetHost:
    """A host as its agent published it last; None where it published nothing. Sizes are bytes.

    ``host`` is its name in topics, ``name`` the plain one. ``document`` is the whole host object; it is empty
    if there is none.
    """

    host: str
    online: bool
    name: str | None
    version: str | None
    policy: str | None
    mode: str | None
    level: str | None
    budget: int | None
    reserve: int | None
    used: int | None
    available: int | None
    mem_total: int | None
    mem_available: int | None
    reclaimable: int | None
    room: int | None
    heartbeat_s: float | None
    document: Mapping[str, object] = field(repr=False)


@dataclass(frozen=True, slots=True)
class FleetVm:
    """A VM as its agent published it last; None where it published nothing. Sizes are bytes.

    ``host`` and ``vm`` are names in topics, ``name`` is the plain one. ``online`` is whether its monitor
    answers, and its agent runs. ``state`` has its guest's figures, too. ``document`` is the whole VM object;
    it is empty if there is none.
    """

    host: str
    vm: str
    online: bool
    name: str | None
    health: str | None
    run_state: str | None
    mode: str | None
    policy: str | None
    why: str | None
    size: int | None
    actual: int | None
    target: int | None
    floor: int | None
    ceiling: int | None
    held: int | None
    rss: int | None
    state: VmState | None
    document: Mapping[str, object] = field(repr=False)

    @property
    def id(self) -> str:
        """Its name in the fleet: ``edge-7/web1``."""
        return f"{self.host}/{self.vm}"


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """An event of a VM, or of a host where ``vm`` is None; names are those in topics.

    ``event`` is its word, ``ts`` the agent's wall clock. A reader that is too slow gets one event ``lagged``
    of no host (an empty name) instead of those it missed: ``{"missed": N}``.
    """

    host: str
    vm: str | None
    event: str
    ts: datetime
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class _Host:
    status: str = ""
    document: Mapping[str, object] = field(default_factory=dict)
    heard_at_s: float | None = None  # when the object arrived as a new message


@dataclass(slots=True)
class _Vm:
    availability: str = ""
    document: Mapping[str, object] = field(default_factory=dict)
    record: FleetVm | None = None  # made of this document, when it was read last


class EventLog:
    """The last events, numbered from the start on; a bounded ring, which needs no reader."""

    def __init__(self) -> None:
        self.count = 0
        self._kept: deque[tuple[FleetEvent, int]] = deque()
        self._kept_bytes = 0

    def add(self, event: FleetEvent, size: int) -> None:
        """Add an event, of a payload of this size in bytes; it may push the oldest ones out."""
        self._kept.append((event, size))
        self._kept_bytes += size
        self.count += 1
        while len(self._kept) > MOST_EVENTS or self._kept_bytes > MOST_EVENT_BYTES:
            self._kept_bytes -= self._kept.popleft()[1]

    def since(self, number: int) -> tuple[int, FleetEvent] | None:
        """Return the next event for a reader that has read ``number``, and the number after it.

        None if there is no more. If events were pushed out, that is ``lagged``.
        """
        if number >= self.count:
            return None
        oldest = self.count - len(self._kept)
        if number < oldest:
            return oldest, FleetEvent("", None, "lagged", utc_now(), {"missed": oldest - number})
        return number + 1, self._kept[number - oldest][0]


class Fleet:
    """Hosts and VMs below one base, kept current by `take`. ``hosts`` and ``vms`` are live views.

    ``clock`` is monotonic, ``now`` the wall clock. Beyond MOST_HOSTS and MOST_VMS new ones are ignored.
    """

    def __init__(
        self,
        topics: FleetTopics,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self.events: Final = EventLog()
        self._topics = topics
        self._clock = clock
        self._now = now
        self._hosts: dict[str, _Host] = {}
        self._vms: dict[str, _Vm] = {}
        self.hosts: Final[Mapping[str, FleetHost]] = _View(self._hosts, self._host_record)
        self.vms: Final[Mapping[str, FleetVm]] = _View(self._vms, self._vm_record)

    def take(self, topic: str, payload: bytes, *, retained: bool, content_type: str | None = None) -> bool:
        """Take a message; return False if its topic is none of the fleet's. An invalid one is ignored."""
        published = self._topics.parse(topic)
        if published is None:
            return False
        document: Mapping[str, object] = MappingProxyType({})
        if published.what != "host" and len(payload) > LARGEST_OF_VM:
            return True
        if payload and published.what in ("host", "state", "event"):
            try:
                document = decode_object(payload, content_type)
            except RequestRefused:
                return True
        if published.what == "event":
            if not retained and payload:
                self._take_event(published, document, len(payload))
        elif published.vm is None:
            self._take_host(published, payload, document, is_new=not retained)
        else:
            self._take_vm(published, published.vm, payload, document, is_new=not retained)
        return True

    def incomplete(self) -> list[str]:
        """Return the hosts that say that they have more VMs than are known here with all their topics."""
        known = Counter(
            key.partition("/")[0] for key, vm in self._vms.items() if vm.availability and vm.document
        )
        totals = {name: _vms_of(host.document) for name, host in self._hosts.items()}
        return sorted(name for name, total in totals.items() if total > known[name])

    def _take_event(self, published: Published, document: Mapping[str, object], size: int) -> None:
        word, data = document.get("event"), document.get("data")
        if isinstance(word, str):
            ts = _time(document.get("ts")) or self._now()
            details = MappingProxyType(dict(data) if isinstance(data, Mapping) else {})
            self.events.add(FleetEvent(published.host, published.vm, word, ts, details), size)

    def _take_host(
        self, published: Published, payload: bytes, document: Mapping[str, object], *, is_new: bool
    ) -> None:
        name = published.host
        host = self._hosts.get(name)
        if host is None:
            if not payload or len(self._hosts) >= MOST_HOSTS:
                return
            host = self._hosts[name] = _Host()
        if published.what == "status":
            host.status = payload[:_LONGEST_STATUS].decode(errors="replace")
        else:
            host.document = document
            if payload and is_new:
                host.heard_at_s = self._clock()
                host.status = "online"
        if not host.status and not host.document:
            del self._hosts[name]

    def _take_vm(
        self,
        published: Published,
        name: str,
        payload: bytes,
        document: Mapping[str, object],
        *,
        is_new: bool,
    ) -> None:
        key = f"{published.host}/{name}"
        vm = self._vms.get(key)
        if vm is None:
            if not payload or len(self._vms) >= MOST_VMS:
                return
            vm = self._vms[key] = _Vm()
        if published.what == "availability":
            vm.availability = payload[:_LONGEST_STATUS].decode(errors="replace")
        else:
            vm.document = document
            if is_new and isinstance(health := document.get("health"), str):
                vm.availability = "offline" if health in SILENT else "online"
        if not vm.availability and not vm.document:
            del self._vms[key]

    def _is_online(self, host: _Host | None) -> bool:
        if host is None or host.status != "online":
            return False
        heartbeat_s = _number(host.document.get("heartbeat_s"))
        ages_s = [] if host.heard_at_s is None else [self._clock() - host.heard_at_s]
        if (ts := _time(host.document.get("ts"))) is not None:
            ages_s.append((self._now() - ts).total_seconds())
        if heartbeat_s is None or not ages_s:  # it has no age
            return True
        return min(ages_s) <= HEARTBEATS * heartbeat_s

    def _host_record(self, name: str, host: _Host) -> FleetHost:
        return host_of(name, host.document, online=self._is_online(host))

    def _vm_record(self, key: str, vm: _Vm) -> FleetVm:
        host, _, name = key.partition("/")
        is_online = vm.availability == "online" and self._is_online(self._hosts.get(host))
        made = vm.record
        if made is None or made.online is not is_online or made.document is not vm.document:
            made = vm.record = vm_of(host, name, vm.document, online=is_online)
        return made


def host_of(host: str, document: Mapping[str, object], *, online: bool) -> FleetHost:
    """Return the record of a host object, which is untrusted; ``host`` is its name in topics."""
    texts: dict[str, Any] = {key: _text(document.get(key)) for key in _HOST_TEXTS}
    sizes: dict[str, Any] = {key: _whole(document.get(key)) for key in _HOST_SIZES}
    heartbeat_s = _number(document.get("heartbeat_s"))
    return FleetHost(host=host, online=online, **texts, **sizes, heartbeat_s=heartbeat_s, document=document)


def vm_of(host: str, vm: str, document: Mapping[str, object], *, online: bool) -> FleetVm:
    """Return the record of a VM object, which is untrusted; ``host`` and ``vm`` are names in topics."""
    texts: dict[str, Any] = {key: _text(document.get(key)) for key in _VM_TEXTS}
    sizes: dict[str, Any] = {key: _whole(document.get(key)) for key in _VM_SIZES}
    return FleetVm(
        host=host, vm=vm, online=online, **texts, **sizes, state=state_of(document), document=document
    )


_HOST_TEXTS: Final = ("name", "version", "policy", "mode", "level")
_HOST_SIZES: Final = (
    "budget",
    "reserve",
    "used",
    "available",
    "mem_total",
    "mem_available",
    "reclaimable",
    "room",
)
_VM_TEXTS: Final = ("name", "health", "run_state", "mode", "policy", "why")
_VM_SIZES: Final = ("size", "actual", "target", "floor", "ceiling", "held", "rss")


def _vms_of(document: Mapping[str, object]) -> int:
    vms = document.get("vms")
    return (_whole(vms.get("total")) if isinstance(vms, Mapping) else None) or 0


class _View(Mapping[str, _V]):
    """A mapping whose values are made from others when they are read."""

    def __init__(self, of: Mapping[str, Any], make: Callable[[str, Any], _V]) -> None:
        self._of = of
        self._make = make

    def __getitem__(self, key: str) -> _V:
        return self._make(key, self._of[key])

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._of))

    def __len__(self) -> int:
        return len(self._of)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= _LARGEST_NUMBER else None


def _time(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        return None
    return None if time.tzinfo is None else time
