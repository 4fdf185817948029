"""Brokers that lack MQTT 5, each with its own way of refusing it."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator

import pytest
from imitated_broker import ImitatedBroker, Refusal
from mqtt_listener import WAIT_S, running, settings_for

from qmpballoon import log as log_module
from qmpballoon.client import Client
from qmpballoon.errors import Unreachable
from qmpballoon.lab.broker import HOST
from qmpballoon.lab.waiting import eventually
from qmpballoon.mqtt import bridge as bridge_module
from qmpballoon.mqtt import link as link_module
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.mqtt.guesses import KEPT_S
from qmpballoon.protocol.requests import Request

REFUSALS = {
    "0x84": Refusal(b"\x20\x03\0\x84\0"),
    "0x80": Refusal(b"\x20\x03\0\x80\0"),
    "0x81": Refusal(b"\x20\x03\0\x81\0"),
    "0x82": Refusal(b"\x20\x03\0\x82\0"),
    "0x83": Refusal(b"\x20\x03\0\x83\0"),
    "0x85": Refusal(b"\x20\x03\0\x85\0"),
    "1 of 3.1.1": Refusal(b"\x20\x02\0\x01"),
    "1 of 3.1.1, and it stays": Refusal(b"\x20\x02\0\x01", "waits"),
    "2 of 3.1.1": Refusal(b"\x20\x02\0\x02"),
    "5 of 3.1.1, and it stays": Refusal(b"\x20\x02\0\x05", "waits"),
    "success of 3.1.1": Refusal(b"\x20\x02\0\0", "waits"),
    "success, and it closes at the SUBSCRIBE": Refusal(b"\x20\x03\0\0\0", "closes-later"),
    "success, and 0x82 at the SUBSCRIBE": Refusal(b"\x20\x03\0\0\0\xe0\x02\x82\0"),
    "DISCONNECT": Refusal(b"\xe0\x02\x84\0"),
    "DISCONNECT of 3.1.1": Refusal(b"\xe0\0", "waits"),
    "half an answer": Refusal(b"\x20\x03\0"),
    "text": Refusal(b"HTTP/1.1 400 Bad Request\r\n\r\n", "waits"),
    "closes": Refusal(b""),
    "resets": Refusal(b"", "resets"),
    "no answer": Refusal(b"", "waits"),
}
EACH = pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)


class Clock:
    ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


async def handle(request: Request) -> object:
    return {"verb": request.verb}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(bridge_module, "SHORTEST_PAUSE_S", 0.02)
    monkeypatch.setattr(bridge_module, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(bridge_module, "ANSWERS_5_WITHIN_S", 0.3)
    monkeypatch.setattr(link_module, "ANSWERS_5_WITHIN_S", 0.3)
    monkeypatch.setattr(log_module, "_repeats", log_module._Repeats())
    monkeypatch.setattr(log_module, "_REPEATS", 1000)
    caplog.set_level(logging.INFO, "qmpballoon")


@pytest.fixture
async def old() -> AsyncIterator[ImitatedBroker]:
    broker = ImitatedBroker(lambda message: True)
    async with broker.running():
        yield broker


def a_bridge(broker: ImitatedBroker, protocol: str = "auto", clock: Clock | None = None) -> Bridge:
    return Bridge(
        settings_for(broker.port, protocol=protocol),
        handle,
        vm_exists=lambda vm: False,
        clock=clock or Clock(),
    )


def logged(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(f"{word} ")]


async def reconnected(bridge: Bridge) -> None:
    """Break the connection, and wait for the next one."""
    assert bridge.connection is not None
    bridge._online.clear()
    bridge.connection._paho.socket().shutdown(2)  # type: ignore[union-attr]
    assert await bridge.wait_connected(WAIT_S)


@EACH
async def test_3_1_1_is_used_at_once_and_kept_for_a_while(
    old: ImitatedBroker, refusal: Refusal, caplog: pytest.LogCaptureFixture
) -> None:
    old.refuses_5, clock = refusal, Clock()
    bridge = a_bridge(old, clock=clock)
    async with running(bridge):
        assert old.versions == [5, 4]
        await reconnected(bridge)
        assert old.versions == [5, 4, 4]
        assert len(logged(caplog, "broker-protocol")) == 1
        clock.ahead_s = KEPT_S + 1
        old.refuses_5 = None  # its successor knows MQTT 5
        await reconnected(bridge)
        assert old.versions == [5, 4, 4, 5]
    for word in ("broker-unreachable", "broker-refused", "client-id-taken", "broker-limits"):
        assert not logged(caplog, word)


@pytest.mark.parametrize("name", REFUSALS)
async def test_a_client_uses_3_1_1_where_5_is_refused(old: ImitatedBroker, name: str) -> None:
    old.refuses_5 = REFUSALS[name]
    async with Client(f"mqtt://{HOST}:{old.port}"):
        assert old.versions == [5, 4]


@pytest.mark.parametrize("code", [0x86, 0x87, 0x88, 0x89, 0x8A, 0x97, 0x9F])
async def test_a_refusal_that_is_not_about_the_version_is_not_tried_again_with_3_1_1(
    old: ImitatedBroker, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    old.refuses_5 = Refusal(bytes((0x20, 3, 0, code, 0)))
    async with running(a_bridge(old), until_connected=False):

        async def lines() -> list[str]:
            return logged(caplog, "broker-refused")

        await eventually(lines, bool, timeout_s=WAIT_S, what="the refusal is logged")
    with pytest.raises(Unreachable):
        async with Client(f"mqtt://{HOST}:{old.port}"):
            pass
    assert set(old.versions) == {5}


async def test_a_broker_that_is_replaced_by_one_without_3_1_1_is_asked_for_5_again(
    old: ImitatedBroker,
) -> None:
    old.refuses_5 = Refusal(b"")
    bridge = a_bridge(old)
    async with running(bridge):
        assert old.versions == [5, 4]
        old.refuses_5, old.refuses_311 = None, True
        await reconnected(bridge)
        assert old.versions[-1] == 5


async def test_5_alone_never_falls_back(old: ImitatedBroker) -> None:
    old.refuses_5 = Refusal(b"")
    async with running(a_bridge(old, "5"), until_connected=False):

        async def attempts() -> int:
            return len(old.versions)

        await eventually(attempts, lambda number: number > 5, timeout_s=WAIT_S, what="some attempts")
    assert set(old.versions) == {5}
