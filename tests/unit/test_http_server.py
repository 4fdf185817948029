"""The HTTP server, and clients that are hostile, slow or many."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from pathlib import Path

import pytest

from qmpballoon.config import HttpAddress
from qmpballoon.metrics import http_server
from qmpballoon.metrics.http_server import Answer, BadRequest, HttpServer, read_head

PATIENCE_S = 60.0
LOOPBACK = HttpAddress("127.0.0.1", 0)
GET = b"GET /figures HTTP/1.1\r\nHost: x\r\n\r\n"


async def figures() -> Answer:
    return Answer(b"42\n")


async def longer() -> Answer:
    return Answer(b"x" * 1024 * 1024)


async def large() -> Answer:
    return Answer(b"x" * 32 * 1024 * 1024)


@asynccontextmanager
async def serving(address: HttpAddress = LOOPBACK) -> AsyncIterator[HttpServer]:
    server = HttpServer(address, {"/figures": figures, "/longer": longer, "/large": large})
    task = asyncio.create_task(server.run(), name="server")
    try:
        async with asyncio.timeout(PATIENCE_S):
            await server.listening.wait()
        yield server
    finally:
        task.cancel()
        await asyncio.wait((task,), timeout=PATIENCE_S)
        assert task.cancelled()


async def exchanged(server: HttpServer, sent: bytes, *, ends: bool = False) -> bytes:
    """Send bytes and return all that is received until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(sent)
        if ends:
            writer.write_eof()
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_page_is_served_and_the_connection_closed() -> None:
    async with serving() as server:
        head, _, body = (await exchanged(server, GET)).partition(b"\r\n\r\n")
        assert body == b"42\n"
        assert head.splitlines() == [
            b"HTTP/1.1 200 OK",
            b"Content-Type: text/plain; charset=utf-8",
            b"Content-Length: 3",
            b"Cache-Control: no-store",
            b"X-Content-Type-Options: nosniff",
            b"Connection: close",
        ]
        assert (await exchanged(server, GET.replace(b"GET", b"HEAD"))) == head + b"\r\n\r\n"
        assert (await exchanged(server, GET.replace(b"/figures", b"/figures?a=b"))).endswith(b"\r\n\r\n42\n")
        assert (await exchanged(server, b"GET /figures HTTP/1.0\r\n\r\n")).endswith(b"\r\n\r\n42\n")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /figures/../figures HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /%66igures HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"POST /figures HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"GET /figures HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET /figures HTTP/1.1\r\n\r\n", 400),
        (b"GET /figures HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET /figures HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET /figures HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
        (b"GET /figures HTTP/1.1\nHost: x\n\r\n\r\n", 400),
        (b"GET /figures HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n", 400),
        (b"GET  /figures HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET http://x/figures HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /figures HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", 431),
        (b"x" * 100_000, 431),
    ],
)
async def test_a_bad_request_gets_one_answer_and_harms_no_one(sent: bytes, status: int) -> None:
    async with serving() as server:
        answer = await exchanged(server, sent)
        assert answer.startswith(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode())
        assert answer.count(b"HTTP/1.1") <= 2  # a reason may name it
        assert (await exchanged(server, GET)).endswith(b"42\n")


async def test_what_follows_a_request_is_not_answered() -> None:
    async with serving() as server:
        assert (await exchanged(server, GET * 3)).count(b"HTTP/1.1 200") == 1


@pytest.mark.parametrize("sent", [b"", b"GET /figures HTTP/1.1\r\n"])
async def test_a_client_that_hangs_up_gets_nothing(sent: bytes) -> None:
    async with serving() as server:
        assert await exchanged(server, sent, ends=True) == b""
        assert (await exchanged(server, GET)).endswith(b"42\n")


async def test_a_client_that_sends_no_request_is_told_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "READ_WITHIN_S", 0.05)
    async with serving() as server:
        assert (await exchanged(server, b"GET /")).startswith(b"HTTP/1.1 408 ")


async def test_a_page_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "ANSWER_WITHIN_S", 0.05)

    async def never() -> Answer:
        await asyncio.Event().wait()
        raise AssertionError

    async with serving() as server:
        server._pages["/never"] = never
        assert (await exchanged(server, GET.replace(b"/figures", b"/never"))).startswith(b"HTTP/1.1 503 ")


def received(client: socket.socket) -> int:
    """Return how many bytes come until the connection is closed or reset."""
    got = 0
    with suppress(ConnectionError):
        while chunk := client.recv(1024 * 1024):
            got += len(chunk)
    return got


