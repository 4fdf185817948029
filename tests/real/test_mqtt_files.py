"""Passwords, certificates and keys for a broker: errors in one, and what a reload takes over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_process import StartAgent
from certificates import certify, tls_options
from mqtt_listener import WAIT_S, running, settings_for

from qmpballoon.errors import ConfigurationError
from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.lab.waiting import eventually
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.mqtt.connection import Broker
from qmpballoon.tls import client_context


@pytest.fixture
async def encrypted(sockets_dir: Path) -> AsyncIterator[LabBroker]:
    """A broker with TLS; its certificate is ``broker.pem``."""
    certificate, key = certify(sockets_dir, "broker")
    async with LabBroker(sockets_dir, options=tls_options(certificate, key)) as broker:
        yield broker


def refusal(*files: Path | None) -> str:
    """Return the error for an unusable CA file, certificate or key."""
    with pytest.raises(ConfigurationError) as caught:
        client_context(*(None if file is None else str(file) for file in files))
    return str(caught.value)


def test_an_invalid_file_is_named(tmp_path: Path) -> None:
    certificate, key = certify(tmp_path, "a")
    _, other_key = certify(tmp_path, "b")
    _, locked_key = certify(tmp_path, "c", "-passout", "pass:sesame")
    junk, missing = tmp_path / "junk.pem", tmp_path / "missing.pem"
    junk.write_text("no PEM")
    missing_file = "cannot be read: No such file or directory"
    used = f"{certificate}: mqtt.cert_file: cannot be used with the key"
    assert refusal(missing, None, None) == f"{missing}: mqtt.ca_file: {missing_file}"
    assert refusal(None, missing, key) == f"{missing}: mqtt.cert_file: {missing_file}"
    assert refusal(None, certificate, missing) == f"{missing}: mqtt.key_file: {missing_file}"
    assert refusal(junk, None, None) == f"{junk}: mqtt.ca_file: cannot be used: no certificate or crl found"
    assert refusal(None, junk, None).startswith(f"{junk}: mqtt.cert_file: cannot be used: ")
    assert refusal(None, certificate, other_key) == f"{used} {other_key}: key values mismatch"
    assert refusal(None, certificate, locked_key).startswith(
        f"{locked_key}: mqtt.key_file: the key is encrypted"
    )
    assert client_context(str(certificate), str(certificate), str(key)).check_hostname


async def test_a_certificate_removed_while_the_agent_runs_is_logged_and_used_when_it_is_back(
    sockets_dir: Path, encrypted: LabBroker, caplog: pytest.LogCaptureFixture
) -> None:
    authority = sockets_dir / "broker.pem"
    kept = authority.read_bytes()
    authority.unlink()
    brokers = (Broker("mqtts", HOST, encrypted.port),)
    bridge = Bridge(settings_for(brokers=brokers, ca_file=str(authority)), nothing, vm_exists=lambda _: False)

    async def errors() -> object:
        return [line for line in caplog.messages if line.startswith("broker-unreachable")]

    async with running(bridge, until_connected=False):
        await eventually(errors, bool, timeout_s=WAIT_S, what="the file is logged")
        authority.write_bytes(kept)
        assert await bridge.wait_connected(WAIT_S)
    assert f"{authority}: mqtt.ca_file: cannot be read: No such file or directory" in caplog.text


async def nothing(_: object) -> object:
    return None


async def test_a_reload_takes_over_changed_certificates_and_refuses_unusable_ones(
    sockets_dir: Path, encrypted: LabBroker, start_agent: StartAgent
) -> None:
    certificate, key = certify(sockets_dir, "client")
    agent = start_agent(
        None,
        mqtt={
            "url": f"mqtts://{HOST}:{encrypted.port}",
            "ca_file": str(sockets_dir / "broker.pem"),
            "cert_file": str(certificate),
            "key_file": str(key),
        },
    )
    await agent.until_logged("broker-connected")
    agent.reload()
    await agent.until_logged("reloaded")
    certify(sockets_dir, "client")
    agent.reload()
    await agent.until_logged("broker-connected", times=2)
    certificate.unlink()
    agent.reload()
    assert f"{certificate}: mqtt.cert_file: cannot be read" in await agent.until_logged("reload-refused")
    certify(sockets_dir, "client")
    agent.reload()
    await agent.until_logged("broker-connected", times=3)
    assert len(agent.logged("broker-connected")) == 3  # unchanged files made no new connection


async def test_a_reload_takes_over_a_changed_password(sockets_dir: Path, start_agent: StartAgent) -> None:
    password = sockets_dir / "password"
    password.write_text("sesame\n")
    async with LabBroker(sockets_dir, passwords={"agent": "sesame"}) as broker:
        agent = start_agent(broker, mqtt={"username": "agent", "password_file": str(password)})
        await agent.until_logged("broker-connected")
        password.write_text("thyme\n")
        agent.reload()
        await agent.until_logged("broker-refused")
        password.write_text("sesame")
        agent.reload()
        await agent.until_logged("broker-connected", times=2)
    assert await agent.terminate() == 0


async def test_an_agent_whose_certificate_is_missing_does_not_start(
    sockets_dir: Path, start_agent: StartAgent
) -> None:
    missing = sockets_dir / "none.pem"
    agent = start_agent(None, mqtt={"url": "mqtts://localhost", "ca_file": str(missing)})
    assert await agent.program.ended(timeout_s=WAIT_S) == 2
    assert f"{missing}: mqtt.ca_file: cannot be read: No such file or directory" in agent.log.read_text()
