"""The client for programs, with a real broker, agent and guest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from agent_process import MOVED_S, PATIENCE_S, StartAgent
from mqtt_listener import listening, running, settings_for

from qmpballoon import client as client_module
from qmpballoon.client import Client
from qmpballoon.errors import (
    ConnectionLost,
    NoAnswer,
    NotReached,
    OutOfRange,
    QmpBalloonError,
    RequestRefused,
    Unreachable,
)
from qmpballoon.fleet import FleetVm
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import LabGuest
from qmpballoon.mqtt import link as link_module
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.protocol.requests import Request
from qmpballoon.units import MIB

StartGuest = Callable[..., Awaitable[LabGuest]]
ACL = Path(__file__).parents[2] / "examples/mosquitto.acl"


@pytest.fixture
async def mosquitto(sockets_dir: Path) -> AsyncIterator[LabBroker]:
    async with LabBroker(sockets_dir) as broker:
        yield broker


async def handle(request: Request) -> object:
    return {"verb": request.verb, "vm": request.vm}


def an_agent(broker: LabBroker, **settings: object) -> Bridge:
    """Return the MQTT side of an agent that answers requests of all VMs."""
    return Bridge(settings_for(broker, **settings), handle, vm_exists=lambda vm: True)


async def until_vm(client: Client, name: str, condition: Callable[[FleetVm], bool]) -> FleetVm:
    async with asyncio.timeout(PATIENCE_S):
        while not (name in client.vms and condition(client.vms[name])):
            await client.changed(PATIENCE_S)
    return client.vms[name]


async def test_a_program_sees_the_fleet_moves_a_balloon_and_is_told(
    broker: LabBroker, start_guest: StartGuest, start_agent: StartAgent
) -> None:
    guest = await start_guest("web1")
    agent = start_agent(broker)
    async with Client(broker.url) as client:
        vm = await until_vm(client, "edge-7/web1", lambda vm: vm.health == "ok")
        assert vm.online
        assert vm.size is not None
        host = client.hosts["edge-7"]
        assert (host.online, host.mode) == (True, "manual")
        events = client.events()
        target = vm.size - 16 * MIB
        result = await client.request("edge-7/web1", "set-target", target=target, wait_s=MOVED_S)
        assert isinstance(result, dict)
        assert result["reached"]
        await guest.monitor.until_actual(target.__eq__, timeout_s=PATIENCE_S, what="the balloon moves")
        await until_vm(client, "edge-7/web1", lambda vm: vm.actual == target)
        async with asyncio.timeout(PATIENCE_S):
            async for event in events:
                if event.event == "decision":
                    break
        assert (event.host, event.vm, event.data["to"]) == ("edge-7", "web1", target)
        await guest.monitor.execute("stop")  # its balloon does not move
        with pytest.raises(NotReached) as late:
            await client.request("edge-7/web1", "set-target", target=vm.size, wait_s=0)
        assert late.value.target == vm.size
        assert late.value.state.size == vm.size
        with pytest.raises(OutOfRange):
            await client.request("edge-7/web1", "set-target", target=2 * vm.size)
        with pytest.raises(RequestRefused, match="no VM 'web2' here") as unknown:
            await client.request("edge-7/web2", "get")
        assert unknown.value.code == "unknown-vm"
        listed = await client.request("edge-7", "list")
        assert isinstance(listed, list)
        assert [row["vm"] for row in listed] == ["web1"]
    async with Client(broker.url) as late_client:
        assert late_client.vms["edge-7/web1"].online
        assert await agent.terminate() == 0
        async with asyncio.timeout(PATIENCE_S):
            while late_client.vms["edge-7/web1"].online:
                await late_client.changed(PATIENCE_S)
        with pytest.raises(NoAnswer, match="no agent of the host edge-7 is connected"):
            await late_client.request("edge-7/web1", "get")


async def test_an_agent_that_stops_meanwhile_answers_that_it_is_offline(mosquitto: LabBroker) -> None:
    asked = asyncio.Event()

    async def waits(request: Request) -> object:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    bridge = Bridge(settings_for(mosquitto), waits, vm_exists=lambda vm: True)
    async with Client(mosquitto.url) as client:
        async with running(bridge):
            pending = asyncio.create_task(client.request("edge-7/web1", "get"))
            await asked.wait()
        with pytest.raises(Unreachable, match="the agent stops"):
            await pending


@pytest.mark.parametrize("of_client", [(True, False), (False,)])
@pytest.mark.parametrize("of_agent", ["5", "3.1.1"])
async def test_many_requests_at_once_get_their_own_answers_on_both_protocols(
    of_agent: str, of_client: tuple[bool, ...], mosquitto: LabBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "MQTT_5_FIRST", of_client)
    async with (
        running(an_agent(mosquitto, protocol=of_agent)),
        Client(mosquitto.url, fleet=False) as client,
        Client(mosquitto.url, fleet=False) as other,
    ):
        names = [f"edge-7/web{number}" for number in range(100)]
        asked = [each.request(name, "get") for name in names for each in (client, other)]
        answers = await asyncio.gather(*asked)
        assert answers == [{"verb": "get", "vm": f"web{number}"} for number in range(100) for _ in range(2)]


@pytest.mark.parametrize("option", ["max_qos 0", "max_inflight_messages 3", "retain_available false"])
async def test_a_client_keeps_to_what_the_broker_announces(sockets_dir: Path, option: str) -> None:
    async with LabBroker(sockets_dir, options=[option]) as broker:
        bridge = Bridge(settings_for(broker), handle, vm_exists=lambda vm: True)
        async with running(bridge), Client(broker.url, fleet=False) as client:
            asked = [client.request(f"edge-7/web{number}", "get") for number in range(50)]
            assert len(await asyncio.gather(*asked)) == 50


@pytest.mark.parametrize("with_replies", [True, False])
async def test_an_answer_arrives_whether_or_not_the_broker_allows_a_topic_of_our_own(
    with_replies: bool, sockets_dir: Path
) -> None:
    passwords = {"qmpballoon-edge-7": "a", "orchestrator": "b", "dashboard": "c"}
    acl = [line for line in ACL.read_text().splitlines() if with_replies or "-replies/" not in line]
    async with LabBroker(sockets_dir, passwords=passwords, acl=acl) as broker:
        login = {"username": "qmpballoon-edge-7", "password": "a"}
        async with running(an_agent(broker, **login)):
            async with Client(broker.url, username="orchestrator", password="b") as client:
                assert client.hosts["edge-7"].online
                assert await client.request("edge-7/web1", "get") == {"verb": "get", "vm": "web1"}
            async with Client(broker.url, username="dashboard", password="c") as client:
                assert client.hosts["edge-7"].online
                with pytest.raises(RequestRefused, match=r"does not let user dashboard write to .*ACL") as no:
                    await client.request("edge-7/web1", "get")
                assert no.value.code == "not-allowed"


async def test_an_answer_comes_back_to_the_topic_below_the_base_if_the_agent_may_not_write_to_ours(
    sockets_dir: Path,
) -> None:
    acl = ["user root", "topic readwrite #", "user agent", "topic readwrite qmpballoon/edge-7/#"]
    async with (
        LabBroker(sockets_dir, passwords={"root": "a", "agent": "b"}, acl=acl) as broker,
        running(an_agent(broker, username="agent", password="b")),
        Client(broker.url, username="root", password="a", fleet=False) as client,
    ):
        assert await client.request("edge-7/web1", "get") == {"verb": "get", "vm": "web1"}


async def test_a_request_that_nobody_answers_ends_in_time(mosquitto: LabBroker) -> None:
    async with (
        listening(mosquitto.port, "qmpballoon/#") as listener,
        Client(mosquitto.url, fleet=False, base_topic="qmpballoon") as client,
    ):
        with pytest.raises(NoAnswer, match=r"edge-7/web1: no answer to get within 0\.2 s"):
            await client.request("edge-7/web1", "get", timeout_s=0.2)
        sent = await listener.on("qmpballoon/edge-7/vm/web1/request/get")
        assert json.loads(sent.payload)["transaction"]


async def test_a_broker_that_goes_ends_requests_and_events(mosquitto: LabBroker) -> None:
    async with listening(mosquitto.port, "qmpballoon/#") as listener, Client(mosquitto.url) as client:
        pending = asyncio.create_task(client.request("edge-7/web1", "get"))
        await listener.on("qmpballoon/edge-7/vm/web1/request/get")
        await listener.send("qmpballoon/edge-7/event", {"event": "level", "data": {"to": "low"}})
        events = client.events()
        await listener.send("qmpballoon/edge-7/event", {"event": "level", "data": {"to": "ok"}})
        assert (await anext(events)).event == "level"
        await mosquitto.close()
        with pytest.raises(ConnectionLost, match="the broker: "):
            await pending
        with pytest.raises(ConnectionLost, match="the broker: "):
            await anext(events)
        with pytest.raises(ConnectionLost, match="the broker: "):
            await client.request("edge-7/web1", "get")


async def test_a_thousand_vms_are_known_when_the_client_is_entered(
    mosquitto: LabBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with listening(mosquitto.port, "nothing") as listener:
        for number in range(1000):
            payload = json.dumps({"size": number, "padding": "x" * 500})
            await listener.send(f"qmpballoon/edge-7/vm/v{number}/state", payload, retain=True)
    monkeypatch.setattr(client_module, "FLEET_QUIET_S", PATIENCE_S)  # not by waiting
    async with Client(mosquitto.url) as client:
        assert {vm.size for vm in client.vms.values()} == set(range(1000))


@pytest.mark.parametrize("versions", [(True, False), (False,)])
async def test_more_vms_than_the_broker_queues_for_a_client_are_read_host_by_host(
    sockets_dir: Path, versions: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "MQTT_5_FIRST", versions)
    options = ["max_queued_messages 50", "max_inflight_messages 5"]
    async with LabBroker(sockets_dir, options=options) as broker:
        async with listening(broker.port, "nothing") as listener:
            for host in range(10):
                root = f"qmpballoon/edge-{host}"
                await listener.send(f"{root}/status", b"online", retain=True)
                await listener.send(f"{root}/host", {"vms": {"total": 20}}, retain=True)
                for number in range(20):
                    await listener.send(f"{root}/vm/v{number}/availability", b"online", retain=True)
                    await listener.send(f"{root}/vm/v{number}/state", {"size": number}, retain=True)
        async with Client(broker.url, timeout_s=PATIENCE_S) as client:
            known = {vm.id: (vm.online, vm.size) for vm in client.vms.values()}
        assert known == {
            f"edge-{host}/v{number}": (True, number) for host in range(10) for number in range(20)
        }


@pytest.mark.parametrize("target", ["", "/web1", "edge-7/", "a/b/c"])
async def test_what_is_no_target_is_refused(mosquitto: LabBroker, target: str) -> None:
    async with Client(mosquitto.url, fleet=False) as client:
        with pytest.raises(QmpBalloonError, match="neither HOST nor HOST/VM"):
            await client.request(target, "get")
