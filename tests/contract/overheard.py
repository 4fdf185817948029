"""A listener between the program and a QEMU: hands on every byte and keeps what the program says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from serving import relayed, serving

from qmpballoon.sim.qemu.stream import Request, RequestStream


@contextlib.asynccontextmanager
async def overheard(qemu: Path, at: Path) -> AsyncIterator[list[str]]:
    """Listen at ``at`` for one monitor; the names of what is sent to it, as in the table of commands."""
    said: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests = RequestStream()

        def heard(chunk: bytes) -> None:
            said.extend(_name(request) for request in requests.feed(chunk))

        await relayed(reader, writer, await asyncio.open_unix_connection(qemu), heard=heard)

    async with serving(serve, at):
        yield said


def _name(request: object) -> str:
    assert isinstance(request, Request)
    assert isinstance(request.value, dict)
    name, arguments = request.value["execute"], request.value.get("arguments", {})
    return f"{name} {arguments['property']}" if "property" in arguments else str(name)
