"""The topics of one agent, which request a topic means, and where it may be answered. Pure.

The names of hosts and VMs in topics are made safe by `safe_name`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from paho.mqtt.client import topic_matches_sub

from qmpballoon.model.names import mirrored, safe_name

LONGEST_TOPIC: Final = 65535  # bytes of UTF-8, MQTT 5 section 1.5.4
MOST_LEVELS: Final = 100
DISCOVERY_PREFIX: Final = "homeassistant"
"""Home Assistant's own default."""

_FOREIGN: Final = (DISCOVERY_PREFIX, "qmpballoon")
"""Topics below which other programs, and agents with the default base, act on messages."""

_NON_CHARACTERS: Final = "".join(
    chr(plane + last) for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF)
)
_NEVER_IN_TOPICS: Final = re.compile(f"[#+\\x00-\\x1f\\x7f-\\x9f\ufdd0-\ufdef{_NON_CHARACTERS}]")


def is_publishable(topic: str) -> bool:
    """Tell whether a client may publish to ``topic`` without being disconnected by its broker.

    Not empty, no wildcard, 65535 bytes and 100 levels at most, no control characters, no non-characters.
    mosquitto 2.0.11 ends the connection at more than 200 levels and at such characters (seen).
    """
    if not topic or topic.count("/") >= MOST_LEVELS or _NEVER_IN_TOPICS.search(topic):
        return False
    try:
        return len(topic.encode()) <= LONGEST_TOPIC
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8
        return False


@dataclass(frozen=True, slots=True)
class Command:
    """What a command topic means; ``vm`` None: the host. ``bare``: the topic ``target/set``."""

    vm: str | None
    verb: str
    bare: bool = False


class Topics:
    """Every topic of one agent, under ``<base>/<host made safe>``.

    ``response_topics`` are MQTT filters; a request is answered on its MQTT 5 response topic if one matches.
    ``discovery_prefix`` is where Home Assistant looks for devices and publishes its own status.

    Raises:
        ValueError: nothing can be published under ``base`` or ``discovery_prefix``.
    """

    def __init__(
        self,
        base: str,
        host: str,
        response_topics: Iterable[str] = ("#",),
        discovery_prefix: str = DISCOVERY_PREFIX,
    ) -> None:
        for start in (base, discovery_prefix):
            if not is_publishable(start) or start.startswith(("/", "$")) or start.endswith("/"):
                raise ValueError(
                    f"{start!r} cannot be the base of topics: no wildcards, no / at its ends, no $"
                )
        self.base: Final = base
        self.host: Final = safe_name(host)
        self.root: Final = f"{base}/{self.host}"
        self.status: Final = f"{self.root}/status"
        self.host_object: Final = f"{self.root}/host"
        self.vms: Final = f"{self.root}/vms"
        self.samples: Final = f"{self.root}/samples"
        self.birth: Final = f"{discovery_prefix}/status"
        self.devices: Final = f"{discovery_prefix}/device/+/config"
        self._discovery_prefix: Final = discovery_prefix
        self._vm_prefix: Final = f"{self.root}/vm/"
        self._host_requests: Final = f"{self.root}/request/"
        self._response_topics: Final = tuple(response_topics)

    def place(self, vm: str | None) -> str:
        """Return the topic below which a VM has its topics, or the host where ``vm`` is None."""
        return self.root if vm is None else f"{self._vm_prefix}{vm}"

    def device_id(self, vm: str | None) -> str:
        """Return the id by which Home Assistant knows a VM, or the host where ``vm`` is None."""
        return f"qmpballoon_{self.host}" + ("" if vm is None else f"_{vm}")

    def device(self, vm: str | None) -> str:
        """Return the topic on which a VM is announced to Home Assistant, or the host."""
        return self.devices.replace("+", self.device_id(vm))

    def device_of(self, topic: str) -> str | None:
        """Return the id of the device that a topic announces to Home Assistant, None if it announces none."""
        before, after = self.devices.split("+")
        name = topic.removeprefix(before).removesuffix(after)
        return name if "/" not in name and topic == f"{before}{name}{after}" else None

    def availability(self, vm: str) -> str:
        """Return the topic of the VM's availability: whether its monitor answers."""
        return f"{self._vm_prefix}{vm}/availability"

    def state(self, vm: str) -> str:
        """Return the topic of the VM object."""
        return f"{self._vm_prefix}{vm}/state"

    def event(self, vm: str | None) -> str:
        """Return the topic of a VM's events, or of the host's where ``vm`` is None."""
        return f"{self.root}/event" if vm is None else f"{self._vm_prefix}{vm}/event"

    def request(self, vm: str | None, verb: str) -> str:
        """Return the topic of a request of a VM, or of the host where ``vm`` is None."""
        return f"{self._host_requests}{verb}" if vm is None else f"{self._vm_prefix}{vm}/request/{verb}"

    def tree(self, vm: str | None = None) -> str:
        """Return the filter of all topics of a VM, or of the host with its VMs."""
        return f"{self.root}/#" if vm is None else f"{self._vm_prefix}{vm}/#"

    def is_of_host(self, payload: bytes) -> bool:
        """Tell whether a device announced to Home Assistant uses topics of this host."""
        root = self.root.encode()
        return any(root + end in payload for end in (b"/", b'"'))

    def subscriptions(self) -> tuple[str, ...]:
        """Return the filters of all command topics."""
        return (
            f"{self._vm_prefix}+/target/set",
            f"{self._vm_prefix}+/request/+",
            f"{self._host_requests}+",
        )

    def retained(self) -> tuple[str, ...]:
        """Return the filters of the retained topics, `status` and those for Home Assistant excepted."""
        return (
            self.host_object,
            self.vms,
            f"{self._vm_prefix}+/availability",
            f"{self._vm_prefix}+/state",
        )

    def is_retained(self, topic: str) -> bool:
        """Tell whether a topic matches a filter of `retained`."""
        if topic in (self.host_object, self.vms):
            return True
        _, _, kind = topic.removeprefix(self._vm_prefix).partition("/")
        return topic.startswith(self._vm_prefix) and kind in ("availability", "state")

    def parse(self, topic: str) -> Command | None:
        """Return the command of ``topic``, or None if it is no command topic of this agent."""
        if topic.startswith(self._host_requests):
            verb = topic[len(self._host_requests) :]
            return None if "/" in verb else Command(None, verb)
        if not topic.startswith(self._vm_prefix):
            return None
        match topic[len(self._vm_prefix) :].split("/"):
            case [vm, "target", "set"]:
                return Command(vm, "set-target", bare=True)
            case [vm, "request", verb]:
                return Command(vm, verb)
        return None

    def vm_of(self, topic: str) -> str:
        """Return the VM of a command topic; empty for all topics of the host and others."""
        if not topic.startswith(self._vm_prefix):
            return ""
        return topic[len(self._vm_prefix) :].partition("/")[0]

    def response(self, vm: str | None, verb: str, requested: str | None = None) -> str:
        """Return where a request is answered.

        ``requested`` is the MQTT 5 response topic. It is used where the filters allow it, but never
        below the base, the default base, the prefix of Home Assistant or ``$``: a requester could otherwise
        make the agent send commands to another agent, overwrite a state or announce a device. The names of a
        VM or verb that do not exist are repeated, made safe where necessary.
        """
        if requested is not None and self._may_answer_on(requested):
            return requested
        place = self.place(None if vm is None else mirrored(vm))
        return f"{place}/response/{mirrored(verb)}"

    def _may_answer_on(self, topic: str) -> bool:
        return (
            is_publishable(topic)
            and not topic.startswith("$")  # reserved for the broker
            and not any(is_below(topic, tree) for tree in (self.base, self._discovery_prefix, *_FOREIGN))
            and any(topic_matches_sub(one, topic) for one in self._response_topics)
        )


