"""The bytes of a monitor's connection: received data is cut into QMP messages and decoded."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Final, cast

from qmpballoon.errors import ConnectionLost

LONGEST_MESSAGE: Final = 1024**2  # the largest reply we ask for is some 100 KB
LONGEST_EVENT: Final = 16 * 1024  # the largest ones of QEMU have about 1 KB
LONGEST_GREETING: Final = 8 * 1024  # of what comes before the session runs, all messages together
DEEPEST: Final = 64  # nesting levels; QEMU uses a few, a thousand would overflow a recursive printer
ONE_MORE_LOOK_S: Final = 0.001  # at what was received, before a time-out that was noticed late counts
_MANY_BRACKETS: Final = 256  # a message with fewer brackets cannot be too deep: skip the check
_BEGINS: Final = (b"{\r\n", b"{\n")  # of a message with pretty=on; without, a message is one line
_LONGEST_BEGIN: Final = 3
HUMAN_MONITOR: Final = "QEMU's human monitor"  # in the reason why a session ended


class Splitter:
    """Cuts received bytes into messages: each a line, or with ``pretty=on`` lines.

    Such a message begins with a lone ``{`` and ends with a line that begins with ``}``.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._seen = 0  # of the rest: its first bytes, in which no message ends
        self._is_spread = False  # the rest begins a message over many lines
        self.has_spread = False  # at least one message came over many lines

    @property
    def rest(self) -> int:
        """The number of bytes of a message that is not complete."""
        return len(self._rest)

    def feed(self, received: bytes) -> list[bytes]:
        """Take received bytes; return the messages that are complete."""
        if not self._rest and received.find(b"\n") == len(received) - 1 > 2:
            return [received]  # one message, as nearly always
        rest = self._rest
        rest += received
        messages = []
        start = 0
        while (end := self._end_from(start)) > 0:
            messages.append(bytes(rest[start:end]))
            start = end
        del rest[:start]
        return messages

    def _end_from(self, start: int) -> int:
        """Return where the message ends that begins at ``start``; 0: it is not complete."""
        rest = self._rest
        if not self._is_spread:
            end = rest.find(b"\n", start + self._seen) + 1
            self._is_spread = end - start <= _LONGEST_BEGIN and bytes(rest[start:end]) in _BEGINS
            if not self._is_spread:
                self._seen = 0 if end else len(rest) - start
                return end
            self._seen, self.has_spread = 0, True
        last_line = rest.find(b"\n}", start + self._seen) + 1
        end = rest.find(b"\n", last_line) + 1 if last_line else 0
        self._is_spread = not end
        self._seen = 0 if end else max(0, (last_line or len(rest)) - 1 - start)
        return end


class Wire(asyncio.StreamReaderProtocol):
    """Passes received bytes to a function at once; the stream reader gets only the end and errors.

    That saves each message a buffer and a task switch. ``received`` returns for how many seconds nothing
    more may be read; then ``take_held`` is called, which returns the same. A ConnectionLost of either is
    raised by the reader. Any other exception is a bug; the transport ends with it, and the reader raises
    it, too.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        received: Callable[[bytes], float],
        take_held: Callable[[], float],
        ended: Callable[[], None],
    ) -> None:
        super().__init__(reader)
        self._reader_of_end = reader
        self._received = received
        self._take_held = take_held
        self._ended = ended
        self._connection: asyncio.Transport | None = None
        self._pause: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport, whose reading may be paused."""
        super().connection_made(transport)
        self._connection = cast(asyncio.Transport, transport)  # uvloop's class does not derive from it

    def data_received(self, data: bytes) -> None:
        """Take bytes from the transport."""
        try:
            if pause_s := self._received(data):
                self._read_later(pause_s)
        except ConnectionLost as error:
            self._refuse(error)

    def eof_received(self) -> bool:
        """Note that the peer sends nothing more."""
        super().eof_received()
        self._ended()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the connection is over."""
        super().connection_lost(exc)
        self._connection = None
        if self._pause is not None:
            self._pause.cancel()
        self._ended()

    def _read_later(self, pause_s: float) -> None:
        if self._connection is not None and not self._connection.is_closing():
            self._connection.pause_reading()
            self._pause = asyncio.get_running_loop().call_later(pause_s, self._read_on)

    def _read_on(self) -> None:
        if self._connection is None or self._connection.is_closing():
            return
        try:
            if pause_s := self._take_held():
                self._read_later(pause_s)
            else:
                self._connection.resume_reading()
        except ConnectionLost as error:
            self._refuse(error)

    def _refuse(self, error: ConnectionLost) -> None:
        """Read nothing more: what else comes from this peer must not be kept."""
        self._reader_of_end.set_exception(error)
        self._ended()
        if self._connection is not None:
            self._connection.abort()


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
        return f" but {HUMAN_MONITOR} (give QEMU one more: -qmp unix:PATH,server=on,wait=off)"
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
