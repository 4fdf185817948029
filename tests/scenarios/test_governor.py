"""The tick: modes, manual targets of new lives, the host's figures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_harness import PATIENCE_S, QUICK, AgentHarness, Kernel, Qemus, running_agent

from qmpballoon import log as log_module
from qmpballoon.agent import context as context_module
from qmpballoon.agent import governor as governor_module
from qmpballoon.agent.actuator import Actuator
from qmpballoon.config import HostSettings, PolicySettings, VmMatch
from qmpballoon.model.names import VmId
from qmpballoon.policy import calm as calm_module
from qmpballoon.policy.in_force import STANDS_S
from qmpballoon.sim.guest import Behaviour, GuestSpec
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB, parse_amount

MANUAL = PolicySettings(mode="manual")


@pytest.fixture(autouse=True)
def quick_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_module, "CALM_TICK_S", 0.05)


@pytest.mark.parametrize(
    ("host", "match", "request_mode", "in_force"),
    [
        ("auto", None, None, "auto"),
        ("manual", None, None, "manual"),
        ("manual", "auto", None, "auto"),
        ("auto", "observe", None, "observe"),
        ("auto", "observe", "manual", "manual"),
        ("observe", "auto", "manual", "observe"),
    ],
)
async def test_mode_observe_of_the_host_wins_then_the_request_then_the_vm_then_the_host(
    host: str,
    match: str | None,
    request_mode: str | None,
    in_force: str,
    qemus: Qemus,
    sockets_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await qemus.start("a")
    matches = () if match is None else (VmMatch(name="a", settings=(("mode", match),)),)
    policy = PolicySettings(mode=host)
    async with running_agent(sockets_dir, monkeypatch, policy=policy, matches=matches) as harness:
        await harness.until_health("a", "ok")
        if request_mode is not None:
            await harness.ask("a", "set-mode", mode=request_mode)
        harness.vm("a").renew_mode()
        assert harness.records["a"].mode == in_force


async def test_a_new_life_gets_its_manual_target_when_its_driver_is_up_and_the_grace_is_over(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calm_module, "STEP_EVERY_S", float("inf"))  # a grace that ends changes no figure
    kernel = Kernel()
    first = await qemus.start("a")
    settings = replace(QUICK, grace_s=100.0)
    async with running_agent(
        sockets_dir, monkeypatch, kernel, settings, governed=True, policy=MANUAL
    ) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        first.die()
        kernel.age_s = 1.0
        life = kernel.new_life(qemus.path("a"))
        second = await qemus.start("a", guest=GuestSpec(boot_s=0.1), booted=False)
        await harness.until(
            lambda: harness.record("a").life == life and harness.record("a").sample is not None
        )
        ticks = len(harness.hosts)
        await harness.until(lambda: len(harness.hosts) > ticks + 1)
        assert harness.record("a").target is None
        assert second.guest.target == 256 * MIB
        harness.later_s += 101
        await harness.until(lambda: second.guest.target == 200 * MIB)
        await harness.until(lambda: harness.record("a").target == 200 * MIB)
        assert harness.record("a").mode == "manual"


async def test_a_manual_target_that_its_limits_no_longer_allow_is_not_sent(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    first = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, kernel, governed=True, policy=MANUAL) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        first.die()
        kernel.new_life(qemus.path("a"))
        second = await qemus.start("a", guest=GuestSpec(size=128 * MIB))
        await harness.until(lambda: harness.record("a").size == 128 * MIB and harness.health("a") == "ok")
        ticks = len(harness.hosts)
        await harness.until(lambda: len(harness.hosts) > ticks + 2)
        assert second.guest.target == 128 * MIB
        assert harness.store.kept(VmId("a")).target == 200 * MIB


async def test_a_manual_target_above_a_ceiling_that_was_lowered_stays_and_is_told_once(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, governed=True, policy=MANUAL) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        lower = (VmMatch(name="a", settings=(("ceiling", parse_amount("150MiB")),)),)
        harness.reconfigure(replace(harness.configuration, matches=lower))
        await harness.until(lambda: "manual-target-refused" in caplog.text)
        await some_time_later(harness)
        (line,) = (line for line in caplog.text.splitlines() if "manual-target-refused" in line)
        assert line.endswith("and ceiling 150 MiB; the guest keeps it")
        assert (qemu.guest.target, harness.record("a").target) == (200 * MIB, 200 * MIB)
        await harness.ask("a", "set-target", target=140 * MIB, wait_s=PATIENCE_S)


@pytest.mark.parametrize(("mode", "released"), [("auto", ["a"]), ("manual", []), ("observe", [])])
async def test_only_automatic_vms_are_released_and_none_of_a_host_that_observes(
    mode: str, released: list[str], qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    qemu.execute("balloon", {"value": 128 * MIB})
    host = HostSettings(reserve=parse_amount("1MiB"))
    policy = PolicySettings(mode=mode)
    async with running_agent(sockets_dir, monkeypatch, policy=policy, host=host) as harness:
        await harness.until_health("a", "ok")
        await harness.until(lambda: harness.record("a").actual == 128 * MIB)
        assert [vm.id for vm in harness.governor.release_all()] == released


async def test_the_host_is_published_with_every_tick(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a", machine=MachineSpec(name="a"))
    ended = await qemus.start("b")
    host = HostSettings(budget=parse_amount("1GiB"), reserve=parse_amount("1MiB"))
    async with running_agent(sockets_dir, monkeypatch, governed=True, policy=MANUAL, host=host) as harness:
        await harness.until(lambda: harness.health("a") == harness.health("b") == "ok")
        ended.die()
        await harness.until_health("b", "offline")
        harness.hosts.clear()
        await harness.until(lambda: harness.hosts and harness.hosts[-1].vms_online == 1)
        record = harness.hosts[-1]
        assert (record.mode, record.vms_total, record.budget) == ("manual", 2, 1024 * MIB)
        assert record.used == 256 * MIB
        assert record.available == 768 * MIB
        assert record.mem_total is not None
        assert 0 <= record.room <= 768 * MIB


async def test_room_tells_whether_a_new_vm_fits_and_keeps_nothing_free(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")  # 256 MiB
    host = HostSettings(budget=parse_amount("400MiB"), reserve=parse_amount("1MiB"))
    async with running_agent(sockets_dir, monkeypatch, governed=True, policy=MANUAL, host=host) as harness:
        await harness.until_health("a", "ok")
        fits = await harness.ask(None, "room", size=100 * MIB)
        assert fits == {"room": 144 * MIB, "fits": True, "headroom": 44 * MIB}
        assert await harness.ask(None, "room", size=144 * MIB) == {**fits, "headroom": 0}
        lacks = await harness.ask(None, "room", size=145 * MIB)
        assert lacks == {"room": 144 * MIB, "fits": False, "headroom": -MIB}
        await harness.ask(None, "reclaim", size=44 * MIB, deadline_s=0)
        assert (await harness.ask(None, "room", size=MIB))["room"] == 100 * MIB
        assert not (await harness.ask(None, "room", size="100%"))["fits"]


async def test_a_sleep_of_the_host_makes_every_sample_stale(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    asleep_s = 0.0
    original = governor_module._asleep_s
    monkeypatch.setattr(governor_module, "_asleep_s", lambda: original() + asleep_s)
    async with running_agent(sockets_dir, monkeypatch, governed=True, policy=MANUAL) as harness:
        await harness.until_health("a", "ok")
        qemu.set_behaviour(Behaviour.FROZEN_STATS)
        asleep_s = 3600.0
        with harness.vm("a").watched():
            record = await harness.until_health("a", "stale")
        assert record.sample is not None
        assert harness.context.clock() - record.sample.seen_at_s > 3600


ROOM = HostSettings(budget=parse_amount("1GiB"), reserve=parse_amount("1MiB"))


def targets(guests: list[SimulatedQemu]) -> list[int]:
    return [qemu.guest.target for qemu in guests]


async def ticked(harness: AgentHarness, times: int = 5) -> None:
    ticks = len(harness.hosts)
    await harness.until(lambda: len(harness.hosts) >= ticks + times)


async def small_guests(qemus: Qemus, **how: Any) -> list[SimulatedQemu]:
    """Start two guests that have half of their memory, of which they need little, and send no figures."""
    started = [await qemus.start(name, **how) for name in ("a", "b")]
    for qemu in started:
        qemu.execute("balloon", {"value": 128 * MIB})
        qemu.set_behaviour(Behaviour.FROZEN_STATS)
    return started


@pytest.mark.parametrize("policy", ["fairshare", "proportional", "fixed"])
@pytest.mark.parametrize("version", [(5, 2), (7, 2), (11, 1)])
async def test_an_agent_that_restarts_decides_nothing_before_a_guests_first_fresh_figures(
    version: tuple[int, int], policy: str, qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    monkeypatch.setattr(context_module, "CALM_TICK_S", 0.02)
    guests = await small_guests(qemus, machine=MachineSpec(version=(*version, 0)))
    auto = PolicySettings(name=policy, mode="auto")
    before = targets(guests)
    for _ in range(2):
        async with running_agent(
            sockets_dir, monkeypatch, kernel, governed=True, policy=auto, host=ROOM
        ) as harness:
            await harness.until(lambda: all(harness.vm(vm).connection == "up" for vm in sorted(harness.ids)))
            await harness.until(lambda: harness.ids == {"a", "b"})
            await ticked(harness)
            await harness.until(lambda: {harness.record(vm).why for vm in ("a", "b")} == {"awaits-figures"})
            assert targets(guests) == before
            guests[0].set_behaviour(Behaviour.IDEAL)
            harness.later_s += STANDS_S  # a reason stands for some time
            await harness.until(lambda: harness.record("a").why != "awaits-figures")
            await ticked(harness)
            assert targets(guests)[1] == before[1]
            guests[0].set_behaviour(Behaviour.FROZEN_STATS)
            before = targets(guests)


async def test_a_guest_that_comes_back_online_or_is_set_to_auto_is_left_alone_until_its_figures(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guests = await small_guests(qemus)
    auto = PolicySettings(mode="auto")
    async with running_agent(sockets_dir, monkeypatch, governed=True, policy=auto, host=ROOM) as harness:
        await harness.until(lambda: harness.ids == {"a", "b"})
        before = targets(guests)
        for mode in ("observe", "manual", "auto"):
            harness.governor.choose(None, mode)
            guests[0].drop_clients()
            await harness.until_health("a", "offline", "unresponsive")
            await harness.until(lambda: harness.vm("a").connection == "up")
            await ticked(harness)
            await harness.ask("b", "set-mode", mode=mode)
            harness.reconfigure(harness.configuration)
            harness.governor.renew()
            await ticked(harness)
        assert targets(guests) == before


async def test_after_a_sleep_of_the_host_no_balloon_moves_before_fresh_figures(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures that are old by the sleep alone are no reason to grow a guest to an equal part."""
    guests = await small_guests(qemus)
    asleep_s = 0.0
    original = governor_module._asleep_s
    monkeypatch.setattr(governor_module, "_asleep_s", lambda: original() + asleep_s)
    auto = PolicySettings(mode="auto")
    for qemu in guests:
        qemu.set_behaviour(Behaviour.IDEAL)
    async with running_agent(sockets_dir, monkeypatch, governed=True, policy=auto, host=ROOM) as harness:
        await harness.until(lambda: harness.health("a") == harness.health("b") == "ok")
        for qemu in guests:
            qemu.set_behaviour(Behaviour.FROZEN_STATS)
        await ticked(harness)
        before = targets(guests)
        asleep_s = 3600.0
        await harness.until(lambda: [harness.record(vm).why for vm in "ab"] == ["awaits-figures"] * 2)
        await ticked(harness)
        assert targets(guests) == before


