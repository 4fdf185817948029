"""One connection to one broker: aiomqtt's client, changed where a daemon needs it.

aiomqtt 2.5 brings paho-mqtt to asyncio. What this class changes, each seen with aiomqtt 2.5.1 and
paho-mqtt 2.2:

- A connect that times out, is cancelled or fails in a TLS or websocket handshake leaves its socket
  open, and one that still runs in its thread may come up later under our client id: the socket is
  closed, now or then.
- A broker that closes before its CONNACK is noticed at once, not after the time-out.
- TCP_NODELAY, also below a websocket: else Nagle's algorithm adds 40 ms to an answer.
- A socket that is closed in the moment it should be written to is let alone: aiomqtt looks for its
  descriptor later, which may be another file's by then.
- `send` hands a message to paho and returns: aiomqtt's ``publish`` waits for each PUBACK and
  spends up to 290 µs of processor time, paho 20. PUBACKs are counted against a window, and a
  reason why the broker did not take the message is reported.
- Messages are read from a bounded queue without a task for each.
- `close` has a time limit and leaves nothing behind.

Where paho's public callbacks suffice, they are used; the private names that are left stand in
PRIVATE_NAMES.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import aiomqtt
from aiomqtt.exceptions import MqttCodeError
from paho.mqtt.client import (
    MQTT_CLEAN_START_FIRST_ONLY,
    MQTT_ERR_SUCCESS,
    MQTTMessage,
    WebsocketConnectionError,
)
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from qmpballoon.errors import ConfigurationError
from qmpballoon.mqtt.commands import Message
from qmpballoon.mqtt.outbox import Publication
from qmpballoon.tls import client_context

CONNECT_TIMEOUT_S: Final = 10.0
CONFIRM_TIMEOUT_S: Final = 20.0
KEEPALIVE_S: Final = 20
WINDOW: Final = 20  # unconfirmed messages; mosquitto's Receive Maximum
LARGEST_PACKET: Final = 1024 * 1024  # what may be sent to us; a request is at most 64 KiB
MOST_WAITING_MESSAGES: Final = 1000
UNSUPPORTED_PROTOCOL: Final = 132
SESSION_TAKEN_OVER: Final = 142
REFUSED_CREDENTIALS: Final = frozenset({134, 135})  # bad user name or password, not authorised

PRIVATE_NAMES: Final = (
    "aiomqtt.Client._client: mqtt.Client",
    "aiomqtt.Client._connected: asyncio.Future[None]",
    "aiomqtt.Client._disconnected: asyncio.Future[None]",
    "paho.Client._create_socket_connection(self) -> '_socket.socket'",
    "paho.Client._sock_close(self) -> 'None'",
    "paho.Client._ssl_wrap_socket(self, tcp_sock: '_socket.socket') -> 'ssl.SSLSocket'",
)
"""All that is touched beyond the public names of both; a test compares it with the releases installed."""

_wire_log = logging.getLogger("qmpballoon.mqtt.wire")
_wire_log.setLevel(logging.CRITICAL)  # paho logs a lost socket as an error; the bridge says it once


@dataclass(frozen=True, slots=True)
class Broker:
    """Where a broker listens: ``mqtt``, ``mqtts``, ``ws`` or ``wss``; the path is for websockets."""

    scheme: str
    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}{self.path}"


@dataclass(frozen=True, slots=True)
class Login:
    """Credentials and client id for a broker; files are paths."""

    client_id: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


class ContentType(Properties):
    """The properties of a message that has a content type and no others, packed once: paho takes 40 µs."""

    def __init__(self, content_type: str) -> None:
        super().__init__(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        self.ContentType = content_type
        object.__setattr__(self, "packed", super().pack())  # type: ignore[no-untyped-call]

    def pack(self) -> bytes:
        """Return the packed properties."""
        packed: bytes = object.__getattribute__(self, "packed")
        return packed


class Connection:
    """A connection with a clean start and no session behind it. Use `open`, then `close`, once."""

    def __init__(
        self,
        broker: Broker,
        login: Login,
        *,
        mqtt5: bool,
        will: aiomqtt.Will,
        confirmed: Callable[[Publication], None],
        refused: Callable[[Publication, str], None],
    ) -> None:
        is_websocket = broker.scheme in ("ws", "wss")
        self.mqtt5: Final = mqtt5
        self._broker = broker
        self._login = login
        self._confirmed = confirmed
        self._refused = refused
        self._loop = asyncio.get_running_loop()
        self._came: asyncio.Queue[Message] = asyncio.Queue(MOST_WAITING_MESSAGES)
        self._unconfirmed: dict[int, Publication] = {}
        self._window_moved = asyncio.Event()
        self._tls: ssl.SSLContext | None = None
        self._raw: socket.socket | None = None
        self._dialled = False
        self._given_up = False
        self._aiomqtt = aiomqtt.Client(
            broker.host,
            broker.port,
            identifier=login.client_id,
            username=login.username,
            password=login.password,
            protocol=aiomqtt.ProtocolVersion.V5 if mqtt5 else aiomqtt.ProtocolVersion.V311,
            clean_session=None if mqtt5 else True,
            will=will,
            transport="websockets" if is_websocket else "tcp",
            websocket_path=broker.path or "/mqtt" if is_websocket else None,
            keepalive=KEEPALIVE_S,
            max_inflight_messages=WINDOW,
            timeout=CONNECT_TIMEOUT_S,
            logger=_wire_log,
        )
        self._established: asyncio.Future[None] = self._aiomqtt._connected
        self._ended: asyncio.Future[None] = self._aiomqtt._disconnected
        self._paho = paho = self._aiomqtt._client
        paho.on_disconnect = self._on_disconnect
        paho.on_publish = self._on_publish
        paho.on_message = self._on_message
        paho.on_socket_register_write = self._on_socket_register_write
        self._connect_tcp = paho._create_socket_connection
        paho._create_socket_connection = self._dial  # type: ignore[method-assign]
        paho._ssl_wrap_socket = self._encrypt  # type: ignore[method-assign]

    @property
    def unconfirmed(self) -> list[Publication]:
        """What was sent at QoS 1 and not confirmed."""
        return list(self._unconfirmed.values())

    @property
    def no_delay(self) -> bool:
        """Whether TCP_NODELAY is really set on the socket."""
        return self._raw is not None and self._raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0

    async def open(self) -> None:
        """Connect and wait for the CONNACK.

        Raises:
            aiomqtt.MqttError: not reached, refused (then an `aiomqtt.exceptions.MqttConnectError`
                with ``rc``), or no answer in time.
        """
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._loop.run_in_executor(None, self._connect)
                await asyncio.wait({self._established})  # a bare await would cancel the future with us
            self._established.result()
        except TimeoutError:
            raise aiomqtt.MqttError(f"no answer within {CONNECT_TIMEOUT_S:g} s") from None
        except (OSError, UnicodeError, WebsocketConnectionError, ConfigurationError) as error:
            # UnicodeError: no host name. ConfigurationError: a certificate or key that is no use.
            raise aiomqtt.MqttError(str(error) or type(error).__name__) from None

    async def listen(self, filters: tuple[str, ...]) -> list[str]:
        """Subscribe, where MQTT 5 allows it to nothing retained and with the retain flag as published.

        Returns:
            The filters that the broker refused, if it says so.

        Raises:
            aiomqtt.MqttError: lost, or no answer in time.
        """
        if self.mqtt5:
            options = SubscribeOptions(qos=1, retainAsPublished=True, retainHandling=2)
            granted = await self._aiomqtt.subscribe([(one, options) for one in filters])
        else:
            granted = await self._aiomqtt.subscribe([(one, 1) for one in filters])
        codes = [code if isinstance(code, int) else int(getattr(code, "value", 0)) for code in granted]
        return [one for one, code in zip(filters, codes, strict=False) if code >= 128]

    async def receive(self) -> Message:
        """Return the next message."""
        return await self._came.get()

    async def lost(self) -> None:
        """Wait until the connection is gone, then raise why.

        Raises:
            aiomqtt.MqttError: always.
        """
        await asyncio.wait({self._ended})
        error = self._ended.exception()
        if isinstance(error, aiomqtt.MqttError):
            raise error
        raise aiomqtt.MqttError(str(error or "closed")) from error

    async def window(self) -> None:
        """Wait until one more message may be unconfirmed.

        Raises:
            aiomqtt.MqttError: the broker confirmed nothing for CONFIRM_TIMEOUT_S.
        """
        while len(self._unconfirmed) >= WINDOW:
            if not await self._moved(CONFIRM_TIMEOUT_S):
                raise aiomqtt.MqttError(f"the broker confirmed nothing for {CONFIRM_TIMEOUT_S:g} s")

    async def all_confirmed(self, timeout_s: float) -> None:
        """Wait until nothing is unconfirmed, the connection is lost or the time is over."""
        give_up_at_s = self._loop.time() + timeout_s
        while self._unconfirmed and not self._ended.done():
            if not await self._moved(give_up_at_s - self._loop.time()):
                return

    def send(self, publication: Publication, payload: bytes, properties: Properties | None) -> None:
        """Hand a message to paho, in order, without waiting.

        Raises:
            aiomqtt.MqttError: there is no connection.
        """
        if publication.qos == 0 and self._paho.want_write():
            return  # the socket is full: a sample is useless later
        info = self._paho.publish(publication.topic, payload, publication.qos, publication.retain, properties)
        if publication.qos:
            self._unconfirmed[info.mid] = publication
        if info.rc != MQTT_ERR_SUCCESS:
            raise aiomqtt.MqttError("the connection is lost")

    async def close(self, timeout_s: float = 1.0) -> None:
        """Send DISCONNECT if the connection is up, and close the socket."""
        try:
            if self._established.done() and not self._ended.done() and _is_fine(self._established):
                self._paho.disconnect()
                await asyncio.wait({self._ended}, timeout=timeout_s)
        finally:
            for future in (self._established, self._ended):
                if future.done():
                    _is_fine(future)  # takes note of its exception
            self._given_up = True
            if self._dialled:
                self._paho._sock_close()

    async def _moved(self, timeout_s: float) -> bool:
        # Not asyncio.timeout: with Python 3.11.2, Debian 12's, it does not end as a time-out in a task that
        # is being cancelled, and the farewell runs in one. With 3.11.7 it does.
        self._window_moved.clear()
        moved = asyncio.create_task(self._window_moved.wait(), name="mqtt window")
        try:
            await asyncio.wait((moved,), timeout=max(0.0, timeout_s))
            return moved.done()
        finally:
            moved.cancel()

    def _connect(self) -> None:
        """Runs in a thread, as paho connects blockingly and files are read."""
        properties = None
        if self.mqtt5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.MaximumPacketSize = LARGEST_PACKET
        try:
            if self._broker.scheme in ("mqtts", "wss"):
                login = self._login
                context = client_context(login.ca_file, login.cert_file, login.key_file)
                self._paho.tls_set_context(context)
                self._tls = context
            self._paho.connect(
                self._broker.host,
                self._broker.port,
                KEEPALIVE_S,
                clean_start=True if self.mqtt5 else MQTT_CLEAN_START_FIRST_ONLY,  # paho's "not given"
                properties=properties,
            )
        except (OSError, ValueError, WebsocketConnectionError):
            if self._raw is not None:
                self._raw.close()
            raise
        finally:
            self._loop.call_soon_threadsafe(self._on_dialled)

    def _dial(self) -> socket.socket:
        self._raw = self._connect_tcp()
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._raw

    def _encrypt(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        """Take the place of paho's, which leaves the socket open when the handshake fails."""
        if self._tls is None or not self._tls.check_hostname:
            raise ssl.SSLError("the broker's name would not be checked")
        encrypted = self._tls.wrap_socket(
            tcp_sock, server_hostname=self._broker.host, do_handshake_on_connect=False
        )
        self._raw = encrypted
        encrypted.settimeout(CONNECT_TIMEOUT_S)
        encrypted.do_handshake()
        return encrypted

    def _on_dialled(self) -> None:
        self._dialled = True
        if self._given_up:
            self._paho._sock_close()

    def _on_socket_register_write(self, client: Any, userdata: Any, sock: Any) -> None:
        if self._dialled:
            self._await_writable(sock)
        else:  # in the thread
            self._loop.call_soon_threadsafe(self._await_writable, sock)

    def _await_writable(self, sock: Any) -> None:
        if sock.fileno() >= 0:
            self._loop.add_writer(sock.fileno(), self._write)

    def _write(self) -> None:
        try:
            self._paho.loop_write()
        except OSError as error:
            if not self._ended.done():
                self._ended.set_exception(error)

    def _on_disconnect(
        self, client: Any, userdata: Any, flags: Any, reason_code: ReasonCode, properties: Any = None
    ) -> None:
        if not self._established.done():
            self._established.set_exception(aiomqtt.MqttError("closed before it was established"))
            return
        if _is_fine(self._established) and not self._ended.done():
            if reason_code.value == 0:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(MqttCodeError(reason_code, "Unexpected disconnection"))
        self._window_moved.set()

    def _on_message(self, client: Any, userdata: Any, message: MQTTMessage) -> None:
        properties = message.properties
        try:
            received = Message(
                message.topic,
                bytes(message.payload),
                message.retain,
                getattr(properties, "ContentType", None),
                getattr(properties, "ResponseTopic", None),
                getattr(properties, "CorrelationData", None),
                getattr(properties, "MessageExpiryInterval", None),
            )
            self._came.put_nowait(received)
        except (UnicodeDecodeError, asyncio.QueueFull):
            return  # no topic of ours; or more than is read, which costs the newest

    def _on_publish(
        self, client: Any, userdata: Any, mid: int, reason_code: ReasonCode, properties: Any
    ) -> None:
        publication = self._unconfirmed.pop(mid, None)
        if publication is None:
            return
        self._window_moved.set()
        if reason_code.value >= 128:
            self._refused(publication, str(reason_code))
        else:
            self._confirmed(publication)


def reason_code(error: aiomqtt.MqttError) -> int | None:
    """Return the reason code that came with an error, None where there is none."""
    code = error.rc if isinstance(error, MqttCodeError) else None
    return int(code.value) if isinstance(code, ReasonCode) else code


def _is_fine(future: asyncio.Future[None]) -> bool:
    return not future.cancelled() and future.exception() is None
