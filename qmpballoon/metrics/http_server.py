"""A small HTTP/1.1 server for a few paths that are only read. Every connection serves one request.

Clients are not trusted: the head of a request has a greatest size and a time-out, connections have a greatest
number, and a client that does not read its answer is dropped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from itertools import count
from typing import Final, TypeAlias

from qmpballoon.config import HttpAddress
from qmpballoon.log import log_event
from qmpballoon.unix_listener import listen_at, remove

MOST_CONNECTIONS: Final = 32
LARGEST_HEAD: Final = 8192  # bytes
READ_WITHIN_S: Final = 5.0  # the head of a request
ANSWER_WITHIN_S: Final = 20.0
WRITE_WITHIN_S: Final = 20.0
LINGER_S: Final = 1.0  # for what a client still sends; otherwise the kernel could drop our answer
TRY_AGAIN_S: Final = 10.0  # where the address cannot be listened on
_LARGEST_REST: Final = 256 * 1024

_REQUEST: Final = re.compile(r"([A-Z]{1,16}) (/[!-~]{0,2047}) HTTP/1\.([01])")
_FIELD: Final = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to GET: ``body`` is text."""

    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = "text/plain; charset=utf-8"


Page: TypeAlias = Callable[[], Awaitable[Answer]]
"""Makes the answer for a path."""


class BadRequest(Exception):
    """The head of a request is refused."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def read_head(head: bytes) -> tuple[str, str]:
    """Return method and path of a request, without the query; ``head`` ends with the empty line.

    Raises:
        BadRequest: it is not HTTP/1.0 or 1.1 as clients send it.
    """
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    found = _REQUEST.fullmatch(first)
    if found is None:
        if re.fullmatch(r"\S+ \S+ HTTP/[0-9.]+", first) and not re.search(r" HTTP/1\.[01]$", first):
            raise BadRequest(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP/1.1 is spoken here")
        raise BadRequest(HTTPStatus.BAD_REQUEST, "this is no request such as GET /metrics HTTP/1.1")
    method, target, minor = found.groups()
    fields = [_FIELD.fullmatch(line) for line in lines]
    if not all(fields):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "a header field is invalid")
    hosts = sum(each is not None and each[1].lower() == "host" for each in fields)
    if hosts > 1 or (minor == "1" and not hosts):
        raise BadRequest(HTTPStatus.BAD_REQUEST, "one Host is needed")
    return method, target.partition("?")[0]


class HttpServer:
    """Serves ``pages``, by path, at ``address``; `run` it in a task."""

    def __init__(self, address: HttpAddress, pages: dict[str, Page]) -> None:
        self.listening = asyncio.Event()
        self.port = 0  # once it listens; 0 for a unix socket
        self._address = address
        self._pages = pages
        self.connections = 0  # that are open
        self._numbers = count(1)

    async def run(self) -> None:
        """Serve until cancelled. Where nobody can listen, that is logged once, and tried again."""
        is_logged = False
        while True:
            try:
                sockets = await self._listeners()
            except OSError as error:
                if not is_logged:
                    reason = f"there are no metrics: {error.strerror or error}; it is tried again"
                    log_event("http-unavailable", reason, level=logging.ERROR, address=str(self._address))
                is_logged = True
                await asyncio.sleep(TRY_AGAIN_S)
                continue
            await self._serve(sockets)

    async def _listeners(self) -> list[socket.socket]:
        address = self._address
        if address.path:
            return [listen_at(address.path, "somebody listens there")]
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        sockets: list[socket.socket] = []
        try:
            for family, _, _, _, at in dict.fromkeys(found):
                sockets.append(socket.create_server(at[:2], family=family, backlog=MOST_CONNECTIONS))
        except OSError:
            for each in sockets:
                each.close()
            if not sockets:
                raise
        return sockets

    async def _serve(self, sockets: list[socket.socket]) -> None:
        path = self._address.path
        made = os.stat(path).st_ino if path else 0
        servers: list[asyncio.Server] = []
        try:
            async with asyncio.TaskGroup() as group:

                def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    group.create_task(self._connection(reader, writer), name=f"http {next(self._numbers)}")

                for each in sockets:
                    start = asyncio.start_unix_server if path else asyncio.start_server
                    servers.append(await start(accept, sock=each, limit=LARGEST_HEAD))
                self.port = 0 if path else sockets[0].getsockname()[1]
                log_event("http-listening", address=str(self._address))
                self.listening.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    for server in servers:
                        server.close()
        finally:
            self.listening.clear()
            if path:
                remove(path, made)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.connections >= MOST_CONNECTIONS:
            writer.transport.abort()
            return
        self.connections += 1
        try:
            answer, has_body = await self._answer(reader)
            if answer is not None:
                await _send(writer, answer, has_body=has_body)
                await _linger(reader)
        except OSError:
            pass  # the client has gone, or cannot be reached; not each of these is a ConnectionError
        finally:
            self.connections -= 1
            writer.transport.abort()  # what had to be sent has been sent

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[Answer | None, bool]:
        """Return the answer to one request, None if none came; and whether its body is sent."""
        try:
            async with asyncio.timeout(READ_WITHIN_S):
                head = await reader.readuntil(b"\r\n\r\n")
            method, path = read_head(head)
        except asyncio.IncompleteReadError:
            return None, False
        except asyncio.LimitOverrunError:
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            return Answer(b"at most 8 KiB\n", status), True
        except TimeoutError:
            return Answer(b"no request came\n", HTTPStatus.REQUEST_TIMEOUT), True
        except BadRequest as refused:
            return Answer(f"{refused}\n".encode(), refused.status), True
        page = self._pages.get(path)
        if page is None:
            known = ", ".join(self._pages)
            return Answer(f"there are {known}\n".encode(), HTTPStatus.NOT_FOUND), method != "HEAD"
        if method not in ("GET", "HEAD"):
            return Answer(b"GET and HEAD alone\n", HTTPStatus.METHOD_NOT_ALLOWED), True
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                return await page(), method == "GET"
        except TimeoutError:
            return Answer(b"this takes too long\n", HTTPStatus.SERVICE_UNAVAILABLE), method == "GET"


async def _send(writer: asyncio.StreamWriter, answer: Answer, *, has_body: bool) -> None:
    """Send an answer; a client that does not read it in time is dropped."""
    status = answer.status
    fields = {
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
    }
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        fields["Allow"] = "GET, HEAD"
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *map(": ".join, fields.items()), "", ""]
    if writer.is_closing():  # the client has reset the connection; uvloop raises RuntimeError for writes then
        return
    writer.transport.set_write_buffer_limits(high=0)  # drain waits until all has been sent
    writer.write("\r\n".join(lines).encode("latin-1") + (answer.body if has_body else b""))
    with suppress(TimeoutError):
        async with asyncio.timeout(WRITE_WITHIN_S):
            await writer.drain()
            if not writer.is_closing():
                writer.write_eof()


async def _linger(reader: asyncio.StreamReader) -> None:
    """Read what the client still sends, until it closes, but not for long."""
    rest = _LARGEST_REST
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while rest > 0 and (chunk := await reader.read(4096)):
                rest -= len(chunk)
