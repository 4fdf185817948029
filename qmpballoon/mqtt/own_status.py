"""Our own status as the broker sends it back: nothing else proves that we may publish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from qmpballoon.mqtt.connection_log import ConnectionLog

ECHO_TIMEOUT_S: Final = 5.0
_PARTS: Final = 5  # of that time-out: a delay of our own loop ends one of them only


class OwnStatus:
    """Our own status as the broker sends it back. ``contradicted`` is called when it is not ours."""

    def __init__(self, log: ConnectionLog, contradicted: Callable[[], None]) -> None:
        self.seen: Final = asyncio.Event()  # that we are online
        self._log = log
        self._contradicted = contradicted

    def received(self, payload: bytes) -> None:
        """Take the status that somebody published: we, or the broker."""
        if payload == b"online":
            self.seen.set()
        elif self.seen.is_set():
            # The will of our previous connection, which the broker closed only now.
            self.seen.clear()
            self._contradicted()

    async def check(self, is_unconfirmed: Callable[[], bool]) -> None:
        """Wait until it comes back, and log that it did, or that it does not in time.

        ``is_unconfirmed`` tells whether the broker has not even confirmed it: then the broker has stopped.
        """
        while True:
            for _ in range(_PARTS):
                with suppress(TimeoutError):
                    async with asyncio.timeout(ECHO_TIMEOUT_S / _PARTS):
                        await self.seen.wait()
                    self._log.status_received()
                    return
            if not is_unconfirmed():
                self._log.status_missing(ECHO_TIMEOUT_S)
                return