async def test_a_client_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "WRITE_WITHIN_S", 0.05)
    monkeypatch.setattr(http_server, "LINGER_S", 0.05)
    async with serving() as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(GET.replace(b"/figures", b"/large"))
            async with asyncio.timeout(PATIENCE_S):
                while server.connections == 0:
                    await asyncio.sleep(0.001)
                while server.connections:
                    await asyncio.sleep(0.001)
            client.settimeout(PATIENCE_S)
            got = await asyncio.to_thread(received, client)
        assert got < 32 * 1024 * 1024
        assert (await exchanged(server, GET)).endswith(b"42\n")


@pytest.mark.parametrize("sent", [b"", b"GET /", GET, GET.replace(b"/figures", b"/longer"), b"x" * 100_000])
async def test_clients_that_reset_the_connection_do_not_end_the_server(sent: bytes) -> None:
    at_once = struct.pack("ii", 1, 0)  # SO_LINGER: close() resets

    def reset(port: int, *, read: bool) -> None:
        with socket.create_connection(("127.0.0.1", port)) as client, suppress(ConnectionError):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            client.sendall(sent)
            if read:
                client.settimeout(0.01)
                with suppress(TimeoutError):
                    client.recv(1)

    async with serving() as server:
        for number in range(100):
            await asyncio.to_thread(reset, server.port, read=number % 2 == 0)
        assert (await exchanged(server, GET)).endswith(b"42\n")


async def test_an_error_of_the_network_ends_one_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def shut_down(writer: asyncio.StreamWriter) -> None:
        raise OSError(errno.ENOTCONN, "the client has reset the connection")

    async with serving() as server:
        with monkeypatch.context() as patched:
            patched.setattr(asyncio.StreamWriter, "write_eof", shut_down)
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(GET)
            async with asyncio.timeout(PATIENCE_S):
                await reader.readline()
                while server.connections:
                    await asyncio.sleep(0.001)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        assert (await exchanged(server, GET)).endswith(b"42\n")


async def test_too_many_connections_are_refused_and_those_there_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_server, "MOST_CONNECTIONS", 3)
    async with serving() as server:
        waiting = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(3)]
        async with asyncio.timeout(PATIENCE_S):
            while server.connections < 3:
                await asyncio.sleep(0.001)
        with suppress(ConnectionError):
            assert await exchanged(server, GET) == b""
        for reader, writer in waiting:
            writer.write(GET)
            assert (await reader.read()).endswith(b"42\n")
            writer.close()
            await writer.wait_closed()
        async with asyncio.timeout(PATIENCE_S):
            while server.connections:
                await asyncio.sleep(0.001)
        assert (await exchanged(server, GET)).endswith(b"42\n")


async def test_a_unix_socket_is_for_user_and_group_and_is_removed(sockets_dir: Path) -> None:
    path = sockets_dir / "http.sock"
    async with serving(HttpAddress(path=os.fspath(path))):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(GET)
        assert (await reader.read()).endswith(b"42\n")
        writer.close()
        await writer.wait_closed()
    assert not path.exists()


async def test_an_address_that_is_in_use_is_logged_once_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_server, "TRY_AGAIN_S", 0.001)
    attempts = 0

    class Counting(HttpServer):
        async def _listeners(self) -> list[socket.socket]:
            nonlocal attempts
            attempts += 1
            return await super()._listeners()

    with socket.create_server(("127.0.0.1", 0)) as other:
        server = Counting(HttpAddress("127.0.0.1", other.getsockname()[1]), {"/figures": figures})
        task = asyncio.create_task(server.run(), name="server")
        async with asyncio.timeout(PATIENCE_S):
            while attempts < 3:
                await asyncio.sleep(0.001)
    async with asyncio.timeout(PATIENCE_S):
        await server.listening.wait()
    assert (await exchanged(server, GET)).endswith(b"42\n")
    assert caplog.text.count("http-unavailable") == 1
    task.cancel()
    await asyncio.wait((task,), timeout=PATIENCE_S)


async def test_localhost_is_served_wherever_it_is() -> None:
    async with serving(HttpAddress("localhost", 0)) as server:
        assert (await exchanged(server, GET)).endswith(b"42\n")


def test_a_head_is_read_strictly() -> None:
    assert read_head(b"GET /metrics?x=1 HTTP/1.1\r\nhost: a\r\nAccept:\r\n\r\n") == ("GET", "/metrics")
    with pytest.raises(BadRequest, match="one Host"):
        read_head(b"GET / HTTP/1.1\r\nAccept: a\r\n\r\n")
