"""Sentences for connections that could not be established, of causes that are hard to bring about."""

from __future__ import annotations

import ssl

import aiomqtt
import pytest
from aiomqtt.exceptions import MqttConnectError
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from qmpballoon.mqtt.connection import Broker
from qmpballoon.mqtt.refusals import closed_early, handshake_refused, reason


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


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (4, "bad user name or password"),
        (5, "not authorized"),
        (ReasonCode(PacketTypes.CONNACK, identifier=134), "bad user name or password"),
        (ReasonCode(PacketTypes.CONNACK, identifier=135), "not authorized"),
    ],
)
def test_a_refused_login_says_whose_and_what_to_check(code: int | ReasonCode, problem: str) -> None:
    error = MqttConnectError(code)
    assert reason(error, "edge") == f"it refuses user edge ({problem}): check username and password_file"
    assert "without a user name" in reason(error, None)
    assert "set username and password_file" in reason(error, None)


def test_other_errors_are_told_without_their_numbers() -> None:
    assert reason(aiomqtt.MqttError("[Errno 111] Connection refused"), None) == "Connection refused"
    assert reason(MqttConnectError(3), "edge") == "its service is not available"
    assert (
        reason(MqttConnectError(ReasonCode(PacketTypes.CONNACK, identifier=136)), None)
        == "Server unavailable"
    )
