"""Checks of published payloads against the schemas, without any key that a schema does not name."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft7Validator, FormatChecker

from qmpballoon.protocol.schemas import schemas


def strict(schema: Any) -> Any:
    """Return a schema whose objects have no other keys than it names, unless it says that they may."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inside = {key: strict(value) for key, value in schema.items()}
    is_object = "object" in (schema["type"] if isinstance(schema.get("type"), list) else [schema.get("type")])
    if is_object and "properties" in schema and "allOf" not in schema:
        inside.setdefault("additionalProperties", False)
    return inside


@functools.cache
def validator(name: str) -> Draft7Validator:
    """Return the strict validator of a schema by name."""
    return Draft7Validator(strict(schemas()[name]), format_checker=FormatChecker())


def check(name: str, value: object) -> None:
    """Fail unless the value is valid by the schema of that name."""
    errors = [f"{error.json_path}: {error.message}" for error in validator(name).iter_errors(value)]
    assert not errors, f"{name}: {errors}: {value}"


def check_event(value: Mapping[str, object]) -> None:
    """Fail unless an event is valid, and its word is one of the table."""
    name = "host-event" if value["vm"] is None else "vm-event"
    assert value["event"] in schemas()[name]["properties"]["event"]["examples"], value
    check(name, value)


def schema_of(topic: str, root: str) -> str | None:
    """Return the name of the schema of a topic below an agent's root, None if it has none."""
    match topic.removeprefix(f"{root}/").split("/"):
        case ["status"] | ["vm", _, "availability"]:
            return "availability"
        case [("host" | "vms" | "samples") as name]:
            return name
        case ["event"]:
            return "host-event"
        case ["vm", _, "state"]:
            return "vm"
        case ["vm", _, "event"]:
            return "vm-event"
        case ["vm", _, "response", verb]:
            return f"vm.{verb}.response"
        case ["response", verb]:
            return f"host.{verb}.response"
    return None


def check_published(topic: str, payload: bytes, root: str) -> str | None:
    """Check a payload that an agent published; return its schema's name, None where it has none."""
    name = schema_of(topic, root)
    if name is None or not payload or name not in schemas():
        return None
    value: Any = payload.decode() if name == "availability" else json.loads(payload)
    if name.endswith("-event"):
        check_event(value)
    else:
        check(name, value)
    return name
