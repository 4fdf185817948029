"""Why a connection to a broker could not be established, in a sentence that says what to change.

The sentences name keys of the configuration file, which are also the names of the client's arguments.
"""

from __future__ import annotations

import re
import ssl
from typing import Final

import aiomqtt
from aiomqtt.exceptions import MqttCodeError, MqttConnectError
from paho.mqtt.reasoncodes import ReasonCode

from qmpballoon.mqtt.limits import BAD_USER, NOT_AUTHORIZED

_UNKNOWN_ISSUER: Final = frozenset({18, 19, 20, 21})  # X509_V_ERR_*: self-signed, or no issuer is known
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_OTHER_NAME: Final = frozenset({62, 64})  # of a host, an IP address
_LOGIN: Final = {  # of a CONNACK: MQTT 3.1.1 table 3.1, MQTT 5 section 3.2.2.2
    4: "bad user name or password",
    5: "not authorized",
    BAD_USER: "bad user name or password",
    NOT_AUTHORIZED: "not authorized",
}
_REFUSED: Final = {  # of a CONNACK of MQTT 3.1.1; aiomqtt has other words for these numbers
    1: "it refuses this version of MQTT",
    2: "it refuses the client id",
    3: "its service is not available",
}
_CODE: Final = re.compile(r"^\[(code:|Errno )\d+\] ")


def handshake_refused(error: OSError, host: str, ca_file: str | None) -> str:
    """Return why a TLS handshake with a broker failed, which the URL calls ``host``."""
    if not isinstance(error, ssl.SSLCertVerificationError):
        reason = (getattr(error, "reason", None) or error.strerror or str(error)).replace("_", " ").lower()
        return f"the TLS handshake failed ({reason}): does it speak TLS on this port?"
    code, message = error.verify_code, error.verify_message.rstrip(".")
    if code in _UNKNOWN_ISSUER:
        if ca_file is None:
            return (
                f"its certificate is not from an authority that this system trusts ({message}): name the "
                "file with the authority's certificate as ca_file"
            )
        return f"its certificate is not from an authority in the ca_file {ca_file} ({message})"
    if code in _OTHER_NAME:
        return f"its certificate is not for {host}: use a name in the URL that the certificate has"
    if code == _EXPIRED:
        return "its certificate has expired: renew it, or set this machine's clock"
    if code == _NOT_YET_VALID:
        return "its certificate is not valid yet: set this machine's clock"
    return f"its certificate cannot be verified: {message}"


def closed_early(scheme: str, cert_file: str | None) -> str:
    """Return what a broker may want that closed before it answered. A broker does not tell."""
    closed = "closed before it was established"
    if scheme == "mqtt":
        return f"{closed}: it may expect TLS on this port (mqtts)"
    if scheme != "mqtts":
        return closed
    if cert_file is None:
        return f"{closed}: it may require a client certificate (cert_file)"
    return f"{closed}: it may not accept the client certificate {cert_file}"


def no_websocket(error: Exception) -> str:
    """Return why a broker did not accept a websocket. Its path may hold a secret and is not repeated."""
    reason = str(error).removeprefix("WebSocket ") or "no answer"
    return f"no websocket ({reason}): are the port and the path those of its websockets?"


def reason(error: aiomqtt.MqttError, username: str | None) -> str:
    """Return why there is no connection to a broker, and what to check where it refuses a login."""
    code = reason_code(error) if isinstance(error, MqttConnectError) else None
    if code not in _LOGIN:
        return _REFUSED.get(code or 0) or _CODE.sub("", str(error))
    if username is None:
        return f"it refuses a client without a user name ({_LOGIN[code]}): set username and password_file"
    return f"it refuses user {username} ({_LOGIN[code]}): check username and password_file"


def reason_code(error: aiomqtt.MqttError) -> int | None:
    """Return the reason code of an error, None if it has none."""
    code = error.rc if isinstance(error, MqttCodeError) else None
    return int(code.value) if isinstance(code, ReasonCode) else code
