"""A broker of MQTT 3.1.1 or 5 that ends the connection at what it does not take.

It announces nothing, confirms what it takes, and sends back what is published on a subscribed topic.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from serving import serving

from qmpballoon.lab.broker import HOST


@dataclass(frozen=True, slots=True)
class Published:
    """A PUBLISH as received; ``unconfirmed`` counts those of QoS 1 without a PUBACK, this one included."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    size: int
    unconfirmed: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer to a CONNECT of MQTT 5, and what follows: it closes, resets the connection, or waits.

    ``closes-later``: at the packet that follows the CONNECT.
    """

    answer: bytes
    then: Literal["closes", "resets", "waits", "closes-later"] = "closes"


@dataclass(slots=True)
class ImitatedBroker:
    """``takes`` tells whether a message is taken; else ``reason`` is sent in a DISCONNECT, if there is one.

    ``stops_at`` tells at which message the broker stops as after SIGSTOP: it neither answers nor closes.
    ``takes_will`` gets the will's QoS and retain flag; if it is not taken, the connection ends before its
    CONNACK. ``grants`` gets the number of a SUBSCRIBE, from 1 on; what is not granted is refused without a
    reason. ``refuses_5`` is how a CONNECT of MQTT 5 is refused. What arrived is in ``connects`` (the flags of
    each CONNECT), ``versions`` (its protocol level) and ``published``.
    """

    takes: Callable[[Published], bool]
    reason: int | None = None
    takes_will: Callable[[int, bool], bool] = lambda qos, retain: True
    stops_at: Callable[[Published], bool] = lambda message: False
    grants: Callable[[int], bool] = lambda number: True
    refuses_5: Refusal | None = None
    refuses_311: bool = False
    port: int = 0
    connects: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)
    subscribes: int = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with serving(self._serve, (HOST, 0)) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_5, unconfirmed = False, 0
        while True:
            first, body, size = await _packet(reader)
            kind = first >> 4
            if kind == 1:
                is_5, flags = body[6] == 5, body[7]
                self.connects.append(flags)
                self.versions.append(body[6])
                if is_5 and self.refuses_5 is not None:
                    await _refuse(self.refuses_5, reader, writer)
                    return
                if not is_5 and self.refuses_311:
                    writer.write(b"\x20\x02\0\x01")
                    return
                if not self.takes_will(flags >> 3 & 3, bool(flags & 0x20)):
                    return
                writer.write(b"\x20\x03\0\0\0" if is_5 else b"\x20\x02\0\0")
            elif kind == 8:
                number = _filters(body[2 + is_5 :])
                self.subscribes += 1
                code = 1 if self.grants(self.subscribes) else 0x80
                writer.write(
                    bytes((0x90, 2 + is_5 + number)) + body[:2] + bytes(is_5) + bytes([code] * number)
                )
            elif kind == 3:
                qos = first >> 1 & 3
                unconfirmed += qos
                message = _published(first, body, size, unconfirmed, is_5=is_5)
                self.published.append(message)
                if self.stops_at(message):
                    await asyncio.Event().wait()
                if not self.takes(message):
                    if self.reason is not None:
                        writer.write(bytes((0xE0, 1, self.reason)))
                    return
                if qos:
                    length = int.from_bytes(body[:2], "big")
                    writer.write(b"\x40\x02" + body[2 + length : 4 + length])
                    unconfirmed -= 1
                if message.topic.endswith("/status"):
                    echo = len(message.topic).to_bytes(2, "big") + message.topic.encode() + bytes(is_5)
                    writer.write(bytes((0x30, len(echo) + len(message.payload))) + echo + message.payload)
            elif kind == 12:
                writer.write(b"\xd0\0")
            elif kind == 14:
                return


async def _refuse(refusal: Refusal, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(refusal.answer)
    if refusal.then == "waits":
        await reader.read(-1)  # until the client closes
    elif refusal.then == "closes-later":
        await reader.read(1)
    elif refusal.then == "resets":
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def _published(first: int, body: bytes, size: int, unconfirmed: int, *, is_5: bool) -> Published:
    length, qos = int.from_bytes(body[:2], "big"), first >> 1 & 3
    rest = body[2 + length + 2 * qos :]
    if is_5:
        rest = rest[1 + rest[0] :]  # properties of less than 128 bytes
    return Published(body[2 : 2 + length].decode(), rest, qos, bool(first & 1), size, unconfirmed)


def _filters(body: bytes) -> int:
    number = 0
    while body:
        body = body[3 + int.from_bytes(body[:2], "big") :]
        number += 1
    return number


async def _packet(reader: asyncio.StreamReader) -> tuple[int, bytes, int]:
    """Return a packet's first byte, its content, and its size."""
    first = (await reader.readexactly(1))[0]
    length = shift = 0
    while True:
        byte = (await reader.readexactly(1))[0]
        length |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return first, await reader.readexactly(length), 1 + shift // 7 + length
