"""The command channel to the program inside a lab guest: lines over a serial port on a unix socket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final, cast

from qmpballoon.lab.require import LabError

_LONGEST_LINE: Final = 4096  # of input without a line end; an answer has about 200 characters


class SerialPort(asyncio.Protocol):
    """Commands to the guest and their answers, matched by a tag, so that a late answer is ignored.

    ``boots`` counts the completed boots; ``line_received`` is set by every line.
    """

    def __init__(self) -> None:
        self.boots = 0
        self.line_received = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._tags = 0
        self._answers: dict[str, asyncio.Future[str]] = {}

    @classmethod
    async def open(cls, socket: Path) -> SerialPort:
        """Connect to the socket.

        Raises:
            OSError: no process listens there.
        """
        _, port = await asyncio.get_running_loop().create_unix_connection(cls, str(socket))
        return port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport (called by asyncio)."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's class does not derive from it

    def connection_lost(self, error: Exception | None) -> None:
        """Fail all pending commands (called by asyncio)."""
        self._transport = None
        self.line_received.set()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(LabError("the guest's serial port is closed"))

    def data_received(self, received: bytes) -> None:
        """Match received answers (called by asyncio)."""
        *lines, rest = (self._rest + received).split(b"\n")
        self._rest = rest[-_LONGEST_LINE:]
        for line in lines:
            text = line.decode("ascii", errors="replace").strip()
            tag, _, words = text.partition(" ")
            answer = self._answers.get(tag)
            if text.endswith("ready"):  # output of the firmware may precede it
                self.boots += 1
            elif answer is not None and not answer.done():
                self.boots = max(self.boots, 1)  # a guest resumed from a snapshot is ready at once
                answer.set_result(words)
            self.line_received.set()

    async def command(self, command: str, *, timeout_s: float) -> str:
        """Send one command; return the words after ``ok``.

        Raises:
            LabError: the guest answered with an error, or did not answer in time, or the port is closed.
        """
        if self._transport is None:
            raise LabError("the guest's serial port is closed")
        self._tags += 1
        tag = f"c{self._tags}"
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._answers[tag] = answer
        try:
            self.send(f"{tag} {command}")
            async with asyncio.timeout(timeout_s):
                words = await answer
        except TimeoutError as error:
            raise LabError(f"the guest did not answer {command!r} within {timeout_s:g} s") from error
        finally:
            del self._answers[tag]
        if not words.startswith("ok"):
            raise LabError(f"the guest answered {command!r} with {words!r}")
        return words.removeprefix("ok").strip()

    def send(self, line: str) -> None:
        """Send a line that is not answered; it is lost if the port is closed or the guest is not ready."""
        if self._transport is not None:
            self._transport.write(f"{line}\n".encode("ascii"))

    def close(self) -> None:
        """Close the port at once."""
        if self._transport is not None:
            self._transport.abort()
