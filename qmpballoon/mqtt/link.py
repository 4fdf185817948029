"""The connection of a client from its start to its loss, and waits that end with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import aiomqtt

from qmpballoon.errors import ConnectionLost, Unreachable
from qmpballoon.mqtt.commands import Message
from qmpballoon.mqtt.connection import Broker, Connection, Login
from qmpballoon.mqtt.outbox import Publication
from qmpballoon.mqtt.packets import Packet
from qmpballoon.mqtt.refusals import reason
from qmpballoon.mqtt.subscribing import subscribe_in_time
from qmpballoon.mqtt.versions import ANSWERS_5_WITHIN_S, may_refuse_5

MQTT_5_FIRST: Final = (True, False)
ONLY_311: Final = (False,)


class Link:
    """A client's connection. ``news`` is done when the next message or confirmation has come."""

    def __init__(self) -> None:
        self._news: asyncio.Future[None] | None = None
        self._connection: Connection | None = None
        self._lost: asyncio.Task[None] | None = None
        self._sends = asyncio.Lock()  # a window has one waiter
        self._open_311: Callable[[], Awaitable[None]] | None = None  # until MQTT 5 is proved

    async def open(
        self,
        brokers: Sequence[Broker],
        login: Login,
        timeout_s: float,
        *,
        received: Callable[[Message], None],
        confirmed: Callable[[Publication, int], None],
        versions: Sequence[bool] | None = None,
    ) -> None:
        """Connect to the first broker that can be reached, with MQTT 5, and 3.1.1 where it refuses that.

        ``versions`` are tried in turn, True is MQTT 5; None: MQTT_5_FIRST.

        Raises:
            Unreachable: none can be reached, or all refuse the connection.
        """
        reasons: list[str] = []
        for broker in brokers:
            for mqtt5 in versions or MQTT_5_FIRST:
                connection = Connection(
                    broker,
                    login,
                    mqtt5=mqtt5,
                    answers_within_s=min(ANSWERS_5_WITHIN_S, timeout_s / 2) if mqtt5 else timeout_s,
                    will=None,
                    received=received,
                    confirmed=confirmed,
                )
                try:
                    await _opened(connection, timeout_s)
                except aiomqtt.MqttError as error:
                    why = reason(error, login.username)
                    if not (mqtt5 and may_refuse_5(error)):
                        break
                else:
                    connection.window.limit = connection.announced.window
                    self._connection = connection
                    self._lost = asyncio.create_task(connection.wait_lost(), name="client lost")
                    self._open_311 = None
                    if mqtt5:
                        self._open_311 = partial(
                            self.open,
                            (broker,),
                            login,
                            timeout_s,
                            received=received,
                            confirmed=confirmed,
                            versions=ONLY_311,
                        )
                    return
            reasons.append(f"{broker}: {why}")
        raise Unreachable(f"cannot reach the broker {'; '.join(reasons)}")

    async def close(self) -> None:
        """Disconnect."""
        if self._connection is not None:
            await self._connection.close()
        if self._lost is not None:
            self._lost.cancel()
            await asyncio.wait((self._lost,))
            if not self._lost.cancelled():
                self._lost.exception()

    @property
    def connection(self) -> Connection:
        """The connection.

        Raises:
            ConnectionLost: it ended.
        """
        self.check()
        assert self._connection is not None
        return self._connection

    def check(self) -> None:
        """Raise ConnectionLost if the connection ended."""
        if self._lost is None:
            raise ConnectionLost("the client is not connected: use it in async with")
        if self._lost.done():
            reason = "closed" if self._lost.cancelled() else self._lost.exception()
            raise ConnectionLost(f"the broker: {reason}")

    async def send(self, packet: Packet) -> None:
        """Send a message when fewer than the broker takes are unconfirmed.

        Raises:
            ConnectionLost: the connection ended, or the broker confirms nothing.
        """
        async with self._sends:
            try:
                await self.connection.window.wait_room()
                self.connection.send(packet)
            except aiomqtt.MqttError as error:
                raise ConnectionLost(f"the broker: {error}") from None

    async def subscribe(self, filters: tuple[str, ...], timeout_s: float) -> list[str]:
        """Subscribe, with what is retained; return the filters that the broker refused.

        Over MQTT 3.1.1 it is asked again for ``timeout_s`` (see `subscribing`). Some brokers refuse MQTT 5
        only here; if the connection ends with the first SUBSCRIBE, a new one uses 3.1.1.

        Raises:
            ConnectionLost: the connection ended, or no answer in time.
        """
        open_311, self._open_311 = self._open_311, None
        try:
            return await self._subscribe(filters, timeout_s)
        except ConnectionLost:
            if open_311 is None:
                raise
            await self.close()
            with suppress(Unreachable):
                await open_311()
                return await self._subscribe(filters, timeout_s)
            raise

    async def _subscribe(self, filters: tuple[str, ...], timeout_s: float) -> list[str]:
        asked = asyncio.create_task(
            subscribe_in_time(self.connection, filters, timeout_s), name="client subscribe"
        )
        try:
            await self.wait(asked, None)
            return asked.result()
        except aiomqtt.MqttError as error:
            raise ConnectionLost(f"the broker: {error}") from None
        finally:
            asked.cancel()
            await asyncio.wait((asked,))
            if not asked.cancelled():
                asked.exception()

    @property
    def news(self) -> asyncio.Future[None]:
        """What is done when something has come since now."""
        if self._news is None:
            self._news = asyncio.get_running_loop().create_future()
        return self._news

    def note_news(self) -> None:
        """Note that something has come."""
        if self._news is not None:
            self._news.set_result(None)
            self._news = None

    async def wait(self, future: asyncio.Future[Any], timeout_s: float | None) -> bool:
        """Wait until a future is done; return False if it is not in time.

        Raises:
            ConnectionLost: the connection ended before.
        """
        if self._lost is None:
            raise ConnectionLost("the client is not connected: use it in async with")
        await asyncio.wait({future, self._lost}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            self.check()
        return future.done()


async def _opened(connection: Connection, timeout_s: float) -> None:
    try:
        try:
            async with asyncio.timeout(timeout_s):
                await connection.open()
        except TimeoutError:
            raise aiomqtt.MqttError(f"no answer within {timeout_s:g} s") from None
    except BaseException:
        await connection.close()
        raise
