"""One conversation with a QEMU monitor, on qemu.qmp's client.

The subclass keeps qemu.qmp's state machine, greeting and reader task. It changes what is a problem for a
process that runs for months with hundreds of QEMUs (qemu.qmp 0.0.6, measured):

- The default listener keeps every event without a bound. Here events go only to a callback, which is set
  before the negotiation.
- Every message is pretty-printed for a debug log that is off. Sending and receiving bypass that.
- Its writer task, and a listener that nobody reads, take 9 KB of each session. Here the one ends at once, and
  all sessions share the other.
- A request costs a queue and two task switches. Here it costs one future, with a time-out, and replies do not
  pass a stream reader. A request that is repeated costs no future (`qmpballoon.qmp.repeated`).
- ``disconnect()`` waits for a flush, which never ends if the peer hangs. Here the transport is aborted.

Input that is not QMP ends the session with a reason and raises nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from time import thread_time
from typing import Final, Self, TypeVar, cast

from qemu.qmp import QMPClient, QMPError, Runstate
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message
from qemu.qmp.models import Greeting

from qmpballoon.errors import ConnectionLost, MonitorBusy, QmpError
from qmpballoon.qmp import commands
from qmpballoon.qmp.asked import MOST_ABANDONED, Asked, Waiting, refusal, returned
from qmpballoon.qmp.intake import Intake
from qmpballoon.qmp.monitor import HELD_HINT, OpenMonitor
from qmpballoon.qmp.repeated import Outstanding, Repeated, Sink
from qmpballoon.qmp.wire import (
    LONGEST_EVENT,
    LONGEST_GREETING,
    LONGEST_MESSAGE,
    ONE_MORE_LOOK_S,
    Wire,
    as_loss,
    decoded,
    is_plain,
    patient_timeout,
    shortened,
)

MOST_UNASKED_PER_S: Final = 2000  # events; QEMU itself limits the frequent ones to one per second

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

T = TypeVar("T")

EventSink = Callable[[str, Mapping[str, object]], None]
"""Called with an event's name and data, in order, from the loop; must not raise."""


