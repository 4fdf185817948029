"""The messages of one connection that the broker has not confirmed yet, and their number's limit."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import aiomqtt

from qmpballoon.mqtt.limits import WINDOW
from qmpballoon.mqtt.outbox import Publication

CONFIRM_TIMEOUT_S: Final = 20.0
_PARTS: Final = 4  # of a time-out: a delay of our own loop ends one of them, not the connection


@dataclass(frozen=True, slots=True)
class Sent:
    """A message that was sent, with the size of its packet in bytes."""

    publication: Publication
    size: int


class Window:
    """Unconfirmed messages by packet id. ``largest_confirmed`` is the largest packet that was confirmed."""

    def __init__(self) -> None:
        self.limit = WINDOW
        self.largest_confirmed = 0
        self._sent: dict[int, Sent] = {}
        self._changed: asyncio.Future[None] | None = None  # of a waiting sender
        self._is_lost = False

    @property
    def unconfirmed(self) -> list[Sent]:
        """Messages without a PUBACK, in the order in which they were sent."""
        return list(self._sent.values())

    def add(self, packet_id: int, sent: Sent) -> None:
        """Note that a message was sent. At QoS 0 it counts as confirmed when the socket took it."""
        self._sent[packet_id] = sent

    def confirm(self, packet_id: int) -> Sent | None:
        """Note a PUBACK; return its message, None if there is none."""
        sent = self._sent.pop(packet_id, None)
        if sent is not None:
            self._note_change()
        return sent

    def lose(self) -> None:
        """Note that the connection is lost: nothing is confirmed any more."""
        self._is_lost = True
        self._note_change()

    async def wait_room(self, limit: int | None = None) -> None:
        """Wait until one more message may be unconfirmed; ``limit`` is a lower one than the window's.

        Raises:
            aiomqtt.MqttError: the broker confirmed nothing for CONFIRM_TIMEOUT_S.
        """
        limit = self.limit if limit is None else min(limit, self.limit)
        while len(self._sent) >= limit:
            for _ in range(_PARTS):
                if await self._wait_change(CONFIRM_TIMEOUT_S / _PARTS):
                    break
            else:
                raise aiomqtt.MqttError(f"the broker confirmed nothing for {CONFIRM_TIMEOUT_S:g} s")

    async def wait_fewer(self, number: int, deadline_s: float) -> bool:
        """Wait until fewer than ``number`` messages are unconfirmed; False if lost or too late."""
        loop = asyncio.get_running_loop()
        while len(self._sent) >= number:
            if self._is_lost or not await self._wait_change(deadline_s - loop.time()):
                return False
        return not self._is_lost

    async def _wait_change(self, timeout_s: float) -> bool:
        # Not asyncio.timeout: with Python 3.11.2 (Debian 12; not 3.11.7) it does not raise TimeoutError in a
        # task that is being cancelled, and that task publishes ``offline``.
        self._changed = changed = asyncio.get_running_loop().create_future()
        await asyncio.wait((changed,), timeout=max(0.0, timeout_s))
        return changed.done()

    def _note_change(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
