"""TCP_QUICKACK: the kernel acknowledges received data at once instead of up to 40 ms later.

A broker that does not set TCP_NODELAY (mosquitto with its defaults) holds a small packet back until the
previous one is acknowledged. Each exchange then waits for the delayed acknowledgement of its client: a
command and its answer took 41 ms over mosquitto 2.0, and 1 ms with TCP_QUICKACK. The kernel resets the
option when data is sent (tcp(7)), so it is set again after each read.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import aiomqtt
    from paho.mqtt.client import Client
    from paho.mqtt.enums import MQTTErrorCode

_QUICKACK: Final[int | None] = getattr(socket, "TCP_QUICKACK", None)  # Linux


def set_quick_ack(sock: socket.socket) -> None:
    """Set TCP_QUICKACK; a closed socket, and a system without the option, are ignored."""
    if _QUICKACK is not None:
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)


def set_after_reads(paho: Client, socket_of: Callable[[], object]) -> None:
    """Set TCP_QUICKACK after each ``loop_read`` of a client, on the TCP or TLS socket that is returned."""
    read = paho.loop_read

    def loop_read(max_packets: int = 1) -> MQTTErrorCode:
        try:
            return read(max_packets)
        finally:
            sock = socket_of()
            if isinstance(sock, socket.socket):
                set_quick_ack(sock)

    paho.loop_read = loop_read  # type: ignore[method-assign]


def acknowledge_quickly(aiomqtt_client: aiomqtt.Client) -> None:
    """Set TCP_QUICKACK after each read of an aiomqtt client, connected or not; not below websockets."""
    paho = aiomqtt_client._client
    set_after_reads(paho, paho.socket)