class Session(QMPClient):
    """A session with a monitor, after its greeting, until it is lost or closed.

    ``version`` is QEMU's, such as ``7.2.22``. ``hung`` is true if QEMU did not answer in time.
    """

    def __init__(self, monitor: OpenMonitor, on_event: EventSink, *, request_timeout_s: float) -> None:
        super().__init__(None, LONGEST_MESSAGE)
        self.logger = _QUIET
        unused, self.events = self.events, _UNUSED
        self.remove_listener(unused)
        self.path = monitor.path
        self.peer_pid: Final = monitor.pid
        self.request_timeout_s = request_timeout_s
        self.hung = False
        self._loop = asyncio.get_running_loop()
        self._connection = monitor.connection
        self._on_event = on_event
        self._waiting = Waiting()
        self._reason: ConnectionLost | None = None
        self._calls: list[Callable[[], None]] = []  # to be done at the end
        self._intake = Intake(monitor.path, self._take_early)
        self._early: list[bytes] = []  # messages of the negotiation, a few
        self._early_size = 0  # of all of them
        self._early_came: asyncio.Future[None] | None = None  # somebody waits for one
        self._repeated = Outstanding()
        self._unasked = 0
        self._unasked_since_s = 0.0

    @classmethod
    async def greeted(
        cls,
        monitor: OpenMonitor,
        on_event: EventSink,
        *,
        greeting_timeout_s: float | None,
        request_timeout_s: float,
    ) -> Self:
        """Wait for the greeting, negotiate, and return the running session.

        The connection is closed if that fails. With ``greeting_timeout_s`` None it waits without a limit
        while other clients are served.

        Raises:
            MonitorBusy: connected, but no greeting came in time.
            ConnectionLost: the connection ended, or carried something other than QMP.
        """
        session = cls(monitor, on_event, request_timeout_s=request_timeout_s)
        return await session.started(greeting_timeout_s=greeting_timeout_s)

    async def started(self, *, greeting_timeout_s: float | None) -> Self:
        """Do what `greeted` does with a session that was made; ``greeting`` is set when it came."""
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

    async def request(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float | None = None
    ) -> object:
        """Execute a QMP command and return what it returns.

        Cancelling leaves the session usable: the reply is dropped when it comes.

        Raises:
            QmpError: QEMU refused the command.
            ConnectionLost: the session is over, or no reply came in time (and then it is over).
            NeverSent: the table of commands does not allow it for this QEMU; a bug of the caller.
        """
        (answer,) = await self.request_all(Asked(command, arguments), timeout_s=timeout_s)
        return returned(answer)

    async def request_all(self, *asked: Asked, timeout_s: float | None = None) -> list[object | QmpError]:
        """Execute commands that are sent together; return what each returns, or why QEMU refused it.

        QEMU executes them in order. ``timeout_s`` is for all of them; cancelling is as in `request`.

        Raises:
            ConnectionLost, NeverSent: as in `request`.
        """
        if self.runstate is not Runstate.RUNNING or self._reason is not None:
            raise self.reason
        for command, arguments in asked:
            commands.check(command, arguments, self.version)
        for _ in asked:
            self._intake.share.asked()
        sent, named, replies = self._waiting.add(asked)
        allowed_s = self.request_timeout_s if timeout_s is None else timeout_s
        hangs = self._loop.call_later(allowed_s, self._hangs, named, allowed_s)
        try:
            self._write(sent)
            await replies[-1]
            return [self._result(name, await it) for name, it in zip(named.values(), replies, strict=True)]
        finally:
            hangs.cancel()
            if self._waiting.abandon(named):
                self._end(ConnectionLost(f"{self.path}: {MOST_ABANDONED} replies are missing"))

    def _result(self, command: str, answer: Mapping[str, object] | None) -> object | QmpError:
        """Return what a command returned, or why QEMU refused it."""
        if answer is None:
            raise self.reason
        if "return" in answer:
            return answer["return"]
        try:
            return refusal(command, answer)
        except TypeError as error:
            self._end(ConnectionLost(f"{self.path}: {error}"))
            raise self.reason from None

    def repeated(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        sink: Sink,
        *,
        volatile: Sequence[str] = (),
    ) -> Repeated:
        """Return a request for `repeat`; ``volatile`` as in `Repeated`.

        Raises:
            NeverSent: the table of commands does not allow it for this QEMU; a bug of the caller.
        """
        commands.check(command, arguments, self.version)
        return Repeated(f"r{self._waiting.new_id()}", command, arguments, sink, volatile=volatile)

    def repeat(self, *requests: Repeated) -> None:
        """Send requests whose replies go to their sinks; nothing is sent once the session is over."""
        if self._reason is not None or self._writer is None:
            return
        self._write(self._repeated.add(requests, self._loop.time()))

    @property
    def awaits_replies(self) -> bool:
        """Tell whether replies to repeated requests are to come."""
        return self._repeated.command is not None

    def check_repeated(self) -> float:
        """End the session if a reply to a repeated request is overdue; return in how many seconds it is."""
        since_s = self._repeated.since_s
        left_s = since_s + self.request_timeout_s - self._loop.time()
        if self.awaits_replies and left_s <= 0:
            self._loop.call_later(ONE_MORE_LOOK_S, self._hangs_repeated, since_s)
            return self.request_timeout_s
        return left_s

    async def vm_name(self) -> str | None:
        """Return QEMU's ``-name``; None if it was given none."""
        return name_in(await self.request("query-name"))

    @property
    def reason(self) -> ConnectionLost:
        """Why the session is over; a new error object each time, because errors accumulate tracebacks."""
        return ConnectionLost(str(self._reason or f"{self.path}: not connected"))

    async def ended(self) -> ConnectionLost:
        """Wait until the session is over and return why."""
        over = self._loop.create_future()
        self.on_end(end := partial(_finish, over))
        try:
            await over
        finally:
            if end in self._calls:
                self._calls.remove(end)
        return self.reason

    def on_end(self, call: Callable[[], None]) -> None:
        """Call a function when the session ends; now, if it is over."""
        if self._reason is not None:
            call()
        else:
            self._calls.append(call)

    def check_running(self) -> None:
        """Do nothing while the session runs.

        Raises:
            ConnectionLost: it is over.
        """
        if self._reason is not None:
            raise self.reason

    async def while_running(self, waiting: Coroutine[object, object, T]) -> T:
        """Wait for something else as long as the session lasts.

        Raises:
            ConnectionLost: the session ended first.
        """
        task = asyncio.create_task(waiting, name=f"waiting while {self.path} runs")
        over = asyncio.create_task(self.ended(), name=f"end of {self.path}")
        try:
            await asyncio.wait((task, over), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise self.reason
            return task.result()
        finally:
            task.cancel()
            over.cancel()
            await asyncio.gather(task, over, return_exceptions=True)

    async def close(self) -> None:
        """End the session and free its resources; does nothing if it is over already.

        An exception outside the error tree that ended the reader is a bug and is raised here.
        """
        self._end(ConnectionLost(f"{self.path}: closed by us"))
        if self.runstate is not Runstate.IDLE:
            await self.disconnect()
        self._connection.close()

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
            self._take_event(message)
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
                    self._take_event(answer)
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
        self._intake.greeted(self._take)
        while self._early:
            self._take(self._early.pop(0))
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
            self._end(as_loss(self.path, error))
        except BaseException:
            self._end(ConnectionLost(f"{self.path}: a bug in this program ended the session"))
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
            _finish(self._early_came)

    def _take(self, raw: bytes) -> None:
        if self._reason is not None or self._repeated.takes_same(raw):
            return
        began_s = thread_time()
        try:
            self._take_new(raw)
        finally:
            self._intake.share.spent_s += thread_time() - began_s

    def _take_new(self, raw: bytes) -> None:
        """Take a message that has to be decoded."""
        longest = LONGEST_MESSAGE if self._waiting or self.awaits_replies else LONGEST_EVENT
        if len(raw) > longest:
            raise self._intake.too_much(f"a message of more than {longest} bytes")
        message = decoded(self.path, raw)
        if "event" in message:
            if len(raw) > LONGEST_EVENT:
                raise self._intake.too_much(f"an event of more than {LONGEST_EVENT} bytes")
            self._take_event(message)
            return
        try:
            is_repeated = self._repeated.takes(raw, message)
        except TypeError as error:
            raise ConnectionLost(f"{self.path}: {error}") from None
        if not is_repeated and not self._waiting.takes(message):
            raise ConnectionLost(f"{self.path}: an unexpected reply: {shortened(message)}")

    def _take_event(self, message: Mapping[str, object]) -> None:
        name, details = message["event"], message.get("data", {})
        if not isinstance(name, str) or not isinstance(details, dict) or not is_plain(details):
            raise ConnectionLost(f"{self.path}: this is no event: {shortened(message)}")
        now_s = self._loop.time()
        if now_s - self._unasked_since_s > 1:
            self._unasked, self._unasked_since_s = 0, now_s
        self._unasked += 1
        if self._unasked > MOST_UNASKED_PER_S:
            raise self._intake.too_much(f"more than {MOST_UNASKED_PER_S} events in a second")
        self._on_event(name, details)

    def _hangs(self, asked: Mapping[int, str], allowed_s: float) -> None:
        """Look once more at what was received: perhaps it was us who were late."""
        self._loop.call_later(ONE_MORE_LOOK_S, self._hangs_still, asked, allowed_s)

    def _hangs_still(self, asked: Mapping[int, str], allowed_s: float) -> None:
        if (command := self._waiting.first_missing(asked)) is not None:
            self._is_hung(command, allowed_s)

    def _hangs_repeated(self, since_s: float) -> None:
        if self._repeated.command is not None and self._repeated.since_s == since_s:
            self._is_hung(self._repeated.command, self.request_timeout_s)

    def _is_hung(self, command: str, allowed_s: float) -> None:
        if self._reason is not None:
            return
        if self._intake.is_over:  # its replies wait until it is not
            self._end(self._intake.excess())
            return
        self.hung = True
        self._end(ConnectionLost(f"{self.path}: QEMU did not answer {command} within {allowed_s:g} s"))

    def _end(self, reason: ConnectionLost) -> None:
        if self._reason is not None:
            return
        self._reason = reason
        for call in self._calls:
            call()
        self._calls.clear()
        self._waiting.end()
        self._repeated.clear()
        if self._writer is not None:
            self._writer.transport.abort()


def name_in(answer: object) -> str | None:
    """Return the name that query-name told; None if QEMU has none."""
    name = answer.get("name") if isinstance(answer, dict) else None
    return name if isinstance(name, str) and name else None


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


@lru_cache(maxsize=16)
def _shared_greeting(raw: bytes) -> Greeting:
    """Return the greeting, one for all QEMUs that send the same: 2 KB each."""
    return Greeting(json.loads(raw))
