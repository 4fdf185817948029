"""The devices that are announced to Home Assistant: one message for the host and one for each VM. Pure.

Home Assistant's MQTT discovery makes a device with its entities of such a message (seen with 2026.2). Each
message lists every component. One that cannot be offered now has its platform only: this removes it, while
one that is left out would stay. ``qos`` is not handed down from the top of a message, so each component has
its own. Templates hold no text that comes from a VM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from qmpballoon.log import one_line
from qmpballoon.model.records import VmStatus
from qmpballoon.mqtt.topics import Topics
from qmpballoon.protocol.fields import (
    HOST_FIELDS,
    NO_PROBLEM,
    PROBLEM_LEVELS,
    VM_FIELDS,
    Field,
    Shown,
)
from qmpballoon.protocol.objects import Agent
from qmpballoon.protocol.payloads import encode
from qmpballoon.units import MIB

Component: TypeAlias = dict[str, object]

QOS: Final = 1
ORIGIN: Final = "qmpballoon"
_LONGEST_NAME: Final = 100  # characters of a device's name
_NOT_IN_ENTITY_IDS: Final = re.compile(r"[^a-z0-9]+")

_CATEGORIES: Final = {"main": None, "config": "config", "diagnostic": "diagnostic"}


@dataclass(frozen=True, slots=True)
class _Derived:
    """An entity whose value is made of several keys. ``template`` is Jinja."""

    key: str
    platform: str
    template: str
    shown: Shown
    details: tuple[tuple[str, object], ...]


def _words(words: tuple[str, ...]) -> str:
    return "(" + ", ".join(f"'{word}'" for word in words) + ")"


_PROBLEM: Final = (("device_class", "problem"),)
_VM_DERIVED: Final = (
    _Derived(
        "problem",
        "binary_sensor",
        f"{{{{ 'OFF' if value_json.health in {_words(NO_PROBLEM)} else 'ON' }}}}",
        Shown("Problem", "diagnostic"),
        _PROBLEM,
    ),
)
_HOST_DERIVED: Final = (
    _Derived(
        "budget_used_percent",
        "sensor",
        "{{ (100 * value_json.used / value_json.budget) | round(1) if value_json.budget else None }}",
        Shown("Budget used, share"),
        (("unit_of_measurement", "%"), ("state_class", "measurement"), ("suggested_display_precision", 0)),
    ),
    _Derived(
        "problem",
        "binary_sensor",
        f"{{{{ 'ON' if value_json.alarms or value_json.level in {_words(PROBLEM_LEVELS)} else 'OFF' }}}}",
        Shown("Problem", "diagnostic"),
        _PROBLEM,
    ),
)


class HomeAssistant:
    """Makes the messages of one agent; ``agent.host`` is the one of ``topics``."""

    def __init__(self, topics: Topics, agent: Agent) -> None:
        self._topics = topics
        self._agent = agent

    def topic(self, vm: str | None) -> str:
        """Return the topic on which a VM is announced, or the host where ``vm`` is None."""
        return self._topics.device(vm)

    def host_message(self) -> str:
        """Return the message that announces the host."""
        agent = self._agent
        device = {
            "name": _named(agent.name, agent.host),
            "manufacturer": ORIGIN,
            "model": "QEMU host",
            "sw_version": agent.version,
        }
        components = dict(_components(HOST_FIELDS, _HOST_DERIVED, self._topics.root, {}))
        return self._message(None, device, self._topics.host_object, components)

    def vm_message(self, record: VmStatus) -> str:
        """Return the message that announces a VM; it depends on `announced_facts` alone."""
        device: dict[str, object] = {
            "name": _named(record.name, record.id),
            "manufacturer": "QEMU",
            "model": "Virtual machine",
            "via_device": self._topics.device_id(None),
        }
        if record.qemu is not None:
            device["sw_version"] = f"QEMU {one_line(record.qemu)}"[:_LONGEST_NAME]
        bounds = {"floor": record.limits.floor, "ceiling": record.limits.ceiling}
        place = self._topics.place(record.id)
        components = dict(_components(VM_FIELDS, _VM_DERIVED, place, bounds))
        return self._message(record.id, device, self._topics.state(record.id), components)

    def _message(
        self,
        vm: str | None,
        device: Mapping[str, object],
        state_topic: str,
        components: Mapping[str, Component],
    ) -> str:
        """Return a message as text, which is sent whole or not at all, whatever the broker's limits are."""
        name = self._topics.device_id(vm)
        available = [self._topics.status] + ([] if vm is None else [self._topics.availability(vm)])
        slug = _slug(self._agent.host) + ("" if vm is None else f"_{_slug(vm)}")
        for key, component in components.items():
            if len(component) > 1:
                component["unique_id"] = f"{name}_{key}"
                component["default_entity_id"] = f"{component['platform']}.{slug}_{key}"
        message = {
            "device": {"identifiers": [name], **device},
            "origin": {"name": ORIGIN, "sw_version": self._agent.version},
            "availability": [{"topic": topic} for topic in available],
            "availability_mode": "all",
            "state_topic": state_topic,
            "components": components,
        }
        return encode(message, "json").decode("ascii")


