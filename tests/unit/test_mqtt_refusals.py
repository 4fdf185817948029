"""Sentences for connections that could not be established, of causes that are hard to bring about."""

from __future__ import annotations

import ssl

from qmpballoon.mqtt.connection import Broker
from qmpballoon.mqtt.refusals import closed_early, handshake_refused


def unverified(code: int, message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, message)
    error.verify_code, error.verify_message = code, message
    return error


def test_a_certificate_of_the_future_and_one_that_is_wrong_otherwise() -> None:
    early = unverified(9, "certificate is not yet valid")
    assert handshake_refused(early, "h", None) == (
        "its certificate is not valid yet: set this machine's clock"
    )
    weak = unverified(66, "EE certificate key too weak")
    assert handshake_refused(weak, "h", None) == (
        "its certificate cannot be verified: EE certificate key too weak"
    )


def test_a_broker_that_closes_an_encrypted_websocket_does_not_tell_why() -> None:
    assert closed_early("wss", None) == "closed before it was established"


def test_a_broker_is_named_as_in_a_url_without_its_path() -> None:
    assert str(Broker("mqtt", "::1", 1883)) == "mqtt://[::1]:1883"
    assert str(Broker("wss", "h", 443, "/token")) == "wss://h:443/..."
