"""``ctl`` over a real broker: answers, exit codes, globs, and what is not there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from agent_process import MOVED_S, PATIENCE_S, StartAgent
from mqtt_listener import listening, running, settings_for

from qmpballoon.cli import main
from qmpballoon.client import Client
from qmpballoon.errors import OutOfRange, RequestRefused
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import LabGuest
from qmpballoon.model.records import rfc3339
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.protocol.requests import Handle, Request
from qmpballoon.protocol.verbs import Room
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]
StartGuest = Callable[..., Awaitable[LabGuest]]


@pytest.fixture
async def mosquitto(sockets_dir: Path) -> AsyncIterator[LabBroker]:
    async with LabBroker(sockets_dir) as broker:
        yield broker


async def ctl(broker: LabBroker, *typed: str) -> int:
    return await asyncio.to_thread(main, ["ctl", *typed, "--broker", broker.url])


async def handle(request: Request) -> object:
    """Answer as an agent would, by the VM's name."""
    match request.vm:
        case "late":
            raise RequestRefused("not-reached", "it is on its way")
        case "small":
            raise OutOfRange("below its floor")
    return {"vm": request.vm, "target": 64 * MIB}


async def handle_room(host: str, request: Request) -> object:
    """Answer ``room`` as hosts with other figures would."""
    assert isinstance(request.asked, Room)
    room, size = {"a": 100 * MIB, "b": 3000 * MIB, "c": 2048 * MIB}[host], request.asked.size.of(None)
    return {"room": room, "fits": size <= room, "headroom": room - size}


class Hosts:
    """The MQTT sides of agents with VMs, which answer at once."""

    def __init__(self, broker: LabBroker, stack: AsyncExitStack) -> None:
        self._broker = broker
        self._stack = stack

    async def start(self, host: str, *vms: str, answer: Handle = handle) -> None:
        settings = settings_for(self._broker, host=host, client_id=f"agent-{host}")
        bridge = Bridge(settings, answer, vm_exists=lambda vm: vm in vms)
        now = rfc3339(datetime.now(UTC))
        bridge.retain(bridge.topics.host_object, lambda: {"ts": now, "heartbeat_s": 60})
        for vm in vms:
            bridge.retain(bridge.topics.availability(vm), lambda: "online")
        await self._stack.enter_async_context(running(bridge))


@pytest.fixture
async def hosts(mosquitto: LabBroker) -> AsyncIterator[Hosts]:
    async with AsyncExitStack() as stack:
        yield Hosts(mosquitto, stack)


async def test_a_target_moves_a_real_balloon(
    broker: LabBroker, start_guest: StartGuest, start_agent: StartAgent, capsys: Capture
) -> None:
    guest = await start_guest("web1")
    agent = start_agent(broker)
    await agent.until_logged("broker-connected")
    async with Client(broker.url) as client:
        async with asyncio.timeout(PATIENCE_S):
            while "edge-7/web1" not in client.vms or client.vms["edge-7/web1"].health != "ok":
                await client.changed(PATIENCE_S)
        size = client.vms["edge-7/web1"].size
    assert size is not None
    target = size - 16 * MIB
    typed = ["set-target", f"target={target}", f"wait_s={MOVED_S}"]
    assert await ctl(broker, "edge-7/web1", *typed) == 0
    await guest.monitor.until_actual(target.__eq__, timeout_s=PATIENCE_S, what="the balloon moves")
    line = capsys.readouterr().out
    assert line.startswith(f"edge-7/web1  target {target // MIB} MiB  actual ")
    assert line.endswith("  reached yes\n")
    assert await ctl(broker, "*/*", "get", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["target"], answer["verb"], answer["status"], answer["error"]) == (
        "edge-7/web1", "get", "ok", None,
    )  # fmt: skip
    assert answer["result"]["actual"] == target
    assert await ctl(broker, "edge-7", "list") == 0
    assert "vm web1  name web1  health ok  mode manual" in capsys.readouterr().out
    await guest.monitor.execute("stop")  # its balloon does not move
    assert await ctl(broker, "edge-7/web1", "set-target", "100%", "wait_s=0") == 4
    assert capsys.readouterr().err.startswith("qmpballoon: edge-7/web1: not-reached: ")
    assert await ctl(broker, "edge-7/web9", "get") == 3
    assert "edge-7/web9: unknown-vm: no VM 'web9' here" in capsys.readouterr().err


