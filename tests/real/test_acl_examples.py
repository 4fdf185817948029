"""The ACLs in ``examples``: what each role may do, and that what they forbid is refused and reported."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mqtt_listener import WAIT_S, listening, running, settings_for

from qmpballoon.cli import main
from qmpballoon.client import Client
from qmpballoon.errors import NoAnswer, RequestRefused, Unreachable
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.waiting import eventually
from qmpballoon.model.records import rfc3339
from qmpballoon.mqtt import link as link_module
from qmpballoon.mqtt import own_status
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.protocol.requests import Request

EXAMPLES = Path(__file__).parents[2] / "examples"
PASSWORD = "sesame"
ROLES = {  # by file: the user names of an agent, of who sends requests, and of who reads
    "mosquitto.acl": ("qmpballoon-edge-7", "orchestrator", "dashboard"),
    "mosquitto-fleet.acl": ("edge-7", "operator", "dashboard"),
}
STATE = "qmpballoon/edge-7/vm/web1/state"
OF_ANOTHER = "qmpballoon/edge-8/vm/db1/state"


class Guarded:
    """A broker with one of the ACLs, and the users of the three roles."""

    def __init__(self, broker: LabBroker, file: str) -> None:
        self.broker = broker
        self.agent, self.operator, self.dashboard = ROLES[file]

    def client(self, user: str, *, fleet: bool = True) -> Client:
        return Client(self.broker.url, username=user, password=PASSWORD, timeout_s=WAIT_S, fleet=fleet)

    def bridge(self, user: str, host: str = "edge-7", *, protocol: str = "auto") -> Bridge:
        """Return the MQTT side of an agent with a VM."""
        settings = settings_for(
            self.broker, username=user, password=PASSWORD, host=host, client_id=host, protocol=protocol
        )
        bridge = Bridge(settings, handle, vm_exists=lambda vm: vm == "web1")
        now = rfc3339(datetime.now(UTC))
        bridge.retain(bridge.topics.host_object, lambda: {"ts": now, "heartbeat_s": 60})
        bridge.retain(bridge.topics.availability("web1"), lambda: "online")
        bridge.retain(bridge.topics.state("web1"), lambda: {"size": 1024})
        return bridge

    def running(self, **options: str) -> AbstractAsyncContextManager[object]:
        return running(self.bridge(self.agent, **options))


@pytest.fixture(params=ROLES)
async def guarded(sockets_dir: Path, request: pytest.FixtureRequest) -> AsyncIterator[Guarded]:
    lines = (EXAMPLES / request.param).read_text(encoding="utf-8").splitlines()
    users = [*ROLES[request.param], "edge-8", "administrator"]
    async with LabBroker(sockets_dir, passwords=dict.fromkeys(users, PASSWORD), acl=lines) as broker:
        yield Guarded(broker, request.param)


async def handle(request: Request) -> object:
    return {"verb": request.verb, "vm": request.vm}


async def test_a_client_without_a_password_is_refused(guarded: Guarded) -> None:
    with pytest.raises(Unreachable, match=r"[Nn]ot authori[sz]ed"):
        async with Client(guarded.broker.url):
            pass


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_an_operator_reads_and_asks_and_can_change_no_state(guarded: Guarded, protocol: str) -> None:
    async with guarded.running(protocol=protocol), guarded.client(guarded.operator) as client:
        assert client.vms["edge-7/web1"].size == 1024
        assert await client.request("edge-7/web1", "get") == {"verb": "get", "vm": "web1"}
        assert await client.request("edge-7", "list") == {"verb": "list", "vm": None}
        assert await client.clear([STATE]) == {STATE: "not authorized"}
    async with guarded.client(guarded.operator) as late:
        assert late.vms["edge-7/web1"].size == 1024


async def test_a_dashboard_reads_and_asks_nothing(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    async with guarded.running():
        async with guarded.client(guarded.dashboard) as client:
            assert client.vms["edge-7/web1"].size == 1024
            with pytest.raises(
                RequestRefused, match=r"does not let user dashboard write to .*: check its ACL"
            ):
                await client.request("edge-7/web1", "set-target", target="1MiB")
            assert await client.clear([STATE]) == {STATE: "not authorized"}
        monkeypatch.setattr(
            link_module, "MQTT_5_FIRST", (False,)
        )  # over 3.1.1 no broker says that it refuses
        async with guarded.client(guarded.dashboard) as client:
            with pytest.raises(NoAnswer):
                await client.request("edge-7/web1", "get", timeout_s=0.3)


async def test_ctl_and_forget_say_that_the_acl_forbids_it(
    guarded: Guarded, sockets_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    password = sockets_dir / "password"
    password.write_text(PASSWORD)
    login = ["--broker", guarded.broker.url, "--password-file", str(password), "--username"]
    async with guarded.running():
        code = await asyncio.to_thread(main, ["ctl", "edge-7/web1", "get", *login, guarded.dashboard])
        assert code == 1
        assert "edge-7/web1: not-allowed: the broker does not let user dashboard" in capsys.readouterr().err
        assert await asyncio.to_thread(main, ["ctl", "edge-7/web1", "get", *login, guarded.operator]) == 0
    assert await asyncio.to_thread(main, ["forget", "edge-7", *login, guarded.operator]) == 1
    assert "not authorized" in capsys.readouterr().err


async def test_an_agent_reads_and_writes_nothing_of_another_host(
    guarded: Guarded, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_status, "ECHO_TIMEOUT_S", 0.2)
    caplog.set_level(logging.INFO, "qmpballoon")

    async def errors() -> list[str]:
        return [line for line in caplog.messages if line.startswith("broker-acl")]

    async with running(guarded.bridge(guarded.agent, "edge-8")):
        (line,) = await eventually(errors, bool, timeout_s=WAIT_S, what="the error that names the ACL")
    assert f"user {guarded.agent}" in line
    assert "qmpballoon/edge-8/" in line
    async with guarded.running(), guarded.client(guarded.operator) as operator:
        assert set(operator.hosts) == {"edge-7"}
        async with guarded.client(guarded.agent) as client:
            assert await client.clear([OF_ANOTHER]) == {OF_ANOTHER: "not authorized"}
            with pytest.raises(RequestRefused, match="does not let user"):
                await client.request("edge-8/db1", "get")


async def test_a_pattern_admits_each_agent_to_its_own_topics(sockets_dir: Path) -> None:
    lines = (EXAMPLES / "mosquitto-fleet.acl").read_text(encoding="utf-8").splitlines()
    users = ["edge-7", "edge-8", "operator", "administrator"]
    async with LabBroker(sockets_dir, passwords=dict.fromkeys(users, PASSWORD), acl=lines) as broker:
        guarded = Guarded(broker, "mosquitto-fleet.acl")
        async with running(guarded.bridge("edge-8", "edge-8")), guarded.running():
            async with guarded.client("operator") as client:
                assert set(client.vms) == {"edge-7/web1", "edge-8/web1"}
                assert await client.request("edge-8/web1", "get") == {"verb": "get", "vm": "web1"}
            async with guarded.client("edge-7") as client:
                assert set(client.vms) == {"edge-7/web1"}
        async with guarded.client("administrator") as client:
            assert await client.clear([STATE]) == {}
        async with listening(broker.port, "#", username="administrator", password=PASSWORD) as listener:
            await listener.on("qmpballoon/edge-8/vm/web1/state")
            await listener.client.publish("qmpballoon/end", b"x", qos=1)
            await listener.on("qmpballoon/end")
            assert STATE not in {message.topic.value for message in listener.messages}
