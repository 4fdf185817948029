"""The AsyncAPI document of everything that an agent publishes and takes over MQTT. Pure."""

from __future__ import annotations

from typing import Any, Final

from qmpballoon.protocol.schemas import Schema, schemas
from qmpballoon.protocol.verbs import VERBS

SPECIFICATION: Final = "3.0.0"
_HOST: Final = "{base}/{host}"
_VM: Final = f"{_HOST}/vm/{{vm}}"
_PARAMETERS: Final[Schema] = {
    "base": {"description": "The agents' base_topic; may have several levels.", "default": "qmpballoon"},
    "host": {"description": "The host's name; characters outside A-Za-z0-9_- are replaced by _."},
    "vm": {"description": "The VM's name in topics, made safe in the same way; unique on its host."},
}
_ABOUT: Final = """\
Agents of qmpballoon publish the state of hosts and VMs, and answer requests. The operations are those of an
agent. A retained message that is empty removes what was there: a VM or host that is gone. Readers ignore keys
and event words that they do not know; while `schema` is 1, keys are added, and none is removed or changes
its type or meaning. Payloads are JSON, or msgpack with the same values where an agent is configured so."""


def asyncapi_document(version: str) -> Schema:
    """Return the AsyncAPI document; ``version`` is the program's."""
    document = _Document()
    document.published("status", f"{_HOST}/status", "availability", "Whether the agent runs; the last will.")
    document.published("host", f"{_HOST}/host", "host", "The host, at changes and every heartbeat.")
    document.published("vms", f"{_HOST}/vms", "vms", "The list of VMs.")
    document.published(
        "vmAvailability", f"{_VM}/availability", "availability", "Whether the VM's monitor answers."
    )
    document.published("vmState", f"{_VM}/state", "vm", "The VM, at changes and every heartbeat.")
    document.published("vmEvent", f"{_VM}/event", "vm-event", "What happened to a VM.", retain=False)
    document.published("hostEvent", f"{_HOST}/event", "host-event", "What happened to a host.", retain=False)
    document.published(
        "samples",
        f"{_HOST}/samples",
        "samples",
        "The figures of all VMs per tick, for recorders; off by default.",
        retain=False,
        qos=0,
    )
    for scope, verbs in VERBS.items():
        for verb in verbs:
            document.asked(scope, _HOST if scope == "host" else _VM, verb)
    document.set_target()
    return {
        "asyncapi": SPECIFICATION,
        "info": {
            "title": "qmpballoon",
            "version": version,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "broker": {
                "host": "localhost:1883",
                "protocol": "mqtt",
                "description": "Any broker of MQTT 5 or 3.1.1 that retains messages.",
            }
        },
        "channels": document.channels,
        "operations": document.operations,
        "components": {"messages": document.messages, "schemas": schemas()},
    }


class _Document:
    """The parts of the document that grow with each topic."""

    def __init__(self) -> None:
        self.channels: dict[str, Any] = {}
        self.operations: dict[str, Any] = {}
        self.messages: dict[str, Any] = {}

    def published(
        self, name: str, address: str, schema: str, about: str, *, retain: bool = True, qos: int = 1
    ) -> None:
        """Add a topic that the agent publishes on."""
        content_type = "text/plain" if schema == "availability" else "application/json"
        self._channel(name, address, about, {"payload": _schema(schema), "contentType": content_type})
        self.operations[f"publish.{name}"] = {
            "action": "send",
            "channel": _channel(name),
            "messages": [_message(name)],
            "bindings": {"mqtt": {"qos": qos, "retain": retain, "bindingVersion": "0.2.0"}},
        }

    def asked(self, scope: str, place: str, verb: str) -> None:
        """Add the topics of a verb's requests and of their answers."""
        name = f"{scope}.{verb}"
        correlation = {"location": "$message.payload#/transaction"}
        for part in ("request", "response"):
            message = {"payload": _schema(f"{name}.{part}"), "correlationId": correlation}
            about = f"{part.capitalize()}s `{verb}` of a {'VM' if scope == 'vm' else 'host'}."
            self._channel(f"{name}.{part}", f"{place}/{part}/{verb}", about, message)
        self.operations[f"answer.{name}"] = {
            "action": "receive",
            "channel": _channel(f"{name}.request"),
            "messages": [_message(f"{name}.request")],
            "description": "Never retained. Of MQTT 5, response topic, correlation data and expiry count.",
            "reply": {
                "channel": _channel(f"{name}.response"),
                "messages": [_message(f"{name}.response")],
            },
            "bindings": {"mqtt": {"qos": 1, "retain": False, "bindingVersion": "0.2.0"}},
        }

    def set_target(self) -> None:
        """Add the topic of a bare size."""
        name = "vm.target-set"
        payload = {"description": "A size, or `auto`.", "type": ["string", "integer"]}
        about = "A bare size or `auto`: answered as request/set-target or request/set-mode."
        self._channel(name, f"{_VM}/target/set", about, {"payload": payload, "contentType": "text/plain"})
        self.operations["answer.vm.target-set"] = {
            "action": "receive",
            "channel": _channel(name),
            "messages": [_message(name)],
            "reply": {
                "channel": _channel("vm.set-target.response"),
                "messages": [_message("vm.set-target.response")],
            },
            "bindings": {"mqtt": {"qos": 1, "retain": False, "bindingVersion": "0.2.0"}},
        }

    def _channel(self, name: str, address: str, about: str, message: Schema) -> None:
        self.messages[name] = {"name": name, "summary": about, **message}
        self.channels[name] = {
            "address": address,
            "description": about,
            "messages": {name: {"$ref": f"#/components/messages/{name}"}},
            "parameters": {key: value for key, value in _PARAMETERS.items() if f"{{{key}}}" in address},
        }


def _schema(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _channel(name: str) -> Schema:
    return {"$ref": f"#/channels/{name}"}


def _message(name: str) -> Schema:
    return {"$ref": f"#/channels/{name}/messages/{name}"}
