"""Closed loops: real guests on a small budget, between which the agent moves memory automatically."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from typing import Any, Final

import pytest
from agent_process import AgentWatch, StartAgent, until

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import GuestFigures, LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB

NAMES: Final = ("one", "two", "three", "four")
BUDGET: Final = 376 * MIB  # 73 % of four guests of 128 MiB, whose kernels take 54 MiB each
NEED_MIB: Final = 55  # that one guest can have beside three idle ones, and not within an equal share
GROWTH_MIB_PER_S: Final = (
    5  # from an equal share to an OOM kill in six seconds: the time that a busy agent has
)
SOON_S: Final = 90.0  # for what takes a few seconds on an idle machine
IDLE_S: Final = 5.0  # more than two calm ticks


def automatic(budget: int = BUDGET, **tables: Any) -> dict[str, Any]:
    """Return the agent's tables for a host in mode auto, on this budget."""
    return {"policy": {"mode": "auto"}, "host": {"budget": budget, "reserve": "16MiB"}, **tables}


async def fleet(lab: Lab, names: Sequence[str] = NAMES) -> list[LabGuest]:
    return list(await asyncio.gather(*(lab.guest(name) for name in names)))


async def total(guests: Sequence[LabGuest]) -> int:
    return sum([await guest.monitor.actual() for guest in guests])


async def until_within(guests: Sequence[LabGuest], budget: int = BUDGET) -> None:
    """Wait until all guests together are within the budget, as QEMU reports it."""
    await eventually(
        lambda: total(guests),
        lambda size: size <= budget,
        timeout_s=SOON_S,
        what=f"all within {budget // MIB} MiB",
        interval_s=0.1,
    )


async def grown(guest: LabGuest, mib: int = NEED_MIB, rate: int = GROWTH_MIB_PER_S) -> GuestFigures:
    """Let a guest's workload grow; return when it holds that much, or was killed."""
    await guest.command(f"grow {mib} {rate}")
    return await eventually(
        guest.figures,
        lambda figures: figures.held == mib * MIB or figures.kills > 0,
        timeout_s=SOON_S + mib / rate,
        what=f"{guest.name} holds {mib} MiB",
        interval_s=0.1,
    )


def decisions(watch: AgentWatch, *names: str) -> list[dict[str, Any]]:
    """Return the decisions about these VMs, in order."""
    found = [event for name in names or NAMES for event in watch.events(name, "decision")]
    return sorted(found, key=lambda event: str(event["ts"]))


async def assert_no_kills(watch: AgentWatch, guests: Sequence[LabGuest]) -> None:
    """Check that no guest's kernel killed its workload; on failure, list the decisions."""
    counts = {guest.name: (await guest.guest_memory()).oom_kills for guest in guests}
    listing = [
        f"{event['ts'][14:]} {event['vm']} {event['data']['from'] / MIB:.0f} -> "
        f"{event['data']['to'] / MIB:.0f} {event['data']['why']}"
        for event in decisions(watch)
    ]
    assert not any(counts.values()), "\n".join([str(counts), *listing])


async def until_idle(watch: AgentWatch, *names: str) -> None:
    """Wait until nothing has been sent to any of these VMs for ``IDLE_S``."""
    seen, since_s = -1, time.monotonic()

    def idle() -> bool:
        nonlocal seen, since_s
        count = len(decisions(watch, *names))
        if count != seen:
            seen, since_s = count, time.monotonic()
        return time.monotonic() - since_s > IDLE_S

    await until(idle, what=f"nothing is sent for {IDLE_S:g} s", timeout_s=2 * SOON_S)


