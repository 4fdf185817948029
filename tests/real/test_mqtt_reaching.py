"""How a broker is reached: TLS, client certificates, websockets, a list of brokers, and credentials."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_process import StartAgent
from certificates import certify, expire, tls_options
from mqtt_listener import WAIT_S, running, settings_for

from qmpballoon import log as log_module
from qmpballoon.client import Client
from qmpballoon.errors import Unreachable
from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.lab.waiting import eventually
from qmpballoon.mqtt import bridge as bridge_module
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.mqtt.connection import Broker
from qmpballoon.protocol.requests import Request

STATE = "qmpballoon/edge-7/vm/web1/state"
SIGNED_BY_NOBODY = "its certificate is not from an authority"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(bridge_module, "SHORTEST_PAUSE_S", 0.02)
    monkeypatch.setattr(bridge_module, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(log_module, "_repeats", log_module._Repeats())
    caplog.set_level(logging.INFO, "qmpballoon")


@pytest.fixture
async def encrypted(sockets_dir: Path) -> AsyncIterator[LabBroker]:
    """A broker with TLS; its certificate is ``broker.pem``."""
    async with LabBroker(sockets_dir, options=tls_options(*certify(sockets_dir, "broker"))) as broker:
        yield broker


async def echo(request: Request) -> object:
    return {"verb": request.verb, "vm": request.vm}


def an_agent(brokers: tuple[Broker, ...], **changed: object) -> Bridge:
    """Return the MQTT side of an agent with one VM."""
    bridge = Bridge(settings_for(brokers=brokers, **changed), echo, vm_exists=lambda vm: vm == "web1")
    bridge.retain(STATE, lambda: {"size": 1024})
    return bridge


async def refusal(url: str, **files: str) -> str:
    """Return why a client cannot connect to a broker."""
    with pytest.raises(Unreachable) as caught:
        async with Client(url, timeout_s=WAIT_S, fleet=False, **files):
            pass
    return str(caught.value)


# ---- servers that cannot be verified ----


async def test_a_server_that_cannot_be_verified_is_refused_and_what_mends_it_is_said(
    sockets_dir: Path, encrypted: LabBroker, caplog: pytest.LogCaptureFixture
) -> None:
    url, own = f"mqtts://{HOST}:{encrypted.port}", str(sockets_dir / "broker.pem")
    other = str(certify(sockets_dir, "other")[0])
    unknown = await refusal(url)
    assert f"{SIGNED_BY_NOBODY} that this system trusts (self-signed certificate)" in unknown
    assert unknown.endswith("name the file with the authority's certificate as ca_file")
    assert f"{SIGNED_BY_NOBODY} in the ca_file {other} " in await refusal(url, ca_file=other)
    named = await refusal(f"mqtts://localhost:{encrypted.port}", ca_file=own)
    assert "its certificate is not for localhost: use a name in the URL that the certificate has" in named
    async with running(an_agent((Broker("mqtts", HOST, encrypted.port),)), until_connected=False):
        (line,) = await eventually(
            lambda: lines(caplog, "broker-unreachable"), bool, timeout_s=WAIT_S, what="the agent logs it"
        )
    assert f"{SIGNED_BY_NOBODY} that this system trusts" in line
    async with Client(url, ca_file=own, fleet=False):
        pass


async def lines(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [line for line in caplog.messages if line.startswith(word)]


async def test_a_server_whose_certificate_has_expired_is_refused(sockets_dir: Path) -> None:
    certificate, key = certify(sockets_dir, "broker")
    expire(certificate, key)
    async with LabBroker(sockets_dir, options=tls_options(certificate, key)) as broker:
        reason = await refusal(f"mqtts://{HOST}:{broker.port}", ca_file=str(certificate))
    assert "its certificate has expired: renew it, or set this machine's clock" in reason


async def test_the_wrong_scheme_is_said(sockets_dir: Path, encrypted: LabBroker) -> None:
    async with LabBroker(sockets_dir, name="plain") as plain:
        assert "does it speak TLS on this port?" in await refusal(f"mqtts://{HOST}:{plain.port}")
        assert "are the port and the path those of its websockets?" in await refusal(
            f"ws://{HOST}:{plain.port}"
        )
    assert "it may expect TLS on this port (mqtts)" in await refusal(f"mqtt://{HOST}:{encrypted.port}")


async def test_the_path_of_a_websocket_may_be_secret_and_is_not_repeated(sockets_dir: Path) -> None:
    async with LabBroker(sockets_dir) as plain:
        reason = await refusal(f"ws://{HOST}:{plain.port}/sesame")
    assert "sesame" not in reason
    assert f"ws://{HOST}:{plain.port}/..." in reason


# ---- client certificates ----


async def test_a_client_certificate_is_the_login_where_the_broker_wants_one(
    sockets_dir: Path, start_agent: StartAgent
) -> None:
    options = tls_options(*certify(sockets_dir, "broker"))
    certificate, key = certify(sockets_dir, "agent", subject="qmpballoon-edge-7")
    options += [f"cafile {certificate}", "require_certificate true", "use_identity_as_username true"]
    acl = ["user qmpballoon-edge-7", "topic readwrite qmpballoon/edge-7/#"]
    own = str(sockets_dir / "broker.pem")
    async with LabBroker(sockets_dir, options=options, acl=acl, allow_anonymous=False) as broker:
        url = f"mqtts://{HOST}:{broker.port}"
        files = {"ca_file": own, "cert_file": str(certificate), "key_file": str(key)}
        agent = start_agent(None, mqtt={"url": url, "home_assistant": False, **files})
        await agent.until_logged("broker-connected")
        async with Client(url, fleet=False, **files) as client:  # type: ignore[arg-type]
            assert await client.request("edge-7", "list") == []
        assert "it may require a client certificate (cert_file)" in await refusal(url, ca_file=own)
        strange, strange_key = certify(sockets_dir, "strange")
        reason = await refusal(url, ca_file=own, cert_file=str(strange), key_file=str(strange_key))
        assert f"it may not accept the client certificate {strange}" in reason
        assert await agent.terminate() == 0
    assert not agent.logged("broker-acl")


# ---- websockets ----


@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_agent_and_client_speak_through_websockets(sockets_dir: Path, scheme: str) -> None:
    certificate, key = certify(sockets_dir, "broker")
    # mosquitto 2.0.11 ends where its only listener speaks websockets, hence a second one.
    options = [
        *(tls_options(certificate, key) if scheme == "wss" else ()),
        f"listener 0 {sockets_dir}/mqtt.socket",
    ]
    async with LabBroker(sockets_dir, websockets=True, options=options) as broker:
        place = (Broker(scheme, HOST, broker.port, "/mqtt"),)
        async with (
            running(an_agent(place, ca_file=str(certificate))),
            Client(f"{scheme}://{HOST}:{broker.port}/mqtt", ca_file=str(certificate)) as client,
        ):
            assert client.vms["edge-7/web1"].size == 1024
            assert await client.request("edge-7/web1", "get") == {"verb": "get", "vm": "web1"}


# ---- several brokers ----


async def test_the_second_broker_serves_while_the_first_is_dead_and_the_first_when_the_second_is(
    sockets_dir: Path,
) -> None:
    async with LabBroker(sockets_dir, name="first") as first, LabBroker(sockets_dir, name="second") as second:
        await first.kill()
        bridge = an_agent((Broker("mqtt", HOST, first.port), Broker("mqtt", HOST, second.port)))
        both = [first.url, second.url]
        async with running(bridge):
            assert await served_by(both) == second.port
            await first.start()
            await second.kill()
            assert await served_by(both) == first.port
            await second.start()
            await first.kill()
            assert await served_by(both) == second.port


async def served_by(urls: list[str]) -> int:
    """Return the port of the broker where the agent answers, and has published what it retains."""

    async def ask() -> int:
        try:
            async with Client(urls, timeout_s=WAIT_S) as client:
                if "edge-7" not in client.hosts or not client.hosts["edge-7"].online:
                    return 0
                assert client.vms["edge-7/web1"].size == 1024
                assert await client.request("edge-7/web1", "get") == {"verb": "get", "vm": "web1"}
                return client._link.connection.broker.port
        except Unreachable:
            return 0

    return await eventually(ask, bool, timeout_s=WAIT_S, what="the agent is online")


# ---- credentials ----


async def test_the_password_is_that_of_systemds_credential(
    sockets_dir: Path, start_agent: StartAgent
) -> None:
    credentials = sockets_dir / "credentials"
    credentials.mkdir()
    (credentials / "mqtt-password").write_text("sesame\n")
    async with LabBroker(sockets_dir, passwords={"agent": "sesame"}) as broker:
        agent = start_agent(
            broker, before=["env", f"CREDENTIALS_DIRECTORY={credentials}"], mqtt={"username": "agent"}
        )
        await agent.until_logged("broker-connected")
        assert await agent.terminate() == 0
    assert "sesame" not in agent.log.read_text()


async def test_a_wrong_password_is_refused_with_the_user_and_without_the_password(
    sockets_dir: Path, start_agent: StartAgent
) -> None:
    password = sockets_dir / "password"
    password.write_text("thyme\n")
    async with LabBroker(sockets_dir, passwords={"agent": "sesame"}) as broker:
        agent = start_agent(broker, mqtt={"username": "agent", "password_file": str(password)})
        line = await agent.until_logged("broker-refused")
    assert "agent" in line
    assert "thyme" not in agent.log.read_text()
