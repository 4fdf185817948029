"""One connection to one broker: aiomqtt's client, changed where a daemon needs it.

aiomqtt 2.5 wraps paho-mqtt for asyncio. What this class changes, each seen with aiomqtt 2.5.1 and
paho-mqtt 2.2:

- A connect that times out, is cancelled or fails in a TLS or websocket handshake leaves its socket
  open, and its thread may still establish the connection later, under our client id. Here the socket
  is closed, at once or when the thread ends. The thread is one that nothing waits for (see `connecting`),
  and a handshake in it ends with the socket.
- A broker that closes before its CONNACK, or sends something else, is noticed at once, not after the
  time-out. So is a connection that is lost while a SUBSCRIBE waits for its answer.
- TCP_NODELAY is set, also below a websocket: Nagle's algorithm adds 40 ms to an answer. TCP_QUICKACK is
  set after each read, because the broker may use that algorithm, too (see `quick_ack`).
- A socket that was closed before its writer is registered is skipped: aiomqtt reads its descriptor
  later, which may belong to another file by then. One that uvloop gave up because it broke (no reader is
  called then, and a writer is refused) ends the connection: `check` finds it where nothing is written.
- `send` hands a message to paho and returns: aiomqtt's ``publish`` waits for each PUBACK and
  spends up to 290 µs of processor time, paho 20. The reason code of a PUBACK is reported.
- The limits that the broker announces in its CONNACK are read (see `limits`): paho would exceed them.
- Received messages are passed on at once, without a task for each.
- `close` has a time limit and leaves no socket and no task.

paho's public callbacks are used where they suffice. PRIVATE_NAMES lists the private names in use.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import ssl
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

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
from qmpballoon.mqtt.connecting import in_own_thread
from qmpballoon.mqtt.limits import WINDOW, Limits
from qmpballoon.mqtt.outbox import Publication
from qmpballoon.mqtt.packets import Packet
from qmpballoon.mqtt.refusals import closed_early, handshake_refused, no_websocket
from qmpballoon.mqtt.window import Sent, Window
from qmpballoon.quick_ack import set_after_reads
from qmpballoon.tls import client_context

T = TypeVar("T")

CONNECT_TIMEOUT_S: Final = 10.0
KEEPALIVE_S: Final = 20
LARGEST_PACKET: Final = 1024 * 1024  # largest that we accept; a request is at most 64 KiB

PRIVATE_NAMES: Final = (
    "aiomqtt.Client._client: mqtt.Client",
    "aiomqtt.Client._connected: asyncio.Future[None]",
    "aiomqtt.Client._disconnected: asyncio.Future[None]",
    "paho.Client._create_socket_connection(self) -> '_socket.socket'",
    "paho.Client._sock_close(self) -> 'None'",
    "paho.Client._ssl_wrap_socket(self, tcp_sock: '_socket.socket') -> 'ssl.SSLSocket'",
)
"""Private names of aiomqtt and paho in use; a test compares them with the installed releases."""

_wire_log = logging.getLogger("qmpballoon.mqtt.wire")
_wire_log.setLevel(logging.CRITICAL)  # paho logs a lost socket as an error; the bridge logs it once


@dataclass(frozen=True, slots=True)
class Broker:
    """Where a broker listens: ``mqtt``, ``mqtts``, ``ws`` or ``wss``; the path is for websockets."""

    scheme: str
    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        """Return it for messages: a path may hold a secret, and is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{'/...' if self.path else ''}"


@dataclass(frozen=True, slots=True)
class Login:
    """Credentials and client id for a broker; files are paths."""

    client_id: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


class NoConnack(aiomqtt.MqttError):
    """The broker was reached, and did not answer with a CONNACK."""


class ClosedEarly(NoConnack):
    """It closed, or answered with something else."""


