"""The other side of MQTT, for programs: a client of a broker on which agents publish.

::

    async with Client("mqtt://localhost") as client:
        print(await client.retained("qmpballoon/+/status"))
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Final, Self

import aiomqtt
from aiomqtt.exceptions import MqttConnectError

from qmpballoon.config.values import BrokerUrl, broker_url
from qmpballoon.errors import ConfigurationError, ConnectionLost, Problem, RequestRefused, Unreachable
from qmpballoon.mqtt.commands import Message
from qmpballoon.mqtt.connection import Broker, Connection, Login, reason_code
from qmpballoon.mqtt.limits import NOT_AUTHORIZED, REFUSED, UNSUPPORTED_PROTOCOL, packet_size
from qmpballoon.mqtt.outbox import Publication
from qmpballoon.mqtt.packets import Packet
from qmpballoon.readers import Wrong

_MOST_RECEIVED: Final = 100_000

QUIET_S: Final = 2.0  # without another retained message the broker has sent all that it has


class Client:
    """A connection to the first of the brokers that can be reached; use it as an async context manager.

    ``broker_url`` is one URL (mqtt, mqtts, ws, wss) or several, tried in turn, with MQTT 5, and 3.1.1 where a
    broker refuses it. Files are paths of PEM files. ``timeout_s`` limits each connect, and each wait for the
    broker.

    Raises:
        ConfigurationError: not a URL.
        Unreachable: on entering: no broker can be reached, or all refuse the connection.
    """

    def __init__(
        self,
        broker_url: str | BrokerUrl | Sequence[str | BrokerUrl],
        *,
        username: str | None = None,
        password: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        given = [broker_url] if isinstance(broker_url, str | BrokerUrl) else broker_url
        self._brokers = [_broker(url) for url in given]
        client_id = f"qmpballoon-{secrets.token_hex(4)}"  # 23 characters at most: MQTT 3.1.1 section 3.1.3
        self._login = Login(client_id, username, password, ca_file, cert_file, key_file)
        self._timeout_s = timeout_s
        self._connection: Connection | None = None
        self._lost: asyncio.Task[None] | None = None
        self._received: asyncio.Queue[Message] = asyncio.Queue()
        self._refusals: dict[str, str] = {}  # by topic

    async def __aenter__(self) -> Self:
        """Connect."""
        reasons: list[str] = []
        for broker in self._brokers:
            for mqtt5 in (True, False):
                try:
                    self._connection = await self._connected(broker, mqtt5=mqtt5)
                except aiomqtt.MqttError as error:
                    is_old = (
                        isinstance(error, MqttConnectError) and reason_code(error) == UNSUPPORTED_PROTOCOL
                    )
                    if mqtt5 and is_old:
                        continue
                    reasons.append(f"{broker}: {error}")
                else:
                    self._lost = asyncio.create_task(self._connection.wait_lost(), name="client lost")
                    return self
                break
        raise Unreachable(f"cannot reach the broker {'; '.join(reasons)}")

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnect."""
        if self._connection is not None:
            await self._connection.close()
        if self._lost is not None:
            self._lost.cancel()
            await asyncio.wait((self._lost,))
            if not self._lost.cancelled():
                self._lost.exception()

    async def retained(self, *filters: str) -> dict[str, bytes]:
        """Return the retained messages that match the filters, by topic.

        Raises:
            RequestRefused: ``not-allowed``: the broker refuses a subscription.
            ConnectionLost: the connection ended.
        """
        connection = self._up()
        while not self._received.empty():  # of an earlier call
            self._received.get_nowait()
        try:
            refused = await connection.subscribe(filters, retained=True)
        except aiomqtt.MqttError as error:
            raise ConnectionLost(f"the broker: {error}") from None
        if refused:
            raise RequestRefused(
                "not-allowed", f"the broker refuses {self._user} to read {', '.join(refused)}: check its ACL"
            )
        found: dict[str, bytes] = {}
        quiet_at_s = time.monotonic() + QUIET_S
        while (left_s := quiet_at_s - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    message = await self._received.get()
            except TimeoutError:
                break
            if message.retain and message.payload:
                found[message.topic] = message.payload
                quiet_at_s = time.monotonic() + QUIET_S
        self._up()
        return found

    async def clear(self, topics: Iterable[str]) -> dict[str, str]:
        """Remove the retained messages of topics; return those that the broker refused, with its reason.

        Brokers of MQTT 3.1.1 refuse silently: only `retained` tells.

        Raises:
            ConnectionLost: the connection ended, or the broker confirms nothing.
        """
        connection = self._up()
        self._refusals.clear()
        try:
            for topic in topics:
                await connection.window.wait_room()
                connection.send(_clearing(topic))
            deadline_s = asyncio.get_running_loop().time() + self._timeout_s
            is_confirmed = await connection.window.wait_fewer(1, deadline_s)
        except aiomqtt.MqttError as error:
            raise ConnectionLost(f"the broker: {error}") from None
        self._up()
        if not is_confirmed:
            raise ConnectionLost(f"the broker confirmed nothing for {self._timeout_s:g} s")
        return dict(self._refusals)

    @property
    def _user(self) -> str:
        return f"user {self._login.username}" if self._login.username else "an anonymous client"

    async def _connected(self, broker: Broker, *, mqtt5: bool) -> Connection:
        connection = Connection(
            broker,
            self._login,
            mqtt5=mqtt5,
            will=None,
            received=self._take,
            confirmed=self._note_confirmed,
        )
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await connection.open()
            except TimeoutError:
                raise aiomqtt.MqttError(f"no answer within {self._timeout_s:g} s") from None
        except BaseException:
            await connection.close()
            raise
        return connection

    def _take(self, message: Message) -> None:
        if self._received.qsize() < _MOST_RECEIVED:  # nobody waits for the others
            self._received.put_nowait(message)

    def _note_confirmed(self, publication: Publication, code: int) -> None:
        if code >= REFUSED:
            self._refusals[publication.topic] = (
                "not authorized" if code == NOT_AUTHORIZED else f"reason code {code:#04x}"
            )

    def _up(self) -> Connection:
        """Return the connection.

        Raises:
            ConnectionLost: it ended.
        """
        if self._connection is None or self._lost is None:
            raise ConnectionLost("the client is not connected: use it in async with")
        if self._lost.done():
            raise ConnectionLost(f"the broker: {self._lost.exception()}")
        return self._connection


def _clearing(topic: str) -> Packet:
    return Packet(Publication(topic, None, qos=1, retain=True), b"", None, packet_size(topic, b""))


def _broker(url: str | BrokerUrl) -> Broker:
    try:
        read: BrokerUrl = url if isinstance(url, BrokerUrl) else broker_url(url)
    except Wrong as wrong:
        raise ConfigurationError("broker", [Problem(None, "", wrong.reason)]) from None
    return Broker(read.scheme, read.host, read.port, read.path)
