"""Messages are made to fit what a broker takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from qmpballoon.mqtt.answers import Answer
from qmpballoon.mqtt.limits import Limits, packet_size
from qmpballoon.mqtt.outbox import Publication
from qmpballoon.mqtt.packets import MOST_LOST, Composer, PackedProperties, Packet

ROWS = [{"vm": f"vm{number}"} for number in range(60)]


def composed(publication: Publication, **limits: Any) -> tuple[Packet | None, str]:
    return Composer(Limits(**limits), "json", mqtt5=True).compose(publication)


def an_answer(result: object = None, error: object = None, **changed: Any) -> Publication:
    value = {"transaction": 1, "status": "error" if error else "ok", "result": result, "error": error}
    fields: dict[str, Any] = {
        "topic": "mine", "value": value, "payload_format": "json", "correlation": b"c", "made_at_s": 0.0,
        "asked_at_s": 0.0, "own_topic": "own", **changed,
    }  # fmt: skip
    return Publication(fields["topic"], None, answer=Answer(**fields))


def content(packet: Packet | None) -> Any:
    assert packet is not None
    return json.loads(packet.payload)


@pytest.mark.parametrize("correlation", [None, b"", b"c" * 10, b"c" * 300])
def test_packed_properties_are_those_of_paho(correlation: bytes | None) -> None:
    slow = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    slow.ContentType = "application/json"
    if correlation is not None:
        slow.CorrelationData = correlation
    assert PackedProperties("application/json", correlation).pack() == slow.pack()  # type: ignore[no-untyped-call]


def test_a_message_that_fits_is_sent_as_it_is() -> None:
    packet, loss = composed(Publication("a", lambda: {"b": 1}, retain=True), packet=100)
    assert (content(packet), loss) == ({"b": 1}, "")


@pytest.mark.parametrize(("retain", "wanted"), [(True, "emptied"), (False, "left-out")])
def test_a_list_that_is_too_large_is_cleared_where_it_was_retained(retain: bool, wanted: str) -> None:
    packet, loss = composed(Publication("a", lambda: ROWS, retain=retain), packet=200)
    assert loss == wanted
    assert packet is None if not retain else packet is not None and packet.payload == b""


def test_the_largest_parts_of_an_object_are_emptied_and_named() -> None:
    value = {"seq": 1, "vms": {"total": 3}, "unidentified": ROWS, "holds": [{"size": 2}]}
    packet, loss = composed(Publication("host", lambda: value, retain=True), packet=200)
    assert loss == "cut"
    assert content(packet) == {**value, "unidentified": [], "cut": ["unidentified"]}
    packet, loss = composed(Publication("host", lambda: value, retain=True), packet=30)
    assert (packet is not None and packet.payload, loss) == (b"", "emptied")
    packet, loss = composed(Publication("host", lambda: value, retain=True), packet=10)
    assert (packet, loss) == (None, "left-out")


def test_an_answer_that_is_too_large_becomes_an_error_with_its_transaction() -> None:
    packet, loss = composed(an_answer(result=ROWS), packet=400)
    value = content(packet)
    assert (loss, value["transaction"], value["status"], value["result"]) == ("replaced", 1, "error", None)
    assert value["error"]["code"] == "too-large"
    assert "carried out" in value["error"]["message"]


def test_a_refusal_that_is_too_large_keeps_its_word() -> None:
    packet, _ = composed(an_answer(error={"code": "busy", "message": "x" * 900}), packet=400)
    assert content(packet)["error"]["code"] == "busy"


def test_correlation_data_that_does_not_fit_is_left_out() -> None:
    packet, loss = composed(an_answer(correlation=b"x" * 500), packet=400)
    assert loss == "replaced"
    assert packet is not None
    assert b"xxx" not in packet.properties.pack()  # type: ignore[union-attr]
    assert composed(an_answer(), packet=50) == (None, "left-out")


def test_an_answer_that_broke_connections_goes_to_its_own_topic_as_an_error() -> None:
    packet, loss = composed(an_answer(times_lost=MOST_LOST))
    assert packet is not None
    assert (packet.publication.topic, loss) == ("own", "replaced")
    assert content(packet)["status"] == "error"


def test_qos_and_retain_are_those_that_the_broker_takes() -> None:
    packet, _ = composed(Publication("a", lambda: "online", retain=True), qos=0, retain=False)
    assert packet is not None
    assert (packet.publication.qos, packet.publication.retain) == (0, False)


def test_a_packet_is_never_larger_than_its_size() -> None:
    for topic, payload, correlation in (("a", b"", b""), ("ä" * 900, b"x" * 300_000, b"c" * 1000)):
        properties = PackedProperties("application/json", correlation).pack()
        remaining = 2 + len(topic.encode()) + 2 + len(properties) + len(payload)
        length = 1 + (remaining >= 128) + (remaining >= 128**2) + (remaining >= 128**3)
        size = packet_size(topic, payload, "application/json", correlation)
        assert 0 <= size - (1 + length + remaining) <= 15


def test_limits_are_those_of_the_connack_and_the_stricter_of_two() -> None:
    connack = Properties(PacketTypes.CONNACK)  # type: ignore[no-untyped-call]
    assert Limits.announced(connack) == Limits() == Limits.announced(None)
    connack.MaximumPacketSize, connack.ReceiveMaximum = 2048, 10
    connack.MaximumQoS, connack.RetainAvailable = 0, 0
    assert Limits.announced(connack) == Limits(2048, 10, 0, retain=False)
    assert Limits(100, 5, 1).within(Limits(None, 9, 0, retain=False)) == Limits(100, 5, 0, retain=False)
