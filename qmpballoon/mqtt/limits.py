"""What a broker takes: packet size, unconfirmed messages, QoS, retained messages. Pure.

MQTT 5 announces it in the CONNACK (section 3.2.2.3). A broker of 3.1.1, or one that announces nothing, shows
it only by ending the connection: see `guesses`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from paho.mqtt.properties import Properties

WINDOW: Final = 20  # unconfirmed messages; mosquitto's Receive Maximum

NO_MATCHING_SUBSCRIBERS: Final = 0x10
REFUSED: Final = 0x80  # reason codes from here on
UNSPECIFIED: Final = 0x80  # also paho's code for a connection that ended without a DISCONNECT
MALFORMED_PACKET: Final = 0x81
PROTOCOL_ERROR: Final = 0x82
IMPLEMENTATION_SPECIFIC: Final = 0x83
UNSUPPORTED_PROTOCOL: Final = 0x84
CLIENT_ID_NOT_VALID: Final = 0x85
BAD_USER: Final = 0x86
NOT_AUTHORIZED: Final = 0x87
SESSION_TAKEN_OVER: Final = 0x8E
RECEIVE_MAXIMUM_EXCEEDED: Final = 0x93
PACKET_TOO_LARGE: Final = 0x95
RETAIN_NOT_SUPPORTED: Final = 0x9A
QOS_NOT_SUPPORTED: Final = 0x9B

REFUSED_CREDENTIALS: Final = frozenset({BAD_USER, NOT_AUTHORIZED})


@dataclass(frozen=True, slots=True)
class Limits:
    """What a broker takes; ``packet`` is in bytes, None without a limit; ``window`` counts messages."""

    packet: int | None = None
    window: int = WINDOW
    qos: int = 1
    retain: bool = True

    @classmethod
    def announced(cls, connack: Properties | None) -> Self:
        """Return what the properties of a CONNACK announce; what is absent is not limited."""
        return cls(
            packet=getattr(connack, "MaximumPacketSize", None),
            window=max(1, min(WINDOW, getattr(connack, "ReceiveMaximum", WINDOW))),
            qos=min(1, getattr(connack, "MaximumQoS", 1)),
            retain=bool(getattr(connack, "RetainAvailable", 1)),
        )

    def within(self, other: Limits) -> Limits:
        """Return the stricter of both, limit by limit."""
        packets = [one for one in (self.packet, other.packet) if one is not None]
        return Limits(
            min(packets, default=None),
            min(self.window, other.window),
            min(self.qos, other.qos),
            self.retain and other.retain,
        )

    def takes(self, size: int) -> bool:
        """Tell whether a packet of that size is taken."""
        return self.packet is None or size <= self.packet


def packet_size(topic: str, payload: bytes, content_type: str = "", correlation: bytes = b"") -> int:
    """Return the bytes of a PUBLISH packet, at most 15 too many.

    Fixed header 5, topic 2 and its bytes, packet id 2, length of the properties 4, each property 3.
    """
    properties = sum(3 + len(one) for one in (content_type, correlation) if one)
    return 13 + len(topic.encode()) + properties + len(payload)
