"""A proxy between the program and a QEMU that forwards every byte and records the commands."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from serving import relayed, serving

from qmpballoon.sim.qemu.stream import Request, RequestStream


@contextlib.asynccontextmanager
async def recorded_commands(qemu: Path, at: Path) -> AsyncIterator[list[str]]:
    """Serve the monitor ``qemu`` at ``at`` too; yield the names of its commands, as in `COMMANDS`."""
    sent: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests = RequestStream()

        def record(chunk: bytes) -> None:
            sent.extend(_name(request) for request in requests.feed(chunk))

        await relayed(reader, writer, await asyncio.open_unix_connection(qemu), heard=record)

    async with serving(serve, at):
        yield sent


def _name(request: object) -> str:
    assert isinstance(request, Request)
    assert isinstance(request.value, dict)
    name, arguments = request.value["execute"], request.value.get("arguments", {})
    return f"{name} {arguments['property']}" if "property" in arguments else str(name)
