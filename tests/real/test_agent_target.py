"""Targets set over MQTT, checked on second monitors."""

from __future__ import annotations

import asyncio
import json

from agent_process import MOVED_S, PATIENCE_S, ROOT, AgentWatch, StartAgent, error_word, until

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import BalloonDevice
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB


async def test_targets_move_balloons_and_each_answer_has_the_result(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    web, oom = await asyncio.gather(
        lab.guest("web"), lab.guest("oom", balloon=BalloonDevice(deflate_on_oom=True))
    )
    start_agent(broker)
    await watch.until_all_ok("web", "oom")

    # with a wait: the answer comes when the balloon is there
    result = await watch.do("web", "set-target", target="112MiB", wait_s=MOVED_S)
    assert result["reached"] is True
    assert result["target"] == 112 * MIB
    assert abs(result["actual"] - 112 * MIB) <= MIB
    await web.monitor.until_actual((112 * MIB).__eq__, timeout_s=PATIENCE_S, what="the balloon takes 16 MiB")
    state = await watch.until_state("web", lambda state: state["actual"] == 112 * MIB, what="actual")
    assert (state["target"], state["mode"], state["why"]) == (112 * MIB, "manual", "manual")
    assert [event["data"]["to"] for event in watch.events("web", "decision")] == [112 * MIB]

    # without: when QEMU took it
    result = await watch.do("oom", "set-target", target="75%")
    assert result["target"] == 96 * MIB
    assert isinstance(result["reached"], bool)
    await oom.monitor.until_actual(
        (96 * MIB).__eq__, timeout_s=PATIENCE_S, what="the balloon takes a quarter"
    )

    # as a bare size on target/set, which has its own response topic; a larger target too
    await watch.send_raw("web", "target/set", "125829121")
    await web.monitor.until_actual(
        (120 * MIB + 4096).__eq__, timeout_s=PATIENCE_S, what="a page more than 120 MiB"
    )
    await until(
        lambda: [answer["result"]["target"] for answer in watch.answers(None)] == [120 * MIB + 4096],
        what="the answer, without a transaction",
    )
    await watch.send_raw("web", "request/set-target", "100%")
    await web.monitor.until_actual(web.memory.__eq__, timeout_s=PATIENCE_S, what="the balloon is empty")

    # the word auto gives the VM to the policy
    await watch.send_raw("web", "target/set", "auto")
    await watch.until_state("web", lambda state: state["mode"] == "auto", what="auto again")
    answer = json.loads((await watch.listener.on(f"{ROOT}/vm/web/response/set-mode")).payload)
    assert (answer["status"], answer["result"]["mode"]) == ("ok", "auto")

    # out of range is refused, never clamped
    for target in ("31MiB", "129MiB", "101%", 4096):
        assert await watch.refused("oom", "set-target", target=target) == "out-of-range"
    assert await oom.monitor.actual() == 96 * MIB
    assert watch.state("oom")["target"] == 96 * MIB
    assert len(watch.events("oom", "decision")) == 1


async def test_a_target_that_cannot_be_reached_in_time_is_an_error_and_stays(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    still, bare, _ = await asyncio.gather(
        lab.guest("still"),
        lab.guest("bare", driver=False),
        lab.empty_qemu("none", balloon=None, paused=False),
    )
    start_agent(broker)
    await watch.until_health("still", "ok")
    await still.monitor.execute("stop")
    await watch.until_health("still", "paused")
    await watch.until_health("bare", "starting", "no-driver")
    await watch.until_health("none", "no-balloon")

    answers: tuple[str, ...] = await asyncio.gather(
        watch.refused("still", "set-target", target="100MiB", wait_s=1),
        watch.refused("bare", "set-target", target="96MiB", wait_s=1),
        watch.refused("none", "set-target", target="32MiB", wait_s=1),
    )
    assert tuple(answers) == ("not-reached", "no-driver", "no-balloon")
    await until(
        lambda: (
            [watch.state(vm)["target"] for vm in ("still", "bare", "none")] == [100 * MIB, 96 * MIB, None]
        ),
        what="the targets stay",
    )
    assert [await guest.monitor.actual() for guest in (still, bare)] == [still.memory, bare.memory]

    await still.monitor.execute("cont")  # the target stays: it is reached as soon as the guest can
    await bare.command("driver load")
    await still.monitor.until_actual(
        (100 * MIB).__eq__, timeout_s=PATIENCE_S, what="the continued guest reaches its target"
    )
    await bare.monitor.until_actual(
        (96 * MIB).__eq__, timeout_s=PATIENCE_S, what="the new driver reaches the target"
    )
    await watch.until_state("bare", lambda state: state["actual"] == 96 * MIB, what="actual")


async def test_a_waiting_target_is_answered_superseded_or_offline(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    again, ended, _, hung = await asyncio.gather(
        *(lab.guest(name, driver=False) for name in ("again", "ended", "left", "hung"))
    )
    agent = start_agent(broker, vm={"qmp_timeout_s": 4})
    vms = ("again", "ended", "left", "hung")
    for vm in vms:
        await watch.until_health(vm, "starting", "no-driver")

    async def waits(vm: str, target: str) -> str:
        before = len(watch.events(vm, "decision"))
        transaction = await watch.send(vm, "set-target", target=target, wait_s=600)
        await until(lambda: len(watch.events(vm, "decision")) > before, what=f"{target} is sent to {vm}")
        return transaction

    older = [await waits("again", f"{size}MiB") for size in (100, 110)]
    newest = await waits("again", "120MiB")
    assert [error_word(await watch.answer(one)) for one in older] == ["superseded"] * 2
    waiting = [await waits(vm, "100MiB") for vm in ("ended", "left", "hung")]

    await again.restart()
    assert error_word(await watch.answer(newest)) in ("superseded", "offline")
    await ended.terminate()
    assert error_word(await watch.answer(waiting[0])) == "offline"
    hung.stop()
    assert error_word(await watch.answer(waiting[2])) == "offline"
    hung.cont()
    assert await agent.terminate() == 0
    assert error_word(await watch.answer(waiting[1])) == "offline"
    await watch.until_published("status", b"offline")
    transactions = [*older, newest, *waiting]
    assert [len(watch.answers(one)) for one in transactions] == [1] * len(transactions)