class Connection:
    """A connection with a clean start and no session. Call `open`, then `close`, once each.

    ``received`` gets every message. ``confirmed`` gets each message that the broker took or, with a reason
    code from 128 on, refused. ``announced`` is what the broker takes, by its CONNACK, for which `open` waits
    ``answers_within_s``.
    """

    def __init__(
        self,
        broker: Broker,
        login: Login,
        *,
        mqtt5: bool,
        answers_within_s: float = CONNECT_TIMEOUT_S,
        will: aiomqtt.Will | None,
        received: Callable[[Message], None],
        confirmed: Callable[[Publication, int], None],
    ) -> None:
        is_websocket = broker.scheme in ("ws", "wss")
        self.mqtt5: Final = mqtt5
        self.broker: Final = broker
        self._login = login
        self._answers_within_s = answers_within_s
        self.announced = Limits()
        self.window: Final = Window()
        self._received = received
        self._confirmed = confirmed
        self._loop = asyncio.get_running_loop()
        self._tls: ssl.SSLContext | None = None
        self._in_handshake = False
        self._raw: socket.socket | None = None
        self._connect_returned = False
        self._closed = False
        self._had_ended = False  # at the last `check`
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
        self._accepted: Any = paho.on_connect
        paho.on_connect = self._on_connect
        paho.on_disconnect = self._on_disconnect
        paho.on_publish = self._on_publish
        paho.on_message = self._on_message
        paho.on_socket_register_write = self._on_socket_register_write
        set_after_reads(paho, lambda: self._raw)
        self._connect_tcp = paho._create_socket_connection
        paho._create_socket_connection = self._open_socket  # type: ignore[method-assign]
        paho._ssl_wrap_socket = self._wrap_tls  # type: ignore[method-assign]

    @property
    def no_delay(self) -> bool:
        """Whether TCP_NODELAY is set on the socket."""
        return self._raw is not None and self._raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0

    async def open(self) -> None:
        """Connect and wait for the CONNACK.

        Raises:
            aiomqtt.MqttError: the broker is unreachable, refuses (then an
                `aiomqtt.exceptions.MqttConnectError` with ``rc``), closes (`ClosedEarly`) or does not answer
                in time (`NoConnack`).
        """
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await in_own_thread(self._connect, name=f"connect to {self.broker.host}")
            await asyncio.wait(  # a bare await would cancel the futures on cancellation
                {self._established, self._ended},
                timeout=self._answers_within_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not self._established.done():
                if not self._ended.done():
                    raise NoConnack(f"no answer within {self._answers_within_s:g} s")
                raise ClosedEarly(f"no valid answer ({self._ended.exception()}): is it an MQTT broker?")
            self._established.result()
        except TimeoutError:
            raise aiomqtt.MqttError(f"no answer within {CONNECT_TIMEOUT_S:g} s") from None
        except WebsocketConnectionError as error:
            raise aiomqtt.MqttError(no_websocket(error)) from None
        except (OSError, UnicodeError, ConfigurationError) as error:
            # UnicodeError: an invalid host name. ConfigurationError: an unusable certificate or key.
            if isinstance(error, OSError) and self._in_handshake:
                sentence = handshake_refused(error, self.broker.host, self._login.ca_file)
                raise aiomqtt.MqttError(sentence) from None
            raise aiomqtt.MqttError(str(error) or type(error).__name__) from None

    async def subscribe(
        self, filters: tuple[str, ...], *, qos: int = 1, retained: bool = False, own: bool = True
    ) -> list[str]:
        """Subscribe; with MQTT 5 without retained messages, and with the retain flag as published.

        With ``retained`` the broker sends the retained messages, also again, and only these have the flag.
        Without ``own``, of which 3.1.1 knows nothing, what this client publishes does not come back.

        Over MQTT 3.1.1 always with QoS 0: NATS makes a replicated consumer for each subscription of QoS 1,
        and refuses it after 5 s while a dead node is to lead it. To ask for QoS 0 only then takes too long:
        5 s for each filter. Either loses messages only with the connection, as the session ends with it.

        Returns:
            The filters that the broker refused.

        Raises:
            aiomqtt.MqttError: the connection is lost, or no answer in time.
        """
        if self.mqtt5:
            options = SubscribeOptions(
                qos=qos,
                noLocal=not own,
                retainAsPublished=not retained,
                retainHandling=0 if retained else 2,
            )
            asked = self._aiomqtt.subscribe([(one, options) for one in filters])
        else:
            asked = self._aiomqtt.subscribe([(one, 0) for one in filters])
        granted = await self._while_connected(asked)
        codes = [code if isinstance(code, int) else int(getattr(code, "value", 0)) for code in granted]
        return [one for one, code in zip(filters, codes, strict=False) if code >= 128]

    async def _while_connected(self, call: Coroutine[Any, Any, T]) -> T:
        """Return what a call returns, or raise why the connection ended meanwhile."""
        task = asyncio.create_task(call, name="mqtt call")
        try:
            either: set[asyncio.Future[Any]] = {task, self._ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                await self.wait_lost()
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()

    async def wait_lost(self) -> None:
        """Wait until the connection has ended, then raise the reason.

        Raises:
            aiomqtt.MqttError: always.
        """
        await asyncio.wait({self._ended})
        error = self._ended.exception()
        if isinstance(error, aiomqtt.MqttError):
            raise error
        raise aiomqtt.MqttError(str(error or "closed")) from error

    def send(self, packet: Packet) -> None:
        """Pass a message to paho, in order, without waiting.

        Raises:
            aiomqtt.MqttError: there is no connection.
        """
        publication = packet.publication
        if publication.is_sample and self._paho.want_write():
            return  # the socket is full: a sample is useless later
        qos = min(publication.qos, self.announced.qos)
        info = self._paho.publish(
            publication.topic, packet.payload, qos, publication.retain, packet.properties
        )
        if not publication.is_sample:
            self.window.add(info.mid, Sent(publication, packet.size))
        if info.rc != MQTT_ERR_SUCCESS:
            raise aiomqtt.MqttError("the connection is lost")

    def check(self) -> None:
        """Notice an end that the loop did not report since the last call.

        uvloop may give up a socket that is reset while data waits to be read.
        """
        if self._raw is None:
            return
        look = select.poll()
        look.register(self._raw, select.POLLRDHUP)
        has_ended = bool(look.poll(0))
        if has_ended and self._had_ended:
            self._lose("the broker closed it")
        self._had_ended = has_ended

    async def close(self, timeout_s: float = 1.0) -> None:
        """Send DISCONNECT if the connection is up, and close the socket."""
        try:
            if self._established.done() and not self._ended.done() and _succeeded(self._established):
                self._paho.disconnect()
                await asyncio.wait({self._ended}, timeout=timeout_s)
        finally:
            for future in (self._established, self._ended):
                if future.done():
                    _succeeded(future)  # retrieves its exception
            self._closed = True
            if self._connect_returned:
                self._paho._sock_close()
            elif self._raw is not None:
                with suppress(OSError):
                    socket.socket.shutdown(self._raw, socket.SHUT_RDWR)  # wakes the thread of _connect

    def _connect(self) -> None:
        """Connect; run in a thread, because paho blocks and files are read."""
        properties = None
        if self.mqtt5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.MaximumPacketSize = LARGEST_PACKET
        try:
            if self.broker.scheme in ("mqtts", "wss"):
                login = self._login
                context = client_context(login.ca_file, login.cert_file, login.key_file)
                self._paho.tls_set_context(context)
                self._tls = context
            self._paho.connect(
                self.broker.host,
                self.broker.port,
                KEEPALIVE_S,
                clean_start=True if self.mqtt5 else MQTT_CLEAN_START_FIRST_ONLY,  # paho's "not given"
                properties=properties,
            )
        except (OSError, ValueError, WebsocketConnectionError):
            if self._raw is not None:
                self._raw.close()
            raise
        finally:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._on_connect_returned)

    def _open_socket(self) -> socket.socket:
        self._raw = self._connect_tcp()
        self._check_wanted()
        self._raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._raw

    def _wrap_tls(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        """Replace paho's method, which leaves the socket open when the handshake fails."""
        if self._tls is None or not self._tls.check_hostname:
            raise ssl.SSLError("the broker's name would not be checked")
        encrypted = self._tls.wrap_socket(
            tcp_sock, server_hostname=self.broker.host, do_handshake_on_connect=False
        )
        self._raw = encrypted
        self._check_wanted()
        encrypted.settimeout(CONNECT_TIMEOUT_S)
        self._in_handshake = True
        encrypted.do_handshake()
        self._in_handshake = False
        return encrypted

    def _check_wanted(self) -> None:
        if self._closed:  # by the loop, while this thread connected
            raise OSError("given up")

    def _on_connect_returned(self) -> None:
        self._connect_returned = True
        if self._closed:
            self._paho._sock_close()

    def _on_socket_register_write(self, client: Any, userdata: Any, sock: Any) -> None:
        if self._connect_returned:
            self._add_writer(sock)
        else:  # called in the thread of _connect
            self._loop.call_soon_threadsafe(self._add_writer, sock)

    def _add_writer(self, sock: Any) -> None:
        try:
            if sock.fileno() >= 0:
                self._loop.add_writer(sock.fileno(), self._write)
        except RuntimeError as error:  # uvloop has closed its handle
            self._lose(error)

    def _lose(self, reason: object) -> None:
        if not self._ended.done():
            self._ended.set_exception(aiomqtt.MqttError(f"the connection broke: {reason}"))
        self.window.lose()

    def _write(self) -> None:
        try:
            self._paho.loop_write()
        except OSError as error:
            if not self._ended.done():
                self._ended.set_exception(error)

    def _on_connect(
        self, client: Any, userdata: Any, flags: Any, reason_code: ReasonCode, properties: Any = None
    ) -> None:
        self.announced = Limits.announced(properties)
        self._accepted(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self, client: Any, userdata: Any, flags: Any, reason_code: ReasonCode, properties: Any = None
    ) -> None:
        if self._closed:  # nobody waits any more
            return
        if not self._established.done():
            self._established.set_exception(
                ClosedEarly(closed_early(self.broker.scheme, self._login.cert_file))
            )
            return
        if _succeeded(self._established) and not self._ended.done():
            if reason_code.value == 0:
                self._ended.set_result(None)
            else:
                self._ended.set_exception(MqttCodeError(reason_code, "Unexpected disconnection"))
        self.window.lose()

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
        except UnicodeDecodeError:
            return  # the topic is not UTF-8
        self._received(received)

    def _on_publish(
        self, client: Any, userdata: Any, mid: int, reason_code: ReasonCode, properties: Any
    ) -> None:
        sent = self.window.confirm(mid)
        if sent is None:
            return
        if reason_code.value < 128 and sent.publication.qos:
            self.window.largest_confirmed = max(self.window.largest_confirmed, sent.size)
        self._confirmed(sent.publication, reason_code.value)


def _succeeded(future: asyncio.Future[None]) -> bool:
    return not future.cancelled() and future.exception() is None
