"""Turns a publication into the packet that is sent: encoded, and no larger than the broker takes. Pure.

What is too large is made smaller. An answer becomes an error that fits, without its correlation data if need
be. In a retained object the largest lists and objects are emptied and named in its key ``cut``; another
retained value becomes empty, because the value before would be wrong by now. Events and samples are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from paho.mqtt.properties import Properties, VariableByteIntegers

from qmpballoon.mqtt.answers import Answer
from qmpballoon.mqtt.limits import Limits, packet_size
from qmpballoon.mqtt.outbox import Publication
from qmpballoon.protocol.payloads import CONTENT_TYPES, Format, encode

MOST_LOST: Final = 3  # times that the connection broke while an answer was sent

Loss: TypeAlias = Literal["", "replaced", "cut", "emptied", "left-out"]
"""What was done to make a message fit."""


_CONTENT_TYPE: Final = 3  # identifiers of properties, MQTT 5 section 2.2.2.2
_CORRELATION_DATA: Final = 9


class PackedProperties(Properties):
    """Properties of a PUBLISH that are packed already: paho needs 40 to 100 µs to make and pack its own."""

    def __init__(self, content_type: str, correlation: bytes | None = None) -> None:
        packed = _property(_CONTENT_TYPE, content_type.encode())
        if correlation is not None:
            packed += _property(_CORRELATION_DATA, correlation)
        length: bytes = VariableByteIntegers.encode(len(packed))  # type: ignore[no-untyped-call]
        object.__setattr__(self, "packed", length + packed)

    def pack(self) -> bytes:
        """Return the packed properties."""
        packed: bytes = object.__getattribute__(self, "packed")
        return packed


def _property(identifier: int, value: bytes) -> bytes:
    return bytes((identifier,)) + len(value).to_bytes(2, "big") + value


_CONTENT_TYPES: Final = {name: PackedProperties(media_type) for name, media_type in CONTENT_TYPES.items()}


@dataclass(frozen=True, slots=True)
class Packet:
    """A message as it is sent; ``size`` is that of the whole packet, in bytes."""

    publication: Publication
    payload: bytes
    properties: Properties | None
    size: int


@dataclass(frozen=True, slots=True)
class Composer:
    """Makes packets for one connection; ``payload_format`` is that of objects other than answers."""

    limits: Limits
    payload_format: Format
    mqtt5: bool

    def compose(self, publication: Publication) -> tuple[Packet | None, Loss]:
        """Return the packet of a publication, None if none fits, and what was done to make it fit."""
        publication = self._allowed(publication)
        answer = publication.answer
        if answer is not None:
            return self._answer(publication, answer)
        value = None if publication.make is None else publication.make()
        packet = self._packet(publication, value)
        if self.limits.takes(packet.size):
            return packet, ""
        if not publication.retain:
            return None, "left-out"
        if isinstance(value, dict):
            smaller = self._cut(publication, value)
            if smaller is not None:
                return smaller, "cut"
        packet = self._packet(publication, None)
        return (packet, "emptied") if self.limits.takes(packet.size) else (None, "left-out")

    def _allowed(self, publication: Publication) -> Publication:
        """Return the publication at a QoS and with a retain flag that the broker takes."""
        if publication.qos <= self.limits.qos and (self.limits.retain or not publication.retain):
            return publication
        return dataclasses.replace(
            publication,
            qos=min(publication.qos, self.limits.qos),
            retain=publication.retain and self.limits.retain,
        )

    def _answer(self, publication: Publication, answer: Answer) -> tuple[Packet | None, Loss]:
        if answer.times_lost < MOST_LOST:
            packet = self._packet(publication, answer.value, answer)
            if self.limits.takes(packet.size):
                return packet, ""
            reason = f"the answer has {packet.size} bytes, and the broker takes {self.limits.packet} at most"
        else:
            reason = f"the connection to the broker broke {answer.times_lost} times while the answer was sent"
            publication = dataclasses.replace(publication, topic=answer.own_topic)
        value = _shortened(answer.value, reason)
        for correlation in (answer.correlation, None):
            smaller = dataclasses.replace(answer, value=value, correlation=correlation)
            packet = self._packet(publication, value, smaller)
            if self.limits.takes(packet.size):
                return packet, "replaced"
        return None, "left-out"

    def _packet(self, publication: Publication, value: object, answer: Answer | None = None) -> Packet:
        payload_format = self.payload_format if answer is None else answer.payload_format
        content_type, correlation = "", b""
        properties: PackedProperties | None = None
        if value is None or isinstance(value, str):
            payload = b"" if value is None else value.encode("utf-8", "replace")
        else:
            payload = encode(value, payload_format)
            if self.mqtt5:
                content_type, properties = CONTENT_TYPES[payload_format], _CONTENT_TYPES[payload_format]
                if answer is not None and answer.correlation is not None:
                    correlation = answer.correlation
                    properties = PackedProperties(content_type, correlation)
        size = packet_size(publication.topic, payload, content_type, correlation)
        return Packet(publication, payload, properties, size)

    def _cut(self, publication: Publication, value: Mapping[str, object]) -> Packet | None:
        """Return a packet in which lists and objects are empty, as few as it takes, the largest first."""
        parts = {key: part for key, part in value.items() if isinstance(part, list | dict) and part}
        sizes = {key: len(encode(part, self.payload_format)) for key, part in parts.items()}
        smaller: dict[str, object] = {**value, "cut": []}
        cut: list[str] = []
        for key in sorted(sizes, key=sizes.__getitem__, reverse=True):
            cut.append(key)
            smaller |= {key: type(parts[key])(), "cut": cut}
            packet = self._packet(publication, smaller)
            if self.limits.takes(packet.size):
                return packet
        return None


def _shortened(response: Mapping[str, object], reason: str) -> Mapping[str, object]:
    """Return a response as an error of few bytes; a refusal keeps its word."""
    match response.get("error"):
        case {"code": code}:
            error = {"code": code, "message": reason}
        case _:
            error = {"code": "too-large", "message": f"it was carried out, but {reason}"}
    return {**response, "status": "error", "result": None, "error": error}
