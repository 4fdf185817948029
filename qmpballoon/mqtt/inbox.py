"""Received requests that wait to be read. No I/O.

They are stored as soon as they arrive: mosquitto drops what it holds for a slow subscriber beyond 1000
messages, whoever sent it. VMs are served in turn, so a flood of requests of one VM delays the others by one
request each.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Final

from qmpballoon.mqtt.commands import LONGEST_CORRELATION, LONGEST_RESPONSE_TOPIC, Message
from qmpballoon.mqtt.turns import Turns
from qmpballoon.protocol.payloads import LARGEST_REQUEST

MOST_MESSAGES: Final = 10_000  # beyond that only of VMs with less than an even share, at most twice as many
MOST_BYTES: Final = 32 * 1024 * 1024
_OWN_BYTES: Final = 500  # of a message without its payload


class Inbox:
    """Messages on command topics, by VM. ``group_of`` returns the VM of a topic, or one word for all others.

    ``dropped`` is called for each message that finds no room.
    """

    def __init__(self, group_of: Callable[[str], str], dropped: Callable[[], None]) -> None:
        self._group_of = group_of
        self._dropped = dropped
        self._waiting: Turns[Message] = Turns()
        self._bytes = 0
        self._arrived = asyncio.Event()

    def put(self, message: Message) -> None:
        """Add a message, or drop it if too many wait."""
        group, size = self._group_of(message.topic), _size(message)
        is_full = len(self._waiting) >= MOST_MESSAGES or self._bytes + size > MOST_BYTES
        if is_full and (self._bytes > 2 * MOST_BYTES or not self._waiting.has_share(group, MOST_MESSAGES)):
            self._dropped()
            return
        self._bytes += size
        self._waiting.put(group, "", _bounded(message))
        self._arrived.set()

    def take(self) -> Message | None:
        """Remove and return the next message, None if there is none."""
        message = self._waiting.take()
        if message is None:
            self._arrived.clear()
        else:
            self._bytes -= _size(message)
        return message

    async def wait(self) -> None:
        """Wait for a message."""
        await self._arrived.wait()


def _size(message: Message) -> int:
    """Return the bytes of a message in memory; those that `_bounded` cuts off do not count."""
    return (
        _OWN_BYTES
        + min(len(message.payload), LARGEST_REQUEST + 1)
        + min(len(message.response_topic or ""), LONGEST_RESPONSE_TOPIC + 1)
        + min(len(message.correlation or b""), LONGEST_CORRELATION + 1)
    )


def _bounded(message: Message) -> Message:
    """Return a message whose parts are not longer than it takes to refuse them as too long."""
    if (
        len(message.payload) <= LARGEST_REQUEST
        and len(message.response_topic or "") <= LONGEST_RESPONSE_TOPIC
        and len(message.correlation or b"") <= LONGEST_CORRELATION
    ):
        return message
    return dataclasses.replace(
        message,
        payload=message.payload[: LARGEST_REQUEST + 1],
        response_topic=message.response_topic and message.response_topic[: LONGEST_RESPONSE_TOPIC + 1],
        correlation=message.correlation and message.correlation[: LONGEST_CORRELATION + 1],
    )
