"""Reads received requests as fast as their answers are sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from qmpballoon.mqtt.commands import Message, arrival_of
from qmpballoon.mqtt.inbox import Inbox
from qmpballoon.mqtt.outbox import Outbox
from qmpballoon.mqtt.topics import Topics
from qmpballoon.protocol.requests import Requests

_AT_ONCE: Final = 2  # then what arrived is stored, before the broker drops it
_LOOK_S: Final = 0.02  # whether there is room for answers


class RequestReader:
    """Passes messages on command topics to ``requests``, also those of a connection that is lost by now.

    ``vm_exists`` is as for `Requests`; ``dropped`` is called for each message that finds no room.
    """

    def __init__(
        self,
        requests: Requests,
        vm_exists: Callable[[str], bool],
        topics: Topics,
        outbox: Outbox,
        clock: Callable[[], float],
        dropped: Callable[[], None],
    ) -> None:
        self._requests = requests
        self._vm_exists = vm_exists
        self._topics = topics
        self._outbox = outbox
        self._clock = clock
        self._inbox = Inbox(self._group_of, dropped)

    def put(self, message: Message) -> None:
        """Take a message on a command topic; it is read soon."""
        self._inbox.put(message)

    async def run(self) -> None:
        """Read requests until cancelled."""
        while True:
            await self._inbox.wait()
            for _ in range(_AT_ONCE):
                if self._outbox.answers.is_full:
                    await asyncio.sleep(_LOOK_S)
                    break
                if not self._read_next():
                    break
            await asyncio.sleep(0)

    def stop(self) -> None:
        """Answer all requests, those that run and those that wait, with ``offline``; start no more."""
        self._requests.stop()
        while self._read_next():
            pass

    def _read_next(self) -> bool:
        message = self._inbox.take()
        if message is None:
            return False
        group = self._group_of(message.topic)
        arrival = arrival_of(message, self._topics, self._outbox.answer, self._clock, group)
        if arrival is not None:
            self._requests.receive(arrival)
        return True

    def _group_of(self, topic: str) -> str:
        """Return the VM of a command topic; empty for the host, and for all names that are no VM's."""
        vm = self._topics.vm_of(topic)
        return vm if self._vm_exists(vm) else ""
