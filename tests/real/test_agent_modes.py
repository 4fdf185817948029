"""Modes, limits, lists and re-read configurations, and what they let balloons do."""

from __future__ import annotations

import asyncio

from agent_process import PATIENCE_S, AgentWatch, StartAgent, until

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB


async def test_modes_last_as_long_as_requested(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    one, other = await asyncio.gather(lab.guest("one"), lab.guest("other"))
    start_agent(broker, vm={"match": [{"name": "other", "mode": "observe"}]})
    await watch.until_all_ok("one", "other")
    assert [watch.state(vm)["mode"] for vm in ("one", "other")] == ["manual", "observe"]

    start = watch.now
    assert await watch.do("one", "set-mode", mode="observe", for_s=3) == {"mode": "observe", "for_s": 3}
    await until(
        lambda: [one for one in watch.states("one", start) if one["mode"] == "observe"], what="observe"
    )
    await watch.until_state("one", lambda state: state["mode"] == "manual", what="manual again by itself")
    for mode in ("observe", "auto", "manual"):
        assert await watch.do("one", "set-mode", mode=mode) == {"mode": mode, "for_s": None}
        await watch.until_state("one", lambda state, mode=mode: state["mode"] == mode, what=mode)  # type: ignore[misc]

    # a target sets mode manual, from any mode
    await watch.moved("other", other, 120 * MIB)
    state = watch.state("other")
    assert (state["mode"], state["target"]) == ("manual", 120 * MIB)
    await watch.do("other", "set-mode", mode="observe")
    assert await other.monitor.actual() == 120 * MIB
    assert sorted(await watch.do(None, "list"), key=lambda row: str(row["vm"])) == [
        {"vm": vm, "name": vm, "health": "ok", "mode": mode, "size": one.memory, "actual": actual}
        for vm, mode, actual in (("one", "manual", one.memory), ("other", "observe", 120 * MIB))
    ]
    got = await watch.do("other", "get")
    assert (got["mode"], got["target"], got["actual"]) == ("observe", 120 * MIB, 120 * MIB)


async def test_a_host_that_observes_moves_nothing(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("one")
    agent = start_agent(broker, policy={"mode": "observe"}, vm={"match": [{"name": "one", "mode": "manual"}]})
    state = await watch.until_health("one", "ok")
    assert state["mode"] == "observe"
    assert await watch.refused("one", "set-target", target="112MiB", wait_s=5) == "not-allowed"
    await watch.send_raw("one", "target/set", "112MiB")
    await until(lambda: watch.answers(None), what="a refusal")
    await watch.do("one", "set-mode", mode="manual")
    got = await watch.do("one", "get")
    assert (got["mode"], got["target"], got["actual"]) == ("observe", None, guest.memory)
    assert await guest.monitor.actual() == guest.memory

    agent.configure(policy={"mode": "manual"})
    agent.reload()
    await watch.until_state(
        "one", lambda state: state["mode"] == "manual", what="its own mode is in force again"
    )
    await watch.moved("one", guest, 112 * MIB)


async def test_limits_set_over_mqtt_narrow_those_of_the_file(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("one")
    start_agent(broker, vm={"floor": "64MiB", "ceiling": "120MiB"})
    state = await watch.until_health("one", "ok")
    assert (state["floor"], state["ceiling"], state["overridden"]) == (64 * MIB, 120 * MIB, [])

    result = await watch.do("one", "set-limits", floor="75%", ceiling="112MiB", shares=2000)
    assert result == {"floor": 96 * MIB, "ceiling": 112 * MIB, "shares": 2000}
    state = await watch.until_state("one", lambda state: state["floor"] == 96 * MIB, what="the new floor")
    assert (state["ceiling"], state["shares"]) == (112 * MIB, 2000)
    assert state["overridden"] == ["floor", "ceiling", "shares"]
    for target in ("95MiB", "113MiB", "128MiB"):
        assert await watch.refused("one", "set-target", target=target) == "out-of-range"
    for limits in ({"floor": "63MiB"}, {"ceiling": "121MiB"}, {"floor": "112.5MiB"}, {"ceiling": "95MiB"}):
        assert await watch.refused("one", "set-limits", **limits) == "out-of-range"
    assert await guest.monitor.actual() == guest.memory

    assert await watch.do("one", "set-limits", floor=None, shares=None) == {
        "floor": 64 * MIB,
        "ceiling": 112 * MIB,
        "shares": 1000,
    }
    state = await watch.until_state(
        "one", lambda state: state["overridden"] == ["ceiling"], what="one is left"
    )
    await watch.moved("one", guest, 92 * MIB)


async def test_a_new_configuration_is_taken_by_signal_and_request_and_a_bad_one_refused(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guest = await lab.guest("one")
    agent = start_agent(broker)
    await watch.until_health("one", "ok")

    agent.configure(vm={"floor": "50%"})
    assert (await watch.do(None, "reload"))["restart_needed"] == []
    await watch.until_state("one", lambda state: state["floor"] == 64 * MIB, what="the floor of the new file")
    agent.configure(vm={"floor": "60%", "ceiling": "100%"})
    agent.reload()
    await watch.until_state("one", lambda state: state["floor"] > 64 * MIB, what="the floor of the newest")

    agent.file.write_text(agent.file.read_text() + "\n[polcy]\nname = 1\n")
    answer = await watch.ask(None, "reload")
    assert answer["error"]["code"] == "malformed"
    assert "policy" in answer["error"]["message"]
    agent.reload()
    assert "polcy" in await agent.until_logged("reload-refused")
    got = await watch.do("one", "get")
    assert got["floor"] > 64 * MIB
    assert await watch.refused("one", "set-target", target="64MiB") == "out-of-range"
    assert await guest.monitor.actual() == guest.memory

    # MQTT restarts with its new table; sockets that no glob matches any more are no VMs
    mqtt = {"url": broker.url, "heartbeat_s": 1}
    agent.configure(mqtt=mqtt)
    start = watch.now
    await watch.do(None, "reload")
    await watch.until_published("status", b"online", start=start)
    await until(lambda: watch.last_json("host")["heartbeat_s"] == 1, what="the new heartbeat")
    count = len(watch.received("vm/one/state"))
    await until(lambda: len(watch.received("vm/one/state")) > count + 1, what="two heartbeats")
    agent.configure(mqtt=mqtt, discovery={"sockets": [f"{lab.directory}/other-*.qmp"]})
    agent.reload()
    await until(lambda: watch.last("vm/one/state") == b"", what="its topics are cleared")
    await until(lambda: watch.last_json("vms") == [], what="an empty list")
    assert await watch.refused("one", "get") == "unknown-vm"
    probe = await asyncio.open_unix_connection(str(guest.socket))  # the agent has closed its connection
    async with asyncio.timeout(PATIENCE_S):
        assert b"QMP" in await probe[0].readline()
    probe[1].close()
