"""A QMP server whose every byte the test decides, and a session with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from serving import serving

from qmpballoon.qmp.client import EventSink, Session
from qmpballoon.qmp.monitor import open_monitor

PATIENCE_S = 60.0  # for what takes milliseconds on an idle machine
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""},'
    b' "capabilities": ["oob"]}}\r\n'
)
NEGOTIATED = b'{"return": {}, "id": 0}\r\n'


class Line:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._received = ""

    async def send(self, raw: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(raw)
        await self._writer.drain()

    async def answer(self, request: Mapping[str, Any], returned: object) -> None:
        """Answer a request as QEMU would."""
        await self.send(json.dumps({"return": returned, "id": request["id"]}).encode() + b"\r\n")

    async def request(self) -> dict[str, Any]:
        """Return the next request: a stream of JSON values.

        Raises:
            EOFError: the client left.
        """
        while True:
            with suppress(json.JSONDecodeError):
                self._received = self._received.lstrip()
                found, end = json.JSONDecoder().raw_decode(self._received)
                self._received = self._received[end:]
                assert isinstance(found, dict)
                return found
            received = await self._reader.read(65536)
            if not received:
                raise EOFError
            self._received += received.decode()

    async def negotiate(self) -> dict[str, Any]:
        """Greet, take the negotiation and accept it; return what was asked."""
        await self.send(GREETING)
        asked = await self.request()
        await self.send(NEGOTIATED)
        return asked

    async def read(self) -> bytes:
        """Return what comes next; nothing: the client left."""
        return await self._reader.read(65536)

    async def until_the_client_leaves(self) -> None:
        """Swallow what comes."""
        while await self._reader.read(65536):
            pass


Talk = Callable[[Line], Awaitable[None]]


@asynccontextmanager
async def peer(path: Path, talk: Talk) -> AsyncIterator[None]:
    """Serve ``path``: every client is talked to by ``talk`` and cut off when that returns."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await talk(Line(reader, writer))

    async with serving(serve, path):
        yield


async def answering(line: Line) -> None:
    """Greet, and return to each command its own name."""
    await line.negotiate()
    while True:
        request = await line.request()
        await line.answer(request, request["execute"])


def ignored(_name: str, _details: Mapping[str, object]) -> None:
    """Take an event and forget it."""


@asynccontextmanager
async def session_with(
    path: Path,
    on_event: EventSink = ignored,
    *,
    greeting_timeout_s: float | None = PATIENCE_S,
    request_timeout_s: float = PATIENCE_S,
) -> AsyncIterator[Session]:
    """A greeted session, closed afterwards."""
    session = await Session.greeted(
        open_monitor(path),
        on_event,
        greeting_timeout_s=greeting_timeout_s,
        request_timeout_s=request_timeout_s,
    )
    try:
        yield session
    finally:
        await session.close()
