"""Translates messages on command topics to requests. Pure.

Everything specific to MQTT is handled here: the topic ``target/set``, the retain flag, response topics,
correlation data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from qmpballoon.errors import RequestRefused
from qmpballoon.mqtt.answers import Answer
from qmpballoon.mqtt.topics import Command, Topics
from qmpballoon.protocol.payloads import decode_request, request_format
from qmpballoon.protocol.requests import Arrival

LONGEST_CORRELATION: Final = 1024  # bytes; it is repeated in the answer, which the broker must take
LONGEST_RESPONSE_TOPIC: Final = 1024  # characters


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
    message: Message,
    topics: Topics,
    send: Callable[[Answer], None],
    clock: Callable[[], float],
    group: str = "",
) -> Arrival | None:
    """Return the request that a message carries, or None if it carries none.

    That is so if its topic is no command topic, and if the payload on ``target/set`` is empty: this clears a
    retained message. Elsewhere an empty payload is a request without arguments.

    ``send`` sends the answer and must not wait; ``clock`` (monotonic) is for the times in the answer. The
    groups of answers have their turns (see `Answers`).
    """
    command = topics.parse(message.topic)
    if command is None or (command.bare and not message.payload):
        return None
    verb = _verb(command, message)
    own_topic = topic = topics.response(command.vm, verb)
    correlation = message.correlation
    refused = None
    if len(message.response_topic or "") > LONGEST_RESPONSE_TOPIC:
        reason = f"a response topic has at most {LONGEST_RESPONSE_TOPIC} characters"
        refused = RequestRefused("malformed", f"{reason}; answered on {own_topic}")
    else:
        topic = topics.response(command.vm, verb, message.response_topic)
    if len(correlation or b"") > LONGEST_CORRELATION:
        reason = f"correlation data has at most {LONGEST_CORRELATION} bytes; it is left out of this answer"
        refused, correlation = RequestRefused("malformed", reason), None
    if message.retain:
        reason = "commands must not be retained: publish without the retain flag"
        refused = RequestRefused("retained", reason)
    payload_format = request_format(message.payload, message.content_type)
    asked_at_s = clock()

    def reply(response: Mapping[str, object]) -> None:
        answer = Answer(topic, response, payload_format, correlation, clock(), asked_at_s, own_topic, group)
        send(answer)

    return Arrival(
        channel=message.topic,
        asker=message.response_topic or "",
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
