"""Names of VMs: renamed, duplicate, forgotten, and retained messages of earlier runs."""

from __future__ import annotations

import asyncio

from agent_process import PATIENCE_S, AgentWatch, StartAgent, until, watching
from mqtt_listener import listening

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB


async def test_a_vm_has_its_configured_name_and_a_rename_leaves_nothing_behind(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest, twin, third = await asyncio.gather(
        lab.guest("web"), lab.guest("web-b", qemu_name="web"), lab.guest("nameless", qemu_name=None)
    )
    agent = start_agent(
        broker, vm={"match": [{"socket": f"{lab.directory}/nameless.qmp", "rename": "Büro 1"}]}
    )
    await watch.until_all_ok("web", "web-2", "B_ro_1")
    assert {watch.state(vm)["pid"] for vm in ("web", "web-2")} == {guest.pid, twin.pid}
    assert (watch.state("B_ro_1")["name"], watch.state("B_ro_1")["pid"]) == ("Büro 1", third.pid)
    socket = watch.state("web")["socket"]
    await watch.do("web", "set-limits", shares=5)
    mover = guest if socket == "web.qmp" else twin
    await watch.moved("web", mover, 112 * MIB)

    agent.configure(vm={"match": [{"socket": f"{lab.directory}/{socket}", "rename": "front"}]})
    start = watch.now
    agent.reload()
    await watch.until_health("front", "ok")
    await watch.until_health("nameless", "ok")
    for vm in ("web", "B_ro_1"):
        await until(lambda vm=vm: watch.last(f"vm/{vm}/state") == b"", what="cleared")  # type: ignore[misc]
        await until(lambda vm=vm: watch.last(f"vm/{vm}/availability") == b"", what="cleared")  # type: ignore[misc]
    assert watch.state("web-2")["health"] == "ok"  # the other keeps the name that it has
    assert await watch.refused("web", "get") == "unknown-vm"
    for topic in ("vm/web/state", "vm/web/availability"):  # a late state comes before it is cleared
        received = watch.received(topic, start)
        assert not any(received[received.index(b"") :]), received
    assert await mover.monitor.actual() == 112 * MIB
    assert watch.state("front")["overridden"] == []  # limits, mode and target belong to the name
    async with watching(broker) as late:
        await late.until_health("front", "ok")
        await late.until_published("status", b"online")
        await late.listener.wait_for_pending()
        there = {one.topic.value.split("/")[3] for one in late.listener.messages if "/vm/" in one.topic.value}
    assert there == {"front", "web-2", "nameless"}

    pids = {vm: watch.state(vm)["pid"] for vm in there}
    agent.kill()
    start = await watch.until_offline()
    agent.start()
    await watch.until_published("status", b"online", start=start)
    await until(lambda: all(watch.received(f"vm/{vm}/state", start) for vm in there), what="all states again")
    await watch.until_all_ok(*there)
    assert {vm: watch.state(vm)["pid"] for vm in there} == pids


async def test_two_sockets_of_one_qemu_are_one_vm(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    second = lab.directory / "z-second.qmp"
    guest = await lab.guest("web", arguments=("-qmp", f"unix:{second},server=on,wait=off"))
    agent = start_agent(broker)
    await watch.until_health("web", "ok")
    assert watch.state("web")["socket"] == "web.qmp"
    for key, value in (("vms", {"total": 1, "online": 1}), ("unidentified", [])):
        await until(lambda key=key, value=value: (watch.last_json("host") or {}).get(key) == value, what=key)  # type: ignore[misc]
    reader, writer = await asyncio.open_unix_connection(str(second))  # the agent has not connected to it
    async with asyncio.timeout(PATIENCE_S):
        assert b"QMP" in await reader.readline()
    writer.close()
    await writer.wait_closed()

    await watch.moved("web", guest, 112 * MIB)
    life = watch.state("web")["life"]
    for sockets, socket in (("z-*.qmp", "z-second.qmp"), ("*.qmp", "web.qmp")):
        agent.configure(discovery={"sockets": [f"{lab.directory}/{sockets}"]})
        agent.reload()
        await watch.until_state("web", lambda state, socket=socket: state["socket"] == socket, what=socket)  # type: ignore[misc]
        state = await watch.until_health("web", "ok")
        assert (state["life"], state["pid"], state["mode"]) == (life, guest.pid, "manual")
        await until(lambda: [row["vm"] for row in watch.last_json("vms")] == ["web"], what="it in the list")
        assert await guest.monitor.actual() == 112 * MIB


async def test_a_vm_that_has_ended_is_forgotten_in_time_and_topics_of_an_earlier_run_are_cleared(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    stays, goes, killed = await asyncio.gather(*(lab.guest(name) for name in ("stays", "goes", "killed")))
    agent = start_agent(broker, discovery={"sockets": [f"{lab.directory}/*.qmp"], "forget_after_s": 1})
    await watch.until_all_ok("stays", "goes", "killed")
    await goes.terminate()
    await killed.kill()  # its socket file stays, and so does its name
    await until(lambda: watch.last("vm/goes/state") == b"", what="its state is cleared")
    await watch.until_last("vm/goes/availability", b"")
    await until(
        lambda: [row["vm"] for row in watch.last_json("vms")] == ["killed", "stays"], what="two are left"
    )
    await watch.until_health("killed", "offline")

    agent.kill()
    await watch.until_offline()
    killed.socket.unlink()
    agent.configure(discovery={"sockets": [f"{lab.directory}/st*.qmp"]})
    agent.start()
    await until(lambda: watch.last("vm/killed/state") == b"", what="the topic of the earlier run is cleared")
    await until(
        lambda: [row["vm"] for row in watch.last_json("vms")] == ["stays"],
        what="one",
    )
    await watch.until_health("stays", "ok")
    assert await stays.monitor.actual() == stays.memory


async def test_a_host_that_is_renamed_leaves_nothing_behind_and_keeps_what_was_set(
    lab: Lab, broker: LabBroker, start_agent: StartAgent
) -> None:
    guest = await lab.guest("web")
    first = {"host": "localhost", "state_dir": str(lab.directory / "state")}
    async with watching(broker, root="qmpballoon/localhost") as old, watching(broker) as watch:
        agent = start_agent(broker, agent=first, mqtt={"home_assistant": True})
        await old.until_health("web", "ok")
        await old.moved("web", guest, 112 * MIB)
        await old.do("web", "set-mode", mode="manual")
        agent.kill()
        agent.configure(mqtt={"home_assistant": True})
        agent.start()
        state = await watch.until_health("web", "ok")
        assert (state["mode"], state["target"]) == ("manual", 112 * MIB)
        assert await guest.monitor.actual() == 112 * MIB
        await agent.until_logged("host-renamed host=edge-7 last=localhost")

    async def left() -> list[str]:
        async with listening(broker.port) as late:
            await late.wait_for_pending()
            return [one.topic.value for one in late.messages if one.retain and "localhost" in one.topic.value]

    await eventually(left, lambda topics: not topics, timeout_s=PATIENCE_S, what="all old topics are cleared")
