"""The requests of a client that wait for their answers. No I/O.

A request bears its transaction twice: in its payload, which the answer repeats on every protocol, and as
MQTT 5 correlation data.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from typing import Final

from qmpballoon.errors import RequestRefused
from qmpballoon.mqtt.commands import Message
from qmpballoon.mqtt.limits import NO_MATCHING_SUBSCRIBERS, NOT_AUTHORIZED, REFUSED
from qmpballoon.mqtt.outbox import Publication
from qmpballoon.protocol.payloads import decode_object


class Waiting:
    """One request: ``answer`` gets the response object, or None if nobody receives the request.

    ``refused`` is why the broker did not take the request, empty if it did.
    """

    def __init__(self, transaction: str, publication: Publication) -> None:
        self.transaction: Final = transaction
        self.publication: Final = publication
        self.refused = ""
        self.answer: asyncio.Future[Mapping[str, object] | None] = asyncio.get_running_loop().create_future()

    def end(self, response: Mapping[str, object] | None) -> None:
        """Set the answer, if there is none yet."""
        if not self.answer.done():
            self.answer.set_result(response)


class Replies:
    """Requests by their transactions, which start with ``client_id``."""

    def __init__(self, client_id: str) -> None:
        self._client_id = client_id
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Waiting] = {}
        self._sent: dict[int, Waiting] = {}  # by the identity of its publication, which it keeps alive

    def expect(self, topic: str) -> Waiting:
        """Return a request that is to be sent to a topic; `forget` it in the end."""
        waiting = Waiting(f"{self._client_id}-{next(self._numbers)}", Publication(topic, None))
        self._waiting[waiting.transaction] = waiting
        self._sent[id(waiting.publication)] = waiting
        return waiting

    def forget(self, waiting: Waiting) -> None:
        """Take no answer for it any more."""
        del self._waiting[waiting.transaction], self._sent[id(waiting.publication)]

    def take(self, message: Message) -> None:
        """Take a message on a topic of answers; those of other clients, and later ones, are ignored."""
        try:
            response = decode_object(message.payload, message.content_type)
        except RequestRefused:
            return
        transaction = response.get("transaction")
        waiting = self._waiting.get(transaction) if isinstance(transaction, str) else None
        if waiting is not None and "status" in response:
            waiting.end(response)

    def confirmed(self, publication: Publication, code: int) -> None:
        """Take the broker's confirmation of a request; those of other messages are ignored."""
        waiting = self._sent.get(id(publication))
        if waiting is None:
            return
        if code >= REFUSED:
            waiting.refused = "not authorized" if code == NOT_AUTHORIZED else f"reason code {code:#04x}"
            waiting.end(None)
        elif code == NO_MATCHING_SUBSCRIBERS:
            waiting.end(None)
