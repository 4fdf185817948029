"""One conversation with a QEMU monitor: requests and their replies, events, and the end.

A request costs one future, with a time-out; one that is repeated costs none (`qmpballoon.qmp.repeated`).
Input that is not QMP ends the session with a reason and raises nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from time import thread_time
from typing import Final, Self, TypeVar

from qemu.qmp import Runstate

from qmpballoon.errors import ConnectionLost, QmpError
from qmpballoon.qmp import commands
from qmpballoon.qmp.asked import MOST_ABANDONED, Asked, Waiting, refusal, returned
from qmpballoon.qmp.lean_client import LeanClient, finish
from qmpballoon.qmp.monitor import OpenMonitor
from qmpballoon.qmp.repeated import Outstanding, Repeated, Sink
from qmpballoon.qmp.wire import (
    LONGEST_EVENT,
    LONGEST_MESSAGE,
    ONE_MORE_LOOK_S,
    decoded,
    is_plain,
    shortened,
)

MOST_UNASKED_PER_S: Final = 2000  # events; QEMU itself limits the frequent ones to one per second

T = TypeVar("T")

EventSink = Callable[[str, Mapping[str, object]], None]
"""Called with an event's name and data, in order, from the loop; must not raise."""


class Session(LeanClient):
    """A session with a monitor, after its greeting, until it is lost or closed.

    ``hung`` is true if QEMU did not answer in time. ``events_taken`` is how many events have come.
    """

    def __init__(self, monitor: OpenMonitor, on_event: EventSink, *, request_timeout_s: float) -> None:
        super().__init__(monitor, request_timeout_s=request_timeout_s)
        self.hung = False
        self.events_taken = 0
        self._on_event = on_event
        self._waiting = Waiting()
        self._reason: ConnectionLost | None = None
        self._calls: list[Callable[[], None]] = []  # to be done at the end
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
        """Return a session that has `started`; its errors."""
        session = cls(monitor, on_event, request_timeout_s=request_timeout_s)
        return await session.started(greeting_timeout_s=greeting_timeout_s)

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
                self.end(ConnectionLost(f"{self.path}: {MOST_ABANDONED} replies are missing"))

    def _result(self, command: str, answer: Mapping[str, object] | None) -> object | QmpError:
        """Return what a command returned, or why QEMU refused it."""
        if answer is None:
            raise self.reason
        if "return" in answer:
            return answer["return"]
        try:
            return refusal(command, answer)
        except TypeError as error:
            self.end(ConnectionLost(f"{self.path}: {error}"))
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
        self.on_end(end := partial(finish, over))
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
        self.end(ConnectionLost(f"{self.path}: closed by us"))
        if self.runstate is not Runstate.IDLE:
            await self.disconnect()
        self._connection.close()

    def take(self, raw: bytes) -> None:
        """Take a message of a running session."""
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
            self.take_event(message)
            return
        try:
            is_repeated = self._repeated.takes(raw, message)
        except TypeError as error:
            raise ConnectionLost(f"{self.path}: {error}") from None
        if not is_repeated and not self._waiting.takes(message):
            raise ConnectionLost(f"{self.path}: an unexpected reply: {shortened(message)}")

    def take_event(self, message: Mapping[str, object]) -> None:
        """Pass an event on."""
        name, details = message["event"], message.get("data", {})
        if not isinstance(name, str) or not isinstance(details, dict) or not is_plain(details):
            raise ConnectionLost(f"{self.path}: this is no event: {shortened(message)}")
        now_s = self._loop.time()
        if now_s - self._unasked_since_s > 1:
            self._unasked, self._unasked_since_s = 0, now_s
        self.events_taken += 1
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
            self.end(self._intake.excess())
            return
        self.hung = True
        self.end(ConnectionLost(f"{self.path}: QEMU did not answer {command} within {allowed_s:g} s"))

    def end(self, reason: ConnectionLost) -> None:
        """End the session, and tell all who wait."""
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