async def test_the_first_decision_after_observe_is_entered_again_is_published(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has more than the budget, so that each tick would shrink it."""
    await qemus.start("a", guest=GuestSpec(size=512 * MIB))
    host = HostSettings(budget=parse_amount("300MiB"), reserve=parse_amount("1MiB"))
    observe = PolicySettings(mode="observe")
    async with running_agent(sockets_dir, monkeypatch, governed=True, policy=observe, host=host) as harness:

        def published() -> int:
            return harness.events_of("a").count("decision")

        await harness.until(lambda: published() == 1)
        ticks = len(harness.hosts)
        await harness.until(lambda: len(harness.hosts) > ticks + 3)
        assert published() == 1  # a repeated decision is not published
        harness.governor.choose(None, "manual")
        await harness.until(lambda: harness.record("a").mode == "manual")
        ticks = len(harness.hosts)
        await harness.until(lambda: len(harness.hosts) > ticks + 1)
        harness.governor.choose(None, "observe")
        await harness.until(lambda: published() == 2)


async def test_every_target_of_an_emergency_is_logged(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log_module, "_repeats", log_module._Repeats())
    caplog.set_level(logging.INFO, "qmpballoon")
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, policy=MANUAL) as harness:
        await harness.until_health("a", "ok")
        actuator = Actuator(harness.context.feed)
        for number in range(1, 7):
            await actuator.send(harness.vm("a"), (100 + number) * MIB, why="give")
        for number in range(1, 7):
            await actuator.send(harness.vm("a"), (110 + number) * MIB, why="emergency")
    logged = [record for record in caplog.records if record.message.startswith("target vm=a")]
    assert [record.levelno for record in logged] == [logging.INFO] * 3 + [logging.WARNING] * 6
    assert "withheld=3" in logged[3].message


async def some_time_later(harness: AgentHarness, ticks: int = 2) -> None:
    """Let time pass for reasons that must stand for a while, and wait for some ticks."""
    harness.later_s += STANDS_S
    await ticked(harness, ticks)


async def test_an_emergency_is_the_reason_only_while_it_lasts(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, governed=True) as harness:
        await harness.until_health("a", "ok")
        harness.later_s += STANDS_S  # for the word from before the first figures
        await harness.until(lambda: harness.record("a").why == "at-ease")
        rested = harness.record("a").why_since
        assert rested is not None
        await harness.ask("a", "set-target", target=128 * MIB, wait_s=PATIENCE_S)
        await harness.until(lambda: harness.record("a").actual == 128 * MIB)
        _, available, _ = qemu.guest.memory()
        qemu.set_demand(available - 10 * MIB)
        await harness.ask("a", "set-mode", mode="auto")
        await harness.until(lambda: harness.record("a").why == "emergency")
        began = harness.record("a").why_since
        assert began is not None
        assert began > rested
        qemu.set_demand(0)
        harness.later_s += STANDS_S
        await harness.until(lambda: harness.record("a").why == "at-ease")
        assert (harness.record("a").why_since or began) > began


async def test_a_change_of_the_mode_changes_the_reason(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, governed=True) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        since = harness.record("a").why_since
        assert harness.record("a").why == "manual"
        await some_time_later(harness)
        assert (harness.record("a").why, harness.record("a").why_since) == ("manual", since)
        await harness.ask("a", "set-mode", mode="auto")
        assert harness.record("a").why != "manual"  # also before the next tick
        await harness.until(lambda: harness.record("a").why == "at-ease")
        await harness.ask("a", "set-mode", mode="observe")
        assert harness.record("a").why == "observe"


async def test_without_a_decision_there_is_no_reason(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, governed=True, policy=MANUAL) as harness:
        await harness.until_health("a", "ok")
        await some_time_later(harness)
        assert (harness.record("a").why, harness.record("a").why_since) == (None, None)


async def test_the_reason_of_a_vm_that_ended_does_not_stay(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calm_module, "STEP_EVERY_S", float("inf"))  # a reason that ends changes no figure
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, governed=True) as harness:
        await harness.until_health("a", "ok")
        await harness.until(lambda: harness.record("a").why == "at-ease")
        qemu.die()
        await harness.until_health("a", "offline")
        await harness.until(lambda: harness.record("a").why == "silent")


async def test_a_reason_that_stays_is_published_once(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calm_module, "STEP_EVERY_S", float("inf"))
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, governed=True) as harness:
        await harness.until_health("a", "ok")
        await harness.until(lambda: harness.record("a").why == "at-ease")
        since = harness.record("a").why_since
        for _ in range(3):
            await some_time_later(harness)
        assert (harness.record("a").why, harness.record("a").why_since) == ("at-ease", since)


async def test_a_shrink_that_is_under_way_is_not_sent_after_a_request_that_forbids_it(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", guest=GuestSpec(size=512 * MIB))
    host = HostSettings(budget=parse_amount("300MiB"), reserve=parse_amount("1MiB"))
    async with running_agent(sockets_dir, monkeypatch, governed=True, policy=MANUAL, host=host) as harness:
        await harness.until_health("a", "ok")
        vm, sent = harness.vm("a"), []
        send_target = vm.send_target

        async def forbidden_meanwhile(target: int, why: str, *, still: Callable[[], bool]) -> int:
            sent.append(target)
            await harness.ask("a", "set-mode", mode="observe")
            return await send_target(target, why, still=still)

        monkeypatch.setattr(vm, "send_target", forbidden_meanwhile)
        await harness.ask("a", "set-mode", mode="auto")
        await harness.until(lambda: sent)
        await harness.until(lambda: not harness.governor._sending)
        await ticked(harness)
        assert sent[0] < 512 * MIB
        assert (qemu.guest.target, harness.record("a").target) == (512 * MIB, None)
