"""``forget``: what a host or VM that is gone has left on a real broker."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgpack  # type: ignore[import-untyped]
import pytest
from agent_process import StartAgent
from mqtt_listener import Listener, listening

from qmpballoon import client as client_module
from qmpballoon.cli import main
from qmpballoon.client import Client
from qmpballoon.errors import ConnectionLost, Unreachable
from qmpballoon.lab.broker import LabBroker
from qmpballoon.model.records import rfc3339

Capture = pytest.CaptureFixture[str]

TRIAL = {
    "qmpballoon/trial/status": b"offline",
    "qmpballoon/trial/host": b"{}",
    "qmpballoon/trial/vms": b"[]",
    "qmpballoon/trial/vm/web1/state": b"{}",
    "qmpballoon/trial/vm/web1/availability": b"offline",
    "qmpballoon/trial/vm/web2/state": b"{}",
    "homeassistant/device/qmpballoon_trial/config": b'{"~": "qmpballoon/trial"}',
    "homeassistant/device/qmpballoon_trial_web1/config": b'{"t": "qmpballoon/trial/vm/web1/state"}',
}
OTHERS = {
    "qmpballoon/trial_web1/status": b"online",
    "qmpballoon/trial2/vm/web1/state": b"{}",
    "homeassistant/device/qmpballoon_trial_web1_a/config": b'{"t": "qmpballoon/trial_web1/vm/a/state"}',
    "homeassistant/device/qmpballoon_trial2/config": b'{"~": "qmpballoon/trial2"}',
    "homeassistant/device/thermostat/config": b'{"note": "qmpballoon/trial/status"}',
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "QUIET_S", 0.3)


@pytest.fixture
async def mosquitto(sockets_dir: Path) -> AsyncIterator[LabBroker]:
    async with LabBroker(sockets_dir) as broker:
        yield broker


@pytest.fixture
async def listener(mosquitto: LabBroker) -> AsyncIterator[Listener]:
    async with listening(mosquitto.port, "nothing/at/all") as listener:
        yield listener


async def publish(listener: Listener, messages: Mapping[str, bytes]) -> None:
    for topic, payload in messages.items():
        await listener.send(topic, payload, retain=True)


async def retained(
    broker: LabBroker, username: str | None = None, password: str | None = None
) -> dict[str, bytes]:
    async with Client(broker.url, username=username, password=password) as client:
        return await client.retained("#")


async def forget(*arguments: str) -> int:
    return await asyncio.to_thread(main, ["forget", *arguments])


async def test_a_host_is_forgotten_with_its_vms_and_devices_and_no_other(
    mosquitto: LabBroker, listener: Listener, capsys: Capture
) -> None:
    await publish(listener, TRIAL | OTHERS)
    assert await forget("trial", "--broker", mosquitto.url) == 0
    assert capsys.readouterr().out.splitlines() == [f"cleared {topic}" for topic in sorted(TRIAL)]
    assert await retained(mosquitto) == OTHERS
    assert await forget("trial", "--broker", mosquitto.url) == 0
    assert capsys.readouterr().out == "nothing is retained of trial; hosts are trial_web1\n"
    assert await retained(mosquitto) == OTHERS


async def test_devices_below_another_prefix_are_forgotten_where_it_is_named(
    mosquitto: LabBroker, listener: Listener
) -> None:
    device = "site/ha/device/qmpballoon_trial/config"
    other = "homeassistant/device/qmpballoon_trial/config"
    await publish(listener, dict.fromkeys((device, other), b'{"~": "qmpballoon/trial"}'))
    assert await forget("trial", "--broker", mosquitto.url, "--discovery-prefix", "site/ha") == 0
    assert (await retained(mosquitto)).keys() == {other}


async def test_a_vm_is_forgotten_alone(mosquitto: LabBroker, listener: Listener, capsys: Capture) -> None:
    await publish(listener, TRIAL | OTHERS)
    assert await forget("trial/web1", "--broker", mosquitto.url, "--json") == 0
    gone = {topic for topic in TRIAL if "web1" in topic}
    assert json.loads(capsys.readouterr().out) == {
        "host": "trial",
        "vm": "web1",
        "online": False,
        "cleared": sorted(gone),
    }
    left = {topic: payload for topic, payload in TRIAL.items() if topic not in gone}
    assert await retained(mosquitto) == left | OTHERS


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_the_agent_of_a_trial_is_refused_while_it_is_online_and_forgotten_afterwards(
    protocol: str, mosquitto: LabBroker, start_agent: StartAgent, capsys: Capture
) -> None:
    mqtt = {"protocol": protocol, "heartbeat_s": 3600}
    agent = start_agent(mosquitto, mqtt=mqtt, agent={"host": "a trial"}, discovery={"sockets": []})
    await agent.until_logged("broker-connected")
    before = await retained(mosquitto)
    assert await forget("a trial", "--broker", mosquitto.url) == 1
    assert capsys.readouterr().err == (
        "qmpballoon: the agent of a_trial is online and would publish them again: stop it, or give --force\n"
    )
    assert (await retained(mosquitto)).keys() == before.keys()
    assert await forget("a trial", "--broker", mosquitto.url, "--force") == 0
    assert "cleared qmpballoon/a_trial/host" in capsys.readouterr().out
    assert await agent.terminate() == 0
    assert await forget("a trial", "--broker", mosquitto.url) == 0
    assert await retained(mosquitto) == {}


@pytest.mark.parametrize("pack", [json.dumps, msgpack.packb])
@pytest.mark.parametrize(("age_s", "code"), [(100, 1), (200, 0)])
async def test_an_agent_that_is_silent_for_three_heartbeats_is_not_online(
    age_s: float, code: int, pack: Callable[[object], str | bytes], mosquitto: LabBroker, listener: Listener
) -> None:
    then = datetime.fromtimestamp(time.time() - age_s, UTC)
    payload = pack({"ts": rfc3339(then), "heartbeat_s": 60})
    host = payload.encode() if isinstance(payload, str) else payload
    await publish(listener, {"qmpballoon/trial/status": b"online", "qmpballoon/trial/host": host})
    assert await forget("trial", "--broker", mosquitto.url) == code


async def test_the_broker_is_taken_from_the_environment_or_a_file(
    mosquitto: LabBroker, listener: Listener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    monkeypatch.delenv("QMPBALLOON_BROKER", raising=False)
    assert await forget("trial") == 2
    assert "no broker is named: give --broker URL, set $QMPBALLOON_BROKER, or give -c FILE" in (
        capsys.readouterr().err
    )
    file = tmp_path / "agent.toml"
    file.write_text(f"[mqtt]\nurl = '{mosquitto.url}'\nbase_topic = 'mine'\n")
    await publish(listener, {"mine/trial/status": b"offline", "qmpballoon/trial/status": b"offline"})
    assert await forget("trial", "-c", str(file)) == 0
    assert await retained(mosquitto) == {"qmpballoon/trial/status": b"offline"}
    monkeypatch.setenv("QMPBALLOON_BROKER", mosquitto.url)
    assert await forget("trial") == 0
    assert await retained(mosquitto) == {}


async def test_a_broker_that_cannot_be_reached_or_refuses_is_exit_3(
    sockets_dir: Path, capsys: Capture
) -> None:
    async with LabBroker(sockets_dir, passwords={"me": "sesame"}) as broker:
        password = sockets_dir / "password"
        password.write_text("thyme")
        password.chmod(0o600)
        login = ["--username", "me", "--password-file", str(password)]
        assert await forget("trial", "--broker", broker.url, *login) == 3
        assert f"cannot reach the broker {broker.url}: " in capsys.readouterr().err
        password.write_text("sesame")
        assert await forget("trial", "--broker", broker.url, *login) == 0
    assert await forget("trial", "--broker", broker.url) == 3


async def test_what_the_broker_does_not_let_clear_is_named(sockets_dir: Path, capsys: Capture) -> None:
    acl = ["user root", "topic readwrite #", "user me", "topic read #", "topic write qmpballoon/trial/vms"]
    async with LabBroker(sockets_dir, passwords={"me": "a", "root": "b"}, acl=acl) as broker:
        async with listening(broker.port, "nothing", username="root", password="b") as listener:
            await publish(listener, TRIAL)
        (sockets_dir / "password").write_text("a")
        login = ["--username", "me", "--password-file", str(sockets_dir / "password")]
        assert await forget("trial", "--broker", broker.url, *login) == 1
        captured = capsys.readouterr()
        assert captured.out == "cleared qmpballoon/trial/vms\n"
        assert f"the broker did not clear {len(TRIAL) - 1} topics of trial" in captured.err
        left = await retained(broker, username="root", password="b")
    assert left.keys() == TRIAL.keys() - {"qmpballoon/trial/vms"}


async def test_thousands_of_topics_are_cleared(mosquitto: LabBroker, listener: Listener) -> None:
    many = {f"qmpballoon/trial/vm/v{number}/state": b"x" * 500 for number in range(1500)}
    async with asyncio.TaskGroup() as sends:
        sends.create_task(publish(listener, many))
    assert await forget("trial", "--broker", mosquitto.url) == 0
    assert await retained(mosquitto) == {}


async def test_a_client_tries_brokers_in_turn_and_reports_a_loss(mosquitto: LabBroker) -> None:
    async with Client(["mqtt://127.0.0.1:1", mosquitto.url]) as client:
        assert await client.retained("#") == {}
        await mosquitto.close()
        with pytest.raises(ConnectionLost):
            await client.retained("#")
    with pytest.raises(Unreachable, match=r"cannot reach the broker mqtt://127\.0\.0\.1:1: "):
        async with Client(["mqtt://127.0.0.1:1", mosquitto.url]):
            pass
