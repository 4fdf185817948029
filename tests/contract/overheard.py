"""A listener between the program and a QEMU: hands on every byte and keeps what the program says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from qmpballoon.sim.qemu.stream import Request, RequestStream


@contextlib.asynccontextmanager
async def overheard(qemu: Path, at: Path) -> AsyncIterator[list[str]]:
    """Listen at ``at`` for one monitor; the names of what is sent to it, as in the table of commands."""
    said: list[str] = []

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests = RequestStream()
        while chunk := await reader.read(2**16):
            said.extend(_name(request) for request in requests.feed(chunk))
            writer.write(chunk)
        writer.write_eof()

    async def hand_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(2**16):
            writer.write(chunk)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_unix_connection(qemu)
        await asyncio.gather(hand_on(reader, to_writer), hand_back(to_reader, writer))
        to_writer.close()

    async with await asyncio.start_unix_server(serve, at):
        yield said


def _name(request: object) -> str:
    assert isinstance(request, Request)
    assert isinstance(request.value, dict)
    name, arguments = request.value["execute"], request.value.get("arguments", {})
    return f"{name} {arguments['property']}" if "property" in arguments else str(name)
