"""Home Assistant itself: its schemas judge the messages, then it runs with a real broker, guest and agent."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from agent_process import AgentProcess, StartAgent
from running_home_assistant import PATIENCE_S, WITHOUT_DEBUG, Browser, RunningHomeAssistant

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.waiting import eventually
from qmpballoon.model.names import VmId
from qmpballoon.model.records import Limits, VmStatus
from qmpballoon.mqtt.home_assistant import HomeAssistant
from qmpballoon.mqtt.topics import Topics
from qmpballoon.protocol.objects import Agent
from qmpballoon.units import MIB

PYTHON: Final = os.environ.get("QMPBALLOON_HOME_ASSISTANT", "")
PICTURES: Final = os.environ.get("QMPBALLOON_PICTURES", "")  # where the picture is kept
JUDGE: Final = Path(__file__).with_name("judge.py")

AVAILABLE_WITHIN_S: Final = 10.0
RETRIES_EVERY_S: Final = 10.0  # Home Assistant, to reach a broker that it has lost
_SLACK_S: Final = 5.0  # a loaded machine

OF_VM: Final = {
    "number": ["target"],
    "select": ["mode"],
    "binary_sensor": ["problem"],
    "sensor": ["actual", "balloon", "guest_available", "held", "rss", "health", "why"],
}
OF_HOST: Final = {
    "select": ["mode", "policy"],
    "binary_sensor": ["problem"],
    "sensor": [
        "level",
        "budget",
        "used",
        "budget_used_percent",
        "mem_available",
        "reclaimable",
        "room",
        "psi_some_avg10",
        "vms_total",
        "vms_online",
    ],
}


def entity_ids(start: str, wanted: dict[str, list[str]]) -> set[str]:
    return {f"{platform}.{start}_{key}" for platform, keys in wanted.items() for key in keys}


WEB: Final = entity_ids("edge_7_web", OF_VM)
HOST: Final = entity_ids("edge_7", OF_HOST)


@dataclass
class House:
    """All that runs in one test."""

    ha: RunningHomeAssistant
    broker: LabBroker
    guest: LabGuest
    agent: AgentProcess

    async def ours(self) -> dict[str, str]:
        """Return the states of our entities."""
        return {name: one["state"] for name, one in (await self.ha.states()).items() if ".edge_7_" in name}

    async def until_available(self, what: str, *, timeout_s: float = AVAILABLE_WITHIN_S + _SLACK_S) -> None:
        """Wait until all entities are there and available."""
        began_s = asyncio.get_running_loop().time()
        await eventually(
            self.ours,
            lambda states: states.keys() >= WEB | HOST and "unavailable" not in states.values(),
            timeout_s=timeout_s,
            what=f"all is available after {what}",
            interval_s=0.05,
        )
        print(f"available {asyncio.get_running_loop().time() - began_s:.2f} s after {what}")

    async def until_unavailable(self) -> None:
        """Wait until no entity is available."""
        await eventually(
            self.ours,
            lambda states: set(states.values()) == {"unavailable"},
            timeout_s=PATIENCE_S,
            what="nothing is available",
            interval_s=0.05,
        )


@pytest.fixture
async def house(lab: Lab, broker: LabBroker, start_agent: StartAgent) -> AsyncIterator[House]:
    guest = await lab.guest("web", memory=192 * MIB)
    agent = start_agent(broker, policy={"mode": "auto"}, discovery=_forgets(lab))
    async with RunningHomeAssistant(PYTHON, lab.directory) as ha:
        await ha.connect(broker.port)
        house = House(ha, broker, guest, agent)
        await house.until_available("the first start", timeout_s=PATIENCE_S)
        yield house


def _forgets(lab: Lab) -> dict[str, Any]:
    return {"sockets": [f"{lab.directory}/*.qmp"], "forget_after_s": 1}


def test_its_own_schemas_accept_every_message(sockets_dir: Path) -> None:
    topics = Topics("qmpballoon", "edge-7")
    maker = HomeAssistant(topics, Agent("edge-7", "Edge 7", "0.1.0", "f00", 60.0))
    vm = VmStatus(VmId("web"), "web", "/run/web.qmp", "ok")
    messages = [(topics.device(None), maker.host_message())]
    for name, qemu, floor, ceiling in (
        ("web", None, None, None),
        ("web", "7.2.22", 48 * MIB, 192 * MIB),
        ("{{ 1/0 }}\x1b[31m", "7.2.22", 48 * MIB + 4096, 192 * MIB - 4096),
        ("B\u00fcro \U0001f5a5", "10.0.2 (Debian)", 64 * MIB, 64 * MIB),
    ):
        record = dataclasses.replace(vm, name=name, qemu=qemu, limits=Limits(floor, ceiling, 1000))
        messages.append((topics.device("web"), maker.vm_message(record)))
    assert _judged(messages, sockets_dir) == ""


def test_its_schemas_are_asked(sockets_dir: Path) -> None:
    wrong = json.dumps(
        {
            "device": {"identifiers": ["x"]},
            "origin": {"name": "x"},
            "components": {
                "a": {"platform": "sensor", "unique_id": "a", "state_topic": "x", "objct_id": "a"},
                "b": {"platform": "number", "unique_id": "b", "command_topic": "x", "min": 2, "max": 1},
            },
        }
    )
    found = _judged(
        [("homeassistant/device/x/config", wrong), ("homeassistant/x y/config", "{}")], sockets_dir
    )
    assert [line.rpartition("config: ")[2].partition(":")[0] for line in found.splitlines()] == [
        "a",
        "b",
        "the topic announces no device",
    ]


def _judged(messages: list[tuple[str, str]], directory: Path) -> str:
    """Return the complaints of Home Assistant's schemas. Its Python sees /tmp alone."""
    shutil.copy(JUDGE, directory)
    lines = "".join(json.dumps(message) + "\n" for message in messages)
    done = subprocess.run(
        [*WITHOUT_DEBUG, PYTHON, str(directory / JUDGE.name)],
        input=lines,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert not done.stderr, done.stderr
    return done.stdout.strip()


async def test_the_entities_are_there_and_move_a_real_balloon(house: House) -> None:
    ha = house.ha
    assert set(await house.ours()) == WEB | HOST
    assert await ha.rendered("{{ device_attr('sensor.edge_7_web_actual', 'name') }}") == "web"
    parent = "device_attr('sensor.edge_7_web_actual', 'via_device_id') == device_id('sensor.edge_7_level')"
    assert await ha.rendered(f"{{{{ {parent} }}}}") == "True"
    states = await ha.states()
    target = states["number.edge_7_web_target"]["attributes"]
    assert (target["min"], target["max"], target["unit_of_measurement"]) == (48, 192, "MiB")
    assert states["sensor.edge_7_web_actual"]["attributes"]["device_class"] == "data_size"
    assert "uncooperative" in states["sensor.edge_7_web_health"]["attributes"]["options"]
    await ha.until_state("sensor.edge_7_web_health", "ok")
    await ha.until_state("binary_sensor.edge_7_web_problem", "off")

    await ha.act("number.set_value", "number.edge_7_web_target", value=160)
    await house.guest.monitor.until_actual((160 * MIB).__eq__, timeout_s=PATIENCE_S, what="the slider")
    await ha.until_state("sensor.edge_7_web_actual", "160.0")
    await ha.until_state("number.edge_7_web_target", "160.0")
    await ha.until_state("select.edge_7_web_mode", "manual")
    await ha.until_state("sensor.edge_7_web_why", "manual")
    await _take_picture(house)

    await ha.act("select.select_option", "select.edge_7_web_mode", option="auto")
    await ha.until_state("select.edge_7_web_mode", "auto")
    await ha.act("select.select_option", "select.edge_7_policy", option="fixed")
    await ha.until_state("select.edge_7_policy", "fixed")
    await ha.act("select.select_option", "select.edge_7_mode", option="observe")
    await ha.until_state("select.edge_7_mode", "observe")
    await ha.until_state("select.edge_7_policy", "fixed")
    assert ha.complaints() == []


async def test_all_is_available_again_after_a_restart_of_each(house: House) -> None:
    house.agent.kill()
    await house.until_unavailable()
    house.agent.start()
    await house.until_available("a start of the agent that was killed")
    await house.agent.terminate()
    await house.until_unavailable()
    house.agent.start()
    await house.until_available("a start of the agent")

    await house.broker.kill()  # it keeps nothing
    await house.until_unavailable()
    await house.broker.start()
    await house.until_available(
        "a start of the broker", timeout_s=RETRIES_EVERY_S + AVAILABLE_WITHIN_S + _SLACK_S
    )

    await house.ha.stop()
    await house.ha.start()
    await house.until_available("a start of Home Assistant")

    await house.ha.stop()
    await house.agent.terminate()
    await house.ha.start()
    await house.until_unavailable()
    house.agent.start()
    await house.until_available("a start of the agent that was down with Home Assistant")

    await house.ha.stop()
    house.agent.kill()
    await house.broker.restart()
    await house.ha.start()
    house.agent.start()
    await house.until_available("a start of all three")


async def test_limits_names_and_removal_are_followed(house: House, lab: Lab) -> None:
    ha, agent = house.ha, house.agent
    match = {"socket": f"{lab.directory}/web.qmp"}
    agent.configure(discovery=_forgets(lab), vm={"match": [{**match, "floor": "192MiB"}]})
    agent.reload()
    await _until_there(house, "number.edge_7_web_target", False)  # it leaves no choice
    agent.configure(discovery=_forgets(lab), vm={"match": [{**match, "floor": "100MiB"}]})
    agent.reload()
    await _until_there(house, "number.edge_7_web_target", True)
    assert (await ha.states())["number.edge_7_web_target"]["attributes"]["min"] == 100

    agent.configure(discovery=_forgets(lab), vm={"match": [{**match, "rename": "shop"}]})
    agent.reload()
    await _until_there(house, "sensor.edge_7_shop_actual", True)
    await _until_there(house, "sensor.edge_7_web_actual", False)
    await house.guest.close()
    await _until_there(house, "sensor.edge_7_shop_actual", False)
    assert set(await house.ours()) == HOST
    assert ha.complaints() == []


async def _until_there(house: House, entity: str, wanted: bool) -> None:
    async def ask() -> bool:
        return entity in await house.ha.states()

    await eventually(ask, wanted.__eq__, timeout_s=PATIENCE_S, what=f"{entity}: {wanted}", interval_s=0.1)


async def _take_picture(house: House) -> None:
    """Take a picture of the VM's page, when it shows the figures."""
    device = await house.ha.rendered("{{ device_id('sensor.edge_7_web_actual') }}")
    async with Browser(house.ha.log.parent, width=1400, height=1290) as browser:
        await browser.open(f"{house.ha.url}/manifest.json")
        await browser.run("localStorage.setItem('hassTokens', arguments[0])", json.dumps(house.ha.tokens))
        await browser.open(f"{house.ha.url}/config/devices/device/{device}")

        hits = 0

        async def shown() -> str:
            nonlocal hits
            text = str(await browser.run(_TEXT_OF_PAGE))
            hits += "Guest available" in text and "160 MiB" in text
            return text

        await eventually(
            shown,
            lambda _: hits >= 2,  # the icons come within the interval after the text
            timeout_s=PATIENCE_S,
            what="the page of the device",
            interval_s=3.0,
        )
        picture = await browser.picture()
        directory = Path(PICTURES) if PICTURES else house.ha.log.parent
        (directory / "home-assistant.png").write_bytes(picture)
        assert picture.startswith(b"\x89PNG")


_TEXT_OF_PAGE: Final = """
const text = (node) => [...node.childNodes].map((child) => child.nodeType === Node.TEXT_NODE
  ? child.textContent
  : text(child) + (child.shadowRoot ? text(child.shadowRoot) : "")).join(" ");
return text(document.body).replace(/\\s+/g, " ");
"""