@dataclass(frozen=True, slots=True)
class Published:
    """What an agent publishes on a topic; ``vm`` None: about the host.

    ``what`` is ``status``, ``host``, ``availability``, ``state`` or ``event``.
    """

    host: str
    vm: str | None
    what: str


class FleetTopics:
    """The topics of all agents below one base, as a reader sees them.

    Raises:
        ValueError: nothing can be published under ``base``.
    """

    def __init__(self, base: str) -> None:
        Topics(base, "any")
        self.base: Final = base
        self.filters: Final = (
            f"{base}/+/status",
            f"{base}/+/host",
            f"{base}/+/event",
            f"{base}/+/vm/+/availability",
            f"{base}/+/vm/+/state",
            f"{base}/+/vm/+/event",
        )

    def of_vms(self, host: str) -> tuple[str, ...]:
        """Return the filters of what is retained of a host's VMs."""
        return tuple(f"{self.base}/{host}/vm/+/{what}" for what in ("availability", "state"))

    def parse(self, topic: str) -> Published | None:
        """Return what is published on a topic, None if no agent publishes there."""
        if not topic.startswith(f"{self.base}/"):
            return None
        match topic[len(self.base) + 1 :].split("/"):
            case [host, "status" | "host" | "event" as what] if host == safe_name(host):
                return Published(host, None, what)
            case [host, "vm", vm, "availability" | "state" | "event" as what] if (host, vm) == (
                safe_name(host),
                safe_name(vm),
            ):
                return Published(host, vm, what)
        return None

    def responses(self, host: str, vm: str | None, verb: str) -> str:
        """Return the filter of the answers to a verb: those of the host, or of all its VMs."""
        place = f"{self.base}/{host}" if vm is None else f"{self.base}/{host}/vm/+"
        return f"{place}/response/{verb}"

    def replies(self, client_id: str) -> str:
        """Return the MQTT 5 response topic of a client: beside the base, where no agent acts on messages."""
        return f"{self.base}-replies/{client_id}"


def is_below(topic: str, tree: str) -> bool:
    """Tell whether a topic is ``tree`` or one below it."""
    return topic == tree or topic.startswith(f"{tree}/")
