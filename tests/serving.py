"""Servers of tests, whose connections end with them: none is left to the garbage collector."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

CHUNK = 2**16

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(serve: Serve, at: Path | str | tuple[str, int]) -> AsyncIterator[asyncio.Server]:
    """Listen at a path, or at a host and port; each client is served by a task of its own.

    A connection is closed when ``serve`` returns, or is cancelled at the end. What ``serve`` raises is
    raised at the end, a lost connection excepted.
    """
    tasks: set[asyncio.Task[None]] = set()

    async def served(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, EOFError):
            async with closing(writer):
                await serve(reader, writer)

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.get_running_loop().create_task(served(reader, writer), name="served client"))

    start = (
        partial(asyncio.start_server, accepted, *at)
        if isinstance(at, tuple)
        else partial(asyncio.start_unix_server, accepted, at)
    )
    server = await start()
    try:
        yield server
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


@asynccontextmanager
async def closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    """Close a connection on leaving, also one that was lost."""
    try:
        yield
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def relayed(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    to: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    *,
    heard: Callable[[bytes], None] = lambda chunk: None,
) -> None:
    """Copy both ways until either side leaves; ``heard`` gets what comes from the client."""
    to_reader, to_writer = to

    async def copied(
        source: asyncio.StreamReader, sink: asyncio.StreamWriter, seen: Callable[[bytes], None]
    ) -> None:
        while chunk := await source.read(CHUNK):
            seen(chunk)
            sink.write(chunk)
            await sink.drain()

    async with closing(to_writer):
        directions = (
            asyncio.ensure_future(copied(reader, to_writer, heard)),
            asyncio.ensure_future(copied(to_reader, writer, lambda chunk: None)),
        )
        try:
            ended, _ = await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
            await asyncio.gather(*directions, return_exceptions=True)
        for direction in ended:
            direction.result()
