"""Translates messages on command topics to requests. Pure.

Everything specific to MQTT is handled here: the topic ``target/set``, the retain flag, response topics,
correlation data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from qmpballoon.errors import RequestRefused
from qmpballoon.mqtt.outbox import Answer
from qmpballoon.mqtt.topics import Command, Topics
from qmpballoon.protocol.payloads import decode_request, request_format
from qmpballoon.protocol.requests import Arrival


@dataclass(frozen=True, slots=True)
class Message:
    """A message as received; fields that only MQTT 5 has are None on 3.1.1."""

    topic: str
    payload: bytes
    retain: bool = False
    content_type: str | None = None
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None


def arrival_of(
    message: Message, topics: Topics, send: Callable[[Answer], None], clock: Callable[[], float]
) -> Arrival | None:
    """Return the request that a message carries, or None if it carries none.

    That is so if its topic is no command topic, and if the payload on ``target/set`` is empty: this clears a
    retained message. Elsewhere an empty payload is a request without arguments.

    ``send`` sends the answer and must not wait; ``clock`` (monotonic) is for the time in the answer.
    """
    command = topics.parse(message.topic)
    if command is None or (command.bare and not message.payload):
        return None
    verb = _verb(command, message)
    topic = topics.response(command.vm, verb, message.response_topic)
    payload_format = request_format(message.payload, message.content_type)

    def reply(response: Mapping[str, object]) -> None:
        send(Answer(topic, response, payload_format, message.correlation, clock()))

    refused = None
    if message.retain:
        reason = "commands must not be retained: publish without the retain flag"
        refused = RequestRefused("retained", reason)
    return Arrival(
        channel=message.topic,
        vm=command.vm,
        verb=verb,
        payload=message.payload,
        reply=reply,
        content_type=message.content_type,
        expiry_s=message.expiry_s,
        refused=refused,
    )


def _verb(command: Command, message: Message) -> str:
    """Return the requested verb: ``auto`` on the topic ``target/set`` means ``set-mode``."""
    if command.bare:
        with suppress(RequestRefused):  # an invalid payload is answered under set-target
            if decode_request(message.payload, message.content_type).bare == "auto":
                return "set-mode"
    return command.verb
