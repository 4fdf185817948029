"""qemu.qmp's client without what costs too much for hundreds of QEMUs: a connection up to its negotiation.

The subclass keeps qemu.qmp's state machine, greeting and reader task. It changes what is a problem for a
process that runs for months with hundreds of QEMUs (qemu.qmp 0.0.6, measured):

- The default listener keeps every event without a bound. Here events go only to `take_event`, which is there
  before the negotiation.
- Every message is pretty-printed for a debug log that is off. Sending and receiving bypass that.
- Its writer task, and a listener that nobody reads, take 9 KB of each session. Here the one ends at once, and
  all sessions share the other.
- Each message passes a stream reader. Here `take` gets it at once.
- ``disconnect()`` waits for a flush, which never ends if the peer hangs. Here the transport is aborted.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property, lru_cache
from typing import Final, Self, cast

from qemu.qmp import QMPClient, QMPError, Runstate
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message
from qemu.qmp.models import Greeting

from qmpballoon.errors import ConnectionLost, MonitorBusy
from qmpballoon.qmp.intake import Intake
from qmpballoon.qmp.monitor import HELD_HINT, OpenMonitor
from qmpballoon.qmp.wire import (
    LONGEST_GREETING,
    LONGEST_MESSAGE,
    Wire,
    as_loss,
    decoded,
    patient_timeout,
    shortened,
)

_QUIET: Final = logging.getLogger("qmpballoon.qmp.wire")  # qemu.qmp logs each loss several times
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False
_QUIET.setLevel(logging.CRITICAL + 1)

_UNUSED: Final = EventListener()  # 4 KB, and nobody listens
_NOTHING: Final[asyncio.Queue[Message]] = asyncio.Queue()  # to be sent by qemu.qmp's writer: 4 KB

PRIVATE_NAMES: Final = (
    "_bh_close_stream(self, error_pathway: bool=False) -> None",
    "_bh_flush_writer(self) -> None",
    "_bh_loop_forever(self, async_fn: _TaskFN, name: str) -> None",
    "_bh_recv_message(self) -> None",
    "_do_connect(self, address: Union[SocketAddrT, socket.socket], ssl: Optional[SSLContext]=None) -> None",
    "_do_recv(self) -> Message",
    "_get_greeting(self) -> Greeting",
    "_negotiate(self) -> None",
    "_outgoing",
    "_reader",
    "_set_state(self, state: Runstate) -> None",
    "_writer",
)
"""The private names of qemu.qmp that are used; a test compares them with the installed release."""


class LeanClient(QMPClient):
    """A connection to a monitor: its greeting, its negotiation, and what it receives afterwards.

    ``version`` is QEMU's, such as ``7.2.22``. ``request_timeout_s`` is also that of the negotiation.
    """

    def __init__(self, monitor: OpenMonitor, *, request_timeout_s: float) -> None:
        super().__init__(None, LONGEST_MESSAGE)
        self.logger = _QUIET
        unused, self.events = self.events, _UNUSED
        self.remove_listener(unused)
        self.path = monitor.path
        self.peer_pid: Final = monitor.pid
        self.request_timeout_s = request_timeout_s
        self._loop = asyncio.get_running_loop()
        self._connection = monitor.connection
        self._intake = Intake(monitor.path, self._take_early)
        self._early: list[bytes] = []  # messages of the negotiation, a few
        self._early_size = 0  # of all of them
        self._early_came: asyncio.Future[None] | None = None  # somebody waits for one

    def take(self, raw: bytes) -> None:
        """Take a message after the negotiation; raises ConnectionLost if it is not QMP."""
        raise NotImplementedError

    def take_event(self, message: Mapping[str, object]) -> None:
        """Take an event, also of the negotiation; raises ConnectionLost if it is none."""
        raise NotImplementedError

    def end(self, reason: ConnectionLost) -> None:
        """End the session; does nothing if it is over."""
        raise NotImplementedError

    async def started(self, *, greeting_timeout_s: float | None) -> Self:
        """Wait for the greeting, and negotiate.

        The connection is closed if that fails. With ``greeting_timeout_s`` None it waits without a limit
        while other clients are served. ``greeting`` is set when it came.

        Raises:
            MonitorBusy: connected, but no greeting came in time.
            ConnectionLost: the connection ended, or carried something other than QMP.
        """
        try:
            async with asyncio.timeout(greeting_timeout_s):
                await self.connect(self._connection)
        except TimeoutError:
            raise MonitorBusy(
                f"{self.path}: no greeting within {greeting_timeout_s:.1f} s: {HELD_HINT}"
            ) from None
        except QMPError as error:
            raise as_loss(self.path, getattr(error, "exc", error)) from error
        finally:
            if self.runstate is not Runstate.RUNNING:
                self._connection.close()
        return self

    @property
    def exceeded(self) -> bool:
        """Tell whether it ended because QEMU sent too much, or too large messages."""
        return self._intake.exceeded

    @property
    def is_pretty(self) -> bool:
        """Tell whether QEMU spreads each message over many lines: ``pretty=on``."""
        return self._intake.is_pretty

    @cached_property
    def version(self) -> str:
        """QEMU's version as three numbers, ``?`` where the greeting has none; asked for once greeted."""
        greeting = self.greeting.QMP.version.get("qemu") if self.greeting else None
        if not isinstance(greeting, Mapping):
            return "?"
        return ".".join(str(greeting.get(part, "?"))[:8] for part in ("major", "minor", "micro"))

    # ── what qemu.qmp calls ──────────────────────────────────────────────────────────────────────

    async def _do_connect(self, address: object, ssl: object = None) -> None:
        self._set_state(Runstate.CONNECTING)
        reader = asyncio.StreamReader(loop=self._loop)
        is_local = self._connection.family == socket.AF_UNIX
        make = self._loop.create_unix_connection if is_local else self._loop.create_connection
        transport, wire = await make(
            lambda: Wire(reader, self._intake.received, self._intake.take_held, self._wake_early),
            sock=self._connection,
        )
        self._reader, self._writer = reader, asyncio.StreamWriter(transport, wire, reader, self._loop)

    async def _get_greeting(self) -> Greeting:
        # Observed with a real QEMU that had just been resumed.
        while "event" in (message := decoded(self.path, raw := await self._received())):
            self.take_event(message)
        try:
            return _shared_greeting(raw)
        except (KeyError, TypeError):
            raise ConnectionLost(f"{self.path}: this is no greeting: {shortened(message)}") from None

    async def _negotiate(self) -> None:
        # Without "oob": it is not needed, and with it QEMU parses in a second thread.
        self._write(b'{"execute": "qmp_capabilities", "id": 0}\n')
        try:
            async with patient_timeout(self.request_timeout_s):
                while "return" not in (answer := await self._do_recv()):
                    if "event" not in answer:
                        raise ConnectionLost(
                            f"{self.path}: no answer to qmp_capabilities: {shortened(answer)}"
                        )
                    self.take_event(answer)
        except TimeoutError:
            raise ConnectionLost(
                f"{self.path}: QEMU greeted and did not answer within {self.request_timeout_s:g} s"
            ) from None

    async def _do_recv(self) -> Message:
        return cast(Message, decoded(self.path, await self._received()))  # Message would serialise it again

    async def _received(self) -> bytes:
        """Wait for a message of the negotiation."""
        assert self._reader is not None
        while not self._early:
            if self._reader.at_eof() or self._reader.exception() is not None:
                await self._until_end()
            self._early_came = self._loop.create_future()
            await self._early_came
        return self._early.pop(0)

    async def _bh_recv_message(self) -> None:
        """Wait for the end of the input; from now on messages are taken as they are received."""
        self._early_came = None
        self._intake.greeted(self.take)
        while self._early:
            self.take(self._early.pop(0))
        await self._until_end()

    async def _until_end(self) -> None:
        assert self._reader is not None
        await self._reader.read(1)
        raise EOFError(*([rest] if (rest := self._intake.rest) else []))

    async def _bh_loop_forever(self, async_fn: Callable[[], Awaitable[None]], name: str) -> None:
        if name == "Writer":  # what is sent does not pass it
            self._outgoing = _NOTHING
            return
        try:
            while True:
                await async_fn()
        except asyncio.CancelledError:
            return
        except (ConnectionLost, OSError, EOFError) as error:
            self.end(as_loss(self.path, error))
        except BaseException:
            self.end(ConnectionLost(f"{self.path}: a bug in this program ended the session"))
            raise

    async def _bh_flush_writer(self) -> None:
        """Flush nothing: callers have their replies, and a hung peer would never read the rest."""

    async def _bh_close_stream(self, error_pathway: bool = False) -> None:
        if self._writer is not None:
            self._writer.transport.abort()
        await super()._bh_close_stream(error_pathway=True)  # how the peer ended the connection is no error

    # ── ours ─────────────────────────────────────────────────────────────────────────────────────

    def _write(self, requests: bytes) -> None:
        """Write, unless the connection has just broken: the reader ends the session then.

        A closed transport of uvloop raises RuntimeError.
        """
        if self._writer is not None and not self._writer.transport.is_closing():
            self._writer.write(requests)

    def _take_early(self, raw: bytes) -> None:
        """Take a message before the session runs."""
        self._early_size += len(raw)
        if self._early_size > LONGEST_GREETING:
            raise self._intake.too_much(f"more than {LONGEST_GREETING} bytes before the session runs")
        self._early.append(raw)
        self._wake_early()

    def _wake_early(self) -> None:
        if self._early_came is not None:
            finish(self._early_came)


def finish(future: asyncio.Future[None]) -> None:
    """Tell who waits, if nobody has told it."""
    if not future.done():
        future.set_result(None)


@lru_cache(maxsize=16)
def _shared_greeting(raw: bytes) -> Greeting:
    """Return the greeting, one for all QEMUs that send the same: 2 KB each."""
    return Greeting(json.loads(raw))