async def test_a_glob_asks_each_and_the_exit_code_is_that_of_the_worst(
    mosquitto: LabBroker, hosts: Hosts, capsys: Capture
) -> None:
    await hosts.start("a", "one", "small", "late")
    await hosts.start("b", "one", "two")
    assert await ctl(mosquitto, "a/*", "get") == 4
    captured = capsys.readouterr()
    assert captured.out == "a/one    vm one  target 64 MiB\n"
    assert sorted(captured.err.splitlines()) == [
        "qmpballoon: a/late: not-reached: it is on its way",
        "qmpballoon: a/small: out-of-range: below its floor",
    ]
    assert await ctl(mosquitto, "*/one", "get") == 0
    assert sorted(line.split()[0] for line in capsys.readouterr().out.splitlines()) == ["a/one", "b/one"]
    assert await ctl(mosquitto, "a/[os]*", "get") == 2
    capsys.readouterr()
    assert await ctl(mosquitto, "*", "list", "--json") == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(answer["target"] for answer in answers) == ["a", "b"]
    assert await ctl(mosquitto, "*/nobody*", "get") == 3
    assert capsys.readouterr().err == "qmpballoon: no VM 'nobody*' on a, b\n"


async def test_the_host_with_the_most_room_is_first(
    mosquitto: LabBroker, hosts: Hosts, capsys: Capture
) -> None:
    for host in "abc":
        await hosts.start(host, answer=partial(handle_room, host))
    assert await ctl(mosquitto, "*", "room", "size=2GiB") == 0
    assert capsys.readouterr().out.splitlines() == [
        "b  room 2.93 GiB  fits yes  headroom 952 MiB",
        "c  room 2 GiB  fits yes  headroom 0 B",
        "a  room 100 MiB  fits no  headroom -1.90 GiB",
    ]
    assert await ctl(mosquitto, "*", "room", "2GiB", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["target"] for line in lines] == ["b", "c", "a"]


async def test_a_host_that_is_offline_is_named_and_the_others_are_asked(
    mosquitto: LabBroker, hosts: Hosts, capsys: Capture
) -> None:
    await hosts.start("a", "one")
    async with listening(mosquitto.port, "nothing") as listener:
        await listener.send("qmpballoon/gone/status", b"offline", retain=True)
        await listener.send("qmpballoon/gone/vm/x/availability", b"online", retain=True)
        then = {"ts": "2026-01-01T00:00:00.000Z", "heartbeat_s": 60}
        await listener.send("qmpballoon/silent/status", b"online", retain=True)
        await listener.send("qmpballoon/silent/host", then, retain=True)
    assert await ctl(mosquitto, "*/*", "get") == 3
    captured = capsys.readouterr()
    assert captured.out == "a/one  vm one  target 64 MiB\n"
    assert captured.err.splitlines() == [
        "qmpballoon: gone: offline: its agent is not connected to the broker",
        "qmpballoon: silent: offline: its agent is not connected to the broker",
    ]
    assert await ctl(mosquitto, "gone/*", "get") == 3
    assert await ctl(mosquitto, "gone/x", "get", "--json") == 3
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["status"], answer["error"]["code"]) == ("error", "offline")
    assert await ctl(mosquitto, "xyz/*", "get") == 3
    assert capsys.readouterr().err.endswith(
        "no host 'xyz' is known to the broker; hosts are a, gone, silent\n"
    )
    assert await ctl(mosquitto, "silen/*", "get") == 3
    assert capsys.readouterr().err.endswith("did you mean silent?\n")


async def test_nothing_that_answers_is_exit_3(mosquitto: LabBroker, capsys: Capture) -> None:
    assert await ctl(mosquitto, "edge-7/web1", "get") == 3
    assert capsys.readouterr().err == (
        "qmpballoon: edge-7/web1: offline: no agent of the host edge-7 is connected to the broker\n"
    )
    assert await ctl(mosquitto, "*", "list") == 3
    assert capsys.readouterr().err == "qmpballoon: no host '*' is known to the broker; it knows none\n"
    async with listening(mosquitto.port, "qmpballoon/#"):
        assert await ctl(mosquitto, "edge-7/web1", "get", "--timeout", "0.2") == 3
    assert "offline: no answer to get within 0.2 s" in capsys.readouterr().err


async def test_a_broker_that_goes_is_exit_3(mosquitto: LabBroker, capsys: Capture) -> None:
    async with listening(mosquitto.port, "qmpballoon/#") as listener:
        asked = asyncio.create_task(ctl(mosquitto, "edge-7/web1", "get"))
        await listener.on("qmpballoon/edge-7/vm/web1/request/get")
        await mosquitto.close()
        assert await asked == 3
    assert capsys.readouterr().err.startswith("qmpballoon: the broker: ")
    assert await ctl(mosquitto, "edge-7/web1", "get") == 3
    assert "cannot reach the broker" in capsys.readouterr().err


async def test_text_of_a_vm_reaches_no_terminal_unclean(mosquitto: LabBroker, capsys: Capture) -> None:
    async def hostile(request: Request) -> object:
        return {"name": "a\x1b[2Jb\nc"}

    bridge = Bridge(settings_for(mosquitto), hostile, vm_exists=lambda vm: True)
    async with running(bridge):
        assert await ctl(mosquitto, "edge-7/web1", "get") == 0
    assert capsys.readouterr().out == "edge-7/web1  name a?[2Jb?c\n"