def announced_facts(record: VmStatus) -> tuple[object, ...]:
    """Return what the message of a VM depends on: it is sent again when this changes."""
    return record.name, record.limits.floor, record.limits.ceiling, record.qemu


def _components(
    fields: tuple[Field, ...], derived: tuple[_Derived, ...], place: str, bounds: Mapping[str, int | None]
) -> Iterator[tuple[str, Component]]:
    for field in fields:
        if field.shown is not None:
            yield field.key, _component(field, field.shown, place, bounds)
    for one in derived:
        yield (
            one.key,
            {
                "platform": one.platform,
                "value_template": one.template,
                **dict(one.details),
                **_presented(one.shown),
            },
        )


def _component(field: Field, shown: Shown, place: str, bounds: Mapping[str, int | None]) -> Component:
    make = _WRITABLE[field.kind] if field.write is not None else _sensor
    component = make(field, bounds)
    if len(component) == 1:
        return component
    if field.write is not None:
        component["command_topic"] = f"{place}/{field.write.topic}"
    return component | _presented(shown)


def _presented(shown: Shown) -> Component:
    presented: Component = {"name": shown.name, "qos": QOS}
    if (category := _CATEGORIES[shown.role]) is not None:
        presented["entity_category"] = category
    if not shown.by_default:
        presented["enabled_by_default"] = False
    return presented


def _sensor(field: Field, bounds: Mapping[str, int | None]) -> Component:
    value = f"value_json.{field.path}"
    sensor: Component = {"platform": "sensor", "value_template": f"{{{{ {value} }}}}"}
    match field.kind:
        case "bytes":
            sensor["value_template"] = (
                f"{{{{ ({value} / {MIB}) | round(2) if {value} is number else None }}}}"
            )
            sensor |= {
                "device_class": "data_size",
                "unit_of_measurement": "MiB",
                "state_class": "measurement",
                "suggested_display_precision": 0,
            }
        case "percent":
            sensor |= {"unit_of_measurement": "%", "state_class": "measurement"}
        case "whole":
            sensor["state_class"] = "measurement"
        case "word":
            sensor |= {"device_class": "enum", "options": list(field.words)}
        case "stamp":
            sensor["device_class"] = "timestamp"
    return sensor


def _number(field: Field, bounds: Mapping[str, int | None]) -> Component:
    """Return a number in MiB between two other values, or only the platform while they leave no choice.

    Home Assistant drops a value outside of the bounds with an error in its log, so such a value is unknown
    there.
    """
    least, most = (bounds[key] for key in (field.least, field.most) if key is not None)
    if least is None or most is None or least >= most:
        return {"platform": "number"}
    value = f"value_json.{field.path}"
    return {
        "platform": "number",
        "value_template": (
            f"{{{{ {value} / {MIB} if {value} is number and {least} <= {value} <= {most} else None }}}}"
        ),
        "command_template": "{{ value }}MiB",
        "min": _in_mib(least),
        "max": _in_mib(most),
        "step": 1,
        "mode": "slider",
        "device_class": "data_size",
        "unit_of_measurement": "MiB",
    }


def _select(field: Field, bounds: Mapping[str, int | None]) -> Component:
    select: Component = {
        "platform": "select",
        "value_template": f"{{{{ value_json.{field.path} }}}}",
        "options": list(field.words),
    }
    if field.write is not None and field.write.argument is not None:
        select["command_template"] = f'{{"{field.write.argument}": "{{{{ value }}}}"}}'
    return select


_WRITABLE: Final[Mapping[str, Callable[[Field, Mapping[str, int | None]], Component]]] = {
    "bytes": _number,
    "word": _select,
}


def _in_mib(size: int) -> int | float:
    """Return a size in MiB, whole where it is; exact, because sizes are multiples of 4 KiB."""
    return size // MIB if size % MIB == 0 else size / MIB


def _slug(name: str) -> str:
    return _NOT_IN_ENTITY_IDS.sub("_", name.lower()).strip("_") or "x"


def _named(name: str, safe: str) -> str:
    return one_line(name)[:_LONGEST_NAME].strip() or safe
