"""Sends what the outbox has over one connection, as the broker takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from qmpballoon.mqtt.announced import Announced
from qmpballoon.mqtt.connection import Connection
from qmpballoon.mqtt.guesses import Guesses
from qmpballoon.mqtt.outbox import Outbox, Pace, Publication
from qmpballoon.mqtt.packets import Composer, Loss
from qmpballoon.mqtt.said import Said

_PACE_S: Final = 0.02  # between the repetitions that `Pace` allows


@dataclass(slots=True)
class Sender:
    """Sends over ``connection``; ``composer`` has the broker's limits.

    Messages are sent one at a time while ``guesses`` ask for that. ``wake`` is set when something is due.
    ``made_smaller`` is called when a message had to be changed to fit.
    """

    connection: Connection
    composer: Composer
    outbox: Outbox
    announced: Announced
    said: Said
    guesses: Guesses
    wake: asyncio.Event
    clock: Callable[[], float]
    made_smaller: Callable[[Publication, Loss], None]

    async def run(self, sent: Callable[[Publication], None]) -> None:
        """Send until cancelled; ``sent`` gets each message that was sent.

        Raises:
            aiomqtt.MqttError: the connection is lost.
        """
        pace, answers, window = Pace(), self.outbox.answers, self.connection.window
        was_uncertain = False
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._next_look_s()):
                    await self.wake.wait()
            self.wake.clear()
            answers.wake(self.clock())
            while True:
                alone = was_uncertain or self.guesses.one_at_a_time or answers.next_is_uncertain
                await window.wait_room(1 if alone else None)
                publication = self.outbox.take(
                    retained=not self.announced.has_new, repeats=pace.allows(self.clock())
                )
                if publication is None:
                    break
                if publication.is_repeat:
                    pace.count()
                was_uncertain = publication.is_uncertain
                self.send(publication)
                sent(publication)

    def send(self, publication: Publication) -> None:
        """Send one message, if the broker takes it in any form.

        Raises:
            aiomqtt.MqttError: the connection is lost.
        """
        packet, loss = self.composer.compose(publication)
        if loss:
            self.made_smaller(publication, loss)
        if packet is not None:
            self.connection.send(packet)
            if packet.publication.retain:
                self.said.said(publication.topic, packet.payload)

    async def send_last(self, last: Publication, *, answers_within_s: float, within_s: float) -> None:
        """Send the answers and then ``last``; wait a bounded time for their PUBACKs.

        Raises:
            aiomqtt.MqttError: the connection is lost.
        """
        began_s, window = asyncio.get_running_loop().time(), self.connection.window
        while await window.wait_fewer(window.limit, began_s + answers_within_s):
            publication = self.outbox.take_answer()
            if publication is None:
                break
            self.send(publication)
        self.send(last)
        await window.wait_fewer(1, began_s + within_s)

    def _next_look_s(self) -> float | None:
        """Return after how many seconds something may be due without a wake-up; None: nothing will be."""
        if self.outbox.has_repeats:
            return _PACE_S
        later_s = self.outbox.answers.next_later_s
        return None if later_s is None else max(0.0, later_s - self.clock())
