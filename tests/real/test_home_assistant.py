"""What Home Assistant finds on a real broker: devices that come, change, move to another name and go."""

from __future__ import annotations

import json
from typing import Any

from agent_process import AgentWatch, StartAgent, until

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB

HOST_DEVICE = "qmpballoon_edge-7"
WEB_DEVICE = f"{HOST_DEVICE}_web"


def announced(watch: AgentWatch, device: str, prefix: str = "homeassistant", start: int = 0) -> list[bytes]:
    """Return all messages that announced a device, from the ``start``-th message on."""
    topic = f"{prefix}/device/{device}/config"
    return [one.payload for one in watch.listener.messages[start:] if one.topic.value == topic]


async def announcement(watch: AgentWatch, device: str, prefix: str = "homeassistant", start: int = 0) -> Any:
    """Wait until a device is announced, and return its newest message."""
    found = await until(lambda: announced(watch, device, prefix, start), what=f"{device} is announced")
    return json.loads(found[-1])


async def until_removed(watch: AgentWatch, device: str, start: int = 0) -> None:
    await until(lambda: announced(watch, device, start=start)[-1:] == [b""], what=f"{device} is removed")


async def test_a_vm_is_announced_moved_by_its_slider_and_announced_again_with_new_limits(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("web")
    start_agent(broker)
    await watch.until_all_ok("web")
    host = await announcement(watch, HOST_DEVICE)
    vm = await announcement(watch, WEB_DEVICE)
    assert vm["device"]["via_device"] in host["device"]["identifiers"]
    target = vm["components"]["target"]
    assert (target["min"], target["max"]) == (32, 128)
    for topic in (vm["state_topic"], *(one["topic"] for one in vm["availability"])):
        assert any(one.topic.value == topic and one.retain for one in watch.listener.messages), topic

    payload = target["command_template"].replace("{{ value }}", "112.0")
    await watch.listener.send(target["command_topic"], payload)
    await guest.monitor.until_actual((112 * MIB).__eq__, timeout_s=60, what="the slider moves the balloon")
    await watch.until_state("web", lambda state: state["target"] == 112 * MIB, what="its target")

    start = watch.now
    await watch.do("web", "set-limits", floor="96MiB")
    again = await announcement(watch, WEB_DEVICE, start=start)
    assert (again["components"]["target"]["min"], again["components"]["target"]["max"]) == (96, 128)
    assert len(announced(watch, WEB_DEVICE, start=start)) == 1


async def test_the_selects_of_vm_and_host_are_obeyed(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    await lab.empty_qemu("web")
    start_agent(broker)
    for device, key, word, topic in (
        (WEB_DEVICE, "mode", "observe", "vm/web/state"),
        (HOST_DEVICE, "policy", "mom", "host"),
        (HOST_DEVICE, "mode", "observe", "host"),
    ):
        select = (await announcement(watch, device))["components"][key]
        payload = select.get("command_template", "{{ value }}").replace("{{ value }}", word)
        await watch.listener.send(select["command_topic"], payload)
        await until(
            lambda topic=topic, key=key, word=word: (watch.last_json(topic) or {}).get(key) == word,  # type: ignore[misc]
            what=f"{key} of {topic} is {word}",
        )
    assert (watch.last_json("host") or {})["policy"] == "mom"


async def test_a_device_moves_with_its_name_and_goes_with_its_vm(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    qemu = await lab.empty_qemu("web")
    agent = start_agent(broker)
    await announcement(watch, WEB_DEVICE)
    sockets = {"sockets": [f"{lab.directory}/*.qmp"], "forget_after_s": 1}
    agent.configure(
        vm={"match": [{"socket": f"{lab.directory}/web.qmp", "rename": "fr\u00f6nt"}]}, discovery=sockets
    )
    agent.reload()
    renamed = await announcement(watch, f"{HOST_DEVICE}_fr_nt")
    assert renamed["device"]["name"] == "fr\u00f6nt"
    await until_removed(watch, WEB_DEVICE)
    await qemu.close()
    await until_removed(watch, f"{HOST_DEVICE}_fr_nt")
    assert announced(watch, HOST_DEVICE)[-1]


async def test_devices_are_taken_back_after_a_crash_when_they_are_no_longer_wanted(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    await lab.empty_qemu("web")
    agent = start_agent(broker)
    await announcement(watch, WEB_DEVICE)
    await watch.until_last("status", b"online")
    agent.kill()
    start = await watch.until_offline()
    agent.configure(mqtt={"discovery_prefix": "site/ha", "min_interval_s": 0.05})
    agent.start()
    for device in (HOST_DEVICE, WEB_DEVICE):
        await announcement(watch, device, "site/ha", start)
        await until_removed(watch, device, start)

    agent.kill()
    start = await watch.until_offline()
    agent.configure(mqtt={"home_assistant": False})
    agent.start()
    for device in (HOST_DEVICE, WEB_DEVICE):
        await until(
            lambda device=device: announced(watch, device, "site/ha", start)[-1:] == [b""],  # type: ignore[misc]
            what=f"{device} is taken back",
        )


async def test_all_is_announced_again_when_home_assistant_says_that_it_is_there(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    await lab.empty_qemu("web")
    start_agent(broker, mqtt={"discovery_prefix": "site/ha"})
    await announcement(watch, WEB_DEVICE, "site/ha")
    await watch.until_last("status", b"online")
    start = await watch.listener.wait_for_pending()
    await watch.listener.send("site/ha/status", b"online")
    for device in (HOST_DEVICE, WEB_DEVICE):
        await announcement(watch, device, "site/ha", start)
    await watch.until_published("vm/web/availability", b"online", start=start)
    await watch.until_published("status", b"online", start=start)
