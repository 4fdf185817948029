"""The bytes of a monitor's connection: received data is cut into QMP messages and decoded."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Final

from qmpballoon.errors import ConnectionLost

LONGEST_MESSAGE: Final = 4 * 1024**2  # the largest reply we ask for is some 100 KB; libvirt reads 10 MB
LONGEST_GREETING: Final = 64 * 1024  # of what comes before the session runs, all messages together
DEEPEST: Final = 64  # nesting levels; QEMU uses a few, a thousand would overflow a recursive printer
ONE_MORE_LOOK_S: Final = 0.001  # at what was received, before a time-out that was noticed late counts
_MANY_BRACKETS: Final = 256  # a message with fewer brackets cannot be too deep: skip the check
_BEGINS: Final = (b"{\r\n", b"{\n")  # of a message with pretty=on; without, a message is one line


class Splitter:
    """Cuts received bytes into messages: each a line, or with ``pretty=on`` lines.

    Such a message begins with a lone ``{`` and ends with a line that begins with ``}``.
    """

    def __init__(self) -> None:
        self._rest = bytearray()  # of a line
        self._lines: list[bytes] = []  # of a message over many lines

    @property
    def rest(self) -> int:
        """The number of bytes of a message that is not complete."""
        return len(self._rest) + sum(map(len, self._lines))

    def feed(self, received: bytes) -> list[bytes]:
        """Take received bytes; return the messages that are complete."""
        if not self._rest and not self._lines and received.find(b"\n") == len(received) - 1 > 2:
            return [received]  # one message, as nearly always
        self._rest += received
        if b"\n" not in received:
            return []
        *lines, rest = self._rest.split(b"\n")
        self._rest = bytearray(rest)
        messages = []
        for line in (bytes(line) + b"\n" for line in lines):
            if self._lines or line in _BEGINS:
                self._lines.append(line)
                if not line.startswith(b"}"):
                    continue
                line, self._lines = b"".join(self._lines), []
            messages.append(line)
        return messages


class Wire(asyncio.StreamReaderProtocol):
    """Passes received bytes to a function at once; the stream reader gets only the end and errors.

    That saves each message a buffer and a task switch. A ConnectionLost of the function is raised by the
    reader. Any other exception is a bug; the transport ends with it, and the reader raises it, too.
    """

    def __init__(
        self, reader: asyncio.StreamReader, received: Callable[[bytes], None], ended: Callable[[], None]
    ) -> None:
        super().__init__(reader)
        self._reader_of_end = reader
        self._received = received
        self._ended = ended

    def data_received(self, data: bytes) -> None:
        """Take bytes from the transport."""
        try:
            self._received(data)
        except ConnectionLost as error:
            self._reader_of_end.set_exception(error)
            self._ended()

    def eof_received(self) -> bool:
        """Note that the peer sends nothing more."""
        super().eof_received()
        self._ended()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the connection is over."""
        super().connection_lost(exc)
        self._ended()


def decoded(path: str, raw: bytes) -> dict[str, object]:
    """Return a message as an object.

    Raises:
        ConnectionLost: it is no JSON object, or nested too deep.
    """
    try:
        message = json.loads(raw.decode())
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or _is_too_deep(raw, message):
        raise ConnectionLost(f"{path}: this is not QMP{_other_protocol(raw)}: {shortened(raw)}")
    return message


@asynccontextmanager
async def patient_timeout(allowed_s: float) -> AsyncIterator[None]:
    """A time-out that, when it is over, waits for one more look at what was received."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as timeout:
        over = loop.call_later(allowed_s, lambda: timeout.reschedule(loop.time() + ONE_MORE_LOOK_S))
        try:
            yield
        finally:
            over.cancel()


def as_loss(path: str, error: BaseException) -> ConnectionLost:
    """Return why a session ended, from what was raised where its input is read."""
    match error:
        case ConnectionLost():
            return ConnectionLost(str(error))
        case EOFError():
            return ConnectionLost(
                f"{path}: QEMU closed the monitor{' in the middle of a message' * bool(error.args)}"
            )
        case OSError():
            return ConnectionLost(f"{path}: {error.strerror or error}")
        case _:
            return ConnectionLost(f"{path}: this is not QMP: {shortened(str(error))}")


def is_plain(value: object) -> bool:
    """Tell whether JSON and msgpack can represent it: no NaN, no number of more than 64 bits."""
    match value:
        case int():
            return -(2**63) <= value < 2**64
        case float():
            return math.isfinite(value)
    return all(is_plain(child) for child in _children(value))


def shortened(message: object) -> str:
    """Return what an error shows of a message."""
    text = repr(message)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _other_protocol(line: bytes) -> str:
    """Return what greets with this line, if it is something known that lies beside monitors; else nothing."""
    if line.startswith(b"QEMU ") and b" monitor - type 'help'" in line:
        return " but QEMU's human monitor (give QEMU one more: -qmp unix:PATH,server=on,wait=off)"
    for start, name in ((b"RFB ", "a VNC server"), (b"SSH-", "an SSH server"), (b"HTTP/", "a web server")):
        if line.startswith(start):
            return f" but {name}"
    return ""


def _is_too_deep(line: bytes, message: Mapping[str, object]) -> bool:
    if line.count(b"{") + line.count(b"[") <= _MANY_BRACKETS:
        return False
    level: list[object] = [message]
    for _ in range(DEEPEST):
        level = [child for node in level for child in _children(node)]
    return bool(level)


def _children(node: object) -> Iterable[object]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()