async def test_memory_moves_by_need_and_back_and_nothing_is_sent_at_rest(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guests = await fleet(lab)
    start_agent(broker, **automatic())
    await until_within(guests)  # exactly full: what one gets, others must give
    one, two, *idle = guests

    await grown(one)
    await assert_no_kills(watch, guests)
    await until_within(guests)
    assert await one.monitor.actual() > BUDGET // len(guests)
    assert min([await guest.monitor.actual() for guest in idle]) < BUDGET // len(guests)
    reasons = {event["data"]["why"] for event in decisions(watch)}
    assert "give" in reasons
    assert reasons & {"emergency", "thin", "grow"}

    await until_idle(watch)
    await one.command("grow 4 100")  # it ends: its memory is lent to others
    await grown(two)
    await assert_no_kills(watch, guests)
    await until_within(guests)
    await grown(one, 20)
    await assert_no_kills(watch, guests)
    await until_idle(watch)


async def test_a_guest_without_a_driver_is_not_moved_and_the_others_are_managed(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guests = await fleet(lab)
    *others, last = guests
    await last.command("driver unload")
    budget = last.memory + 300 * MIB
    start_agent(broker, **automatic(budget))
    await until_within(guests, budget)

    await grown(others[0])
    await assert_no_kills(watch, guests)
    await until_within(guests, budget)
    await assert_no_kills(watch, guests)
    assert decisions(watch, "four") == []
    assert await last.monitor.actual() == last.memory

    await last.command("driver load")  # then it is managed again
    await watch.until_health("four", "ok")
    await grown(others[1], 30)
    await assert_no_kills(watch, guests)


async def test_a_manual_vm_is_not_moved_except_up_in_an_emergency(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guests = await fleet(lab)
    own, *others = guests
    start_agent(broker, **automatic(vm={"match": [{"name": "one", "mode": "manual"}]}))
    await watch.until_all_ok(*NAMES)
    await watch.moved("one", own, 100 * MIB)
    await until_within(guests)
    await grown(others[0], 30)
    await assert_no_kills(watch, guests)
    assert await own.monitor.actual() == 100 * MIB  # although it has the most to give
    assert [event["data"]["why"] for event in decisions(watch, "one")] == ["manual"]

    await grown(own, 45, 3)  # more than fits into 100 MiB
    await assert_no_kills(watch, guests)
    raised = (
        "emergency",
        "thin",
    )  # the second may follow at once, so the first is seen among the events only
    await until(
        lambda: {event["data"]["why"] for event in decisions(watch, "one")[1:]} & set(raised), what="raised"
    )
    assert {event["data"]["why"] for event in decisions(watch, "one")[1:]} <= set(raised)
    state = watch.state("one")
    assert (state["mode"], state["policy"]) == ("manual", "fairshare")
    assert await own.monitor.actual() > 100 * MIB
    await assert_no_kills(watch, guests)
    targets = [event["data"]["to"] for event in decisions(watch, "one")]
    assert targets == sorted(targets)  # never lowered


async def test_a_host_that_observes_publishes_what_it_would_do_and_moves_nothing(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guests = await fleet(lab)
    start_agent(broker, **automatic(policy={"mode": "observe"}))
    await watch.until_all_ok(*NAMES)
    await until(lambda: decisions(watch), what="decisions that are not sent")
    published = [event["data"] for event in decisions(watch)]
    assert {decision["sent"] for decision in published} == {False}
    assert {decision["policy"] for decision in published} == {"fairshare"}
    assert all(decision["to"] < decision["from"] for decision in published)
    assert await total(guests) == sum(guest.memory for guest in guests)
    assert {watch.state(name)["target"] for name in NAMES} == {None}


async def test_a_host_reclaims_releases_changes_its_policy_and_gives_back_when_it_stops(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guests = await fleet(lab)
    budget = 480 * MIB  # idle guests leave more of it than is reclaimed: no guest needs a loan
    agent = start_agent(broker, **automatic(budget, agent={"on_exit": "release"}))
    await until_within(guests, budget)
    await watch.until_all_ok(*NAMES)

    size = 96 * MIB  # more than is free
    answer = await watch.do(None, "reclaim", size=size, deadline_s=40, hold_s=600)
    assert answer["freed"] == size, answer
    assert sum(answer["gave"].values()) > 0, answer
    assert answer["refused"] == {}
    assert await total(guests) <= budget - size
    await until(
        lambda: (watch.last_json("host") or {}).get("holds"), what="the hold is listed", timeout_s=SOON_S
    )
    assert (await watch.do(None, "release", hold=answer["hold"]))["size"] == size
    assert await watch.refused(None, "release", hold=answer["hold"]) == "out-of-range"

    assert await watch.do(None, "set-policy", name="fixed") == {"name": "fixed", "mode": "auto"}
    await until(
        lambda: all(
            any(event["data"]["policy"] == "fixed" for event in watch.events(name, "decision"))
            for name in NAMES
        ),
        what="the static split is asked for",
        timeout_s=SOON_S,
    )
    share = budget // len(guests)
    for guest in guests:
        await guest.monitor.until_actual(
            lambda actual: share - 8 * MIB <= actual <= share + MIB,  # less the pool for emergencies
            timeout_s=SOON_S,
            what="an equal share",
        )

    assert await agent.terminate() == 0
    for guest in guests:
        await guest.monitor.until_actual(guest.memory.__eq__, timeout_s=SOON_S, what="all is given back")


async def test_a_reset_guest_boots_at_its_ceiling_and_is_shrunk_later(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guests = await fleet(lab)
    start_agent(broker, **automatic(vm={"grace_s": 3}))  # at least so long it keeps its ceiling
    await until_within(guests)
    await watch.until_all_ok(*NAMES)
    one, two, *_ = guests
    await two.monitor.until_actual(lambda actual: actual < 100 * MIB, timeout_s=SOON_S, what="it is shrunk")

    async with asyncio.TaskGroup() as tasks:
        await two.monitor.execute("system_reset")
        tasks.create_task(
            two.monitor.until_actual(
                lambda actual: actual > 120 * MIB, timeout_s=SOON_S, what="its ceiling, as its driver loads"
            )
        )
        tasks.create_task(watch.until_health("two", "starting"))
        tasks.create_task(grown(one, 30))
    booting = [event for event in decisions(watch, "two") if event["data"]["why"] == "booting"]
    assert [event["data"]["to"] for event in booting] == [two.memory - MIB]
    await assert_no_kills(watch, [one])
    await two.booted(boots=2, timeout_s=SOON_S)
    await watch.until_health("two", "ok")
    await until_within(guests)
    assert two.boots == 2  # it booted once, without a kernel panic
    await assert_no_kills(watch, guests)


async def test_an_agent_that_is_killed_while_a_guest_grows_costs_no_kill(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guests = await fleet(lab)
    agent = start_agent(broker, **automatic())
    await until_within(guests)
    await watch.until_all_ok(*NAMES)
    one = guests[0]
    rate = 1  # MiB/s: what it has available lasts for much longer than an agent takes to start
    await one.command(f"grow 35 {rate}")
    await eventually(
        one.figures, lambda figures: figures.held > 3 * MIB, timeout_s=SOON_S, what="it grows", interval_s=0.1
    )
    agent.kill()
    agent.start()
    await grown(one, 35, rate)
    await assert_no_kills(watch, guests)
    await until_within(guests)


@pytest.mark.parametrize("is_killed", [True, False])
async def test_an_agent_that_restarts_moves_nothing_before_fresh_figures(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent, *, is_killed: bool
) -> None:
    """The budget has room, so that a guest without figures would be grown to an equal part of it."""
    guests = await fleet(lab)
    agent = start_agent(broker, **automatic(budget=4 * 128 * MIB))
    await watch.until_all_ok(*NAMES)
    for name, guest in zip(NAMES, guests, strict=True):
        await watch.moved(name, guest, 96 * MIB)
        await watch.do(name, "set-mode", mode="auto")
    await until_idle(watch)
    loaded = guests[0]

    async def restarted() -> list[dict[str, Any]]:
        """Restart the agent; return the decisions until all guests have figures and nothing is sent."""
        if is_killed:
            agent.kill()
            start = await watch.until_offline()
        else:
            start = watch.now
            assert await agent.terminate() == 0
        agent.start()
        await watch.until_published("status", b"online", start=start)
        for name in NAMES:
            await until(
                lambda name=name: [  # type: ignore[misc]
                    state for state in watch.states(name, start) if state["health"] == "ok"
                ],
                what="its figures",
            )
        await until_idle(watch)
        found = [json.loads(event) for name in NAMES for event in watch.received(f"vm/{name}/event", start)]
        return [event for event in found if event["event"] == "decision"]

    for _ in range(2):
        before = [await guest.monitor.actual() for guest in guests]
        assert await restarted() == []
        assert [await guest.monitor.actual() for guest in guests] == before
    await loaded.command("grow 35 2")
    await eventually(
        loaded.figures, lambda figures: figures.held > 3 * MIB, timeout_s=SOON_S, what="it grows"
    )
    found = await restarted()
    assert {event["vm"] for event in found} <= {NAMES[0]}
    assert {event["data"]["why"] for event in found} <= {"grow", "thin", "emergency"}
    await assert_no_kills(watch, guests)


async def test_a_guest_with_a_reloaded_driver_is_managed_at_once(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    guests = await fleet(lab)
    start_agent(broker, **automatic())
    await until_within(guests)
    await watch.until_all_ok(*NAMES)
    one = guests[0]
    await one.command("driver unload")
    await one.monitor.until_actual(one.memory.__eq__, timeout_s=SOON_S, what="the balloon is empty")
    await watch.until_health("one", "starting", "no-driver")
    await one.command("driver load")
    await watch.until_health("one", "ok")
    await until_within(guests)  # not held for a minute as if another client had moved its balloon
    assert "foreign-hand" not in {event["data"]["why"] for event in decisions(watch, "one")}
    assert watch.state("one")["why"] != "foreign-hand"
    await assert_no_kills(watch, guests)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may lock so much memory")
async def test_locked_memory_is_not_counted_as_given(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    size = 256 * MIB
    locked = await lab.guest("locked", memory=size, fresh=True, arguments=("-overcommit", "mem-lock=on"))
    start_agent(broker, **automatic(160 * MIB))
    await locked.monitor.until_actual(
        lambda actual: actual <= 160 * MIB, timeout_s=SOON_S, what="its actual falls"
    )
    state = await watch.until_health("locked", "untrusted")  # its RSS did not follow within 15 s
    assert state["rss"] > size
    assert state["mode"] == "auto"
    asked = len(decisions(watch, "locked"))
    await until(
        lambda: (watch.last_json("host") or {}).get("used", 0) > 160 * MIB,
        what="the host counts resident memory, not targets",
        timeout_s=SOON_S,
    )
    await until_idle(watch, "locked")
    assert len(decisions(watch, "locked")) == asked  # no further target is sent


async def test_memory_that_is_plugged_stays_with_a_manual_guest(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    size, target, more = 192 * MIB, 160 * MIB, 128 * MIB
    guest = await lab.guest("web", memory=size, fresh=True, arguments=("-m", "slots=2,maxmem=1G"))
    start_agent(broker)
    await watch.until_health("web", "ok")
    await watch.moved("web", guest, target)
    await guest.monitor.execute("object-add", {"qom-type": "memory-backend-ram", "id": "m0", "size": more})
    await guest.monitor.execute("device_add", {"driver": "pc-dimm", "id": "dimm0", "memdev": "m0"})
    state = await watch.until_state("web", lambda state: state["size"] == size + more, what="it is seen")
    assert (state["mode"], state["target"]) == ("manual", target + more)
    await until_idle(watch, "web")
    assert [event["data"]["to"] for event in decisions(watch, "web")] == [target]  # nothing was sent for it
    assert await guest.monitor.actual() == target + more
    assert watch.state("web")["health"] == "ok"
