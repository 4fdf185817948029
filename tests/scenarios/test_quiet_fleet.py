"""What does not change costs nothing again: counts of requests, records and steps, never of time."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_harness import PATIENCE_S, QUICK, AgentHarness, Kernel, Qemus, running_agent

from qmpballoon.agent.vm_polls import VmPolls
from qmpballoon.agent.wheel import Member, Wheel
from qmpballoon.policy.guard import Guard
from qmpballoon.qmp import monitor as monitor_module
from qmpballoon.sim.guest import GuestSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB

CALM = replace(QUICK, stats_interval_s=1, fast_interval_s=0.2)
ROOMY = GuestSpec(size=1024 * MIB)  # so much is available that the calm interval is enough

EVERYTHING = (
    "query-status",
    "query-migrate",
    "query-memory-size-summary",
    "query-balloon",
    "x-query-virtio-status",
)


def counted(qemu: SimulatedQemu, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the commands that a QEMU gets from now on."""
    commands: Counter[str] = Counter()
    execute = qemu.execute

    def execute_and_count(command: str, arguments: Any) -> Any:
        commands[f"{command} {arguments.get('property', '')}".strip()] += 1
        return execute(command, arguments)

    monkeypatch.setattr(qemu, "execute", execute_and_count)
    return commands


async def calm(harness: AgentHarness, *names: str) -> None:
    """Wait until the VMs are polled by the usual requests."""
    for name in names:
        await harness.until_health(name, "ok")
        await harness.until_sampled(name, samples=2)


async def test_a_calm_vm_gets_one_request_per_sample_and_makes_no_new_record(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", guest=ROOMY)
    async with running_agent(sockets_dir, monkeypatch, settings=CALM) as harness:
        await calm(harness, "a")
        commands, facts, status = counted(qemu, monkeypatch), harness.vm("a").facts, harness.record("a")
        guest = harness.vm("a").guest()
        seen_at_s = harness.sampled_at_s("a")
        await harness.until_sampled("a", samples=3)
        assert set(commands) == {"qom-get guest-stats"}
        assert 3 <= commands["qom-get guest-stats"] <= 4
        assert harness.vm("a").facts is facts
        assert harness.record("a") is status
        assert harness.vm("a").guest() is guest
        newest_s = harness.sampled_at_s("a")
        assert newest_s is not None
        assert seen_at_s is not None
        assert newest_s - seen_at_s >= 2  # the record tells how old the sample really is


async def test_a_guest_that_is_sampled_often_takes_no_turn_of_its_task(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[VmPolls] = []
    turn = VmPolls._turn

    async def counted_turn(polls: VmPolls) -> None:
        turns.append(polls)
        await turn(polls)

    monkeypatch.setattr(VmPolls, "_turn", counted_turn)
    qemu = await qemus.start("a", guest=ROOMY)
    async with running_agent(sockets_dir, monkeypatch, settings=CALM) as harness:
        await calm(harness, "a")
        qemu.guest.set_demand(950 * MIB)  # it is thin
        await harness.until_sampled("a", samples=2)
        turns.clear()
        commands = counted(qemu, monkeypatch)
        for step in range(1, 6):
            qemu.guest.set_demand((950 + step) * MIB)
            await harness.until_sampled("a", samples=1)
        assert commands["qom-set guest-stats-polling-interval"] >= 2 * 4
        assert not turns


async def test_growth_that_a_sample_shows_ends_the_pause_under_way(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses_s: list[float] = []
    put = Wheel.put

    def noted(wheel: Wheel, member: Member, pause_s: float) -> None:
        pauses_s.append(round(pause_s, 2))
        put(wheel, member, pause_s)

    qemu = await qemus.start("a", guest=ROOMY)
    async with running_agent(sockets_dir, monkeypatch, settings=CALM) as harness:
        await calm(harness, "a")
        monkeypatch.setattr(Wheel, "put", noted)
        qemu.guest.set_demand(100 * MIB)
        await harness.until(lambda: CALM.fast_interval_s in pauses_s)
        assert pauses_s[pauses_s.index(CALM.fast_interval_s) - 1] > CALM.fast_interval_s  # of the same poll


async def test_everything_else_is_asked_for_every_ten_seconds_in_one_go_with_a_sample(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", guest=ROOMY)
    async with running_agent(sockets_dir, monkeypatch, settings=CALM) as harness:
        await calm(harness, "a")
        commands, facts = counted(qemu, monkeypatch), harness.vm("a").facts
        harness.later_s += 11
        await harness.until(lambda: commands["query-migrate"])
        await harness.until_sampled("a", samples=2)
        commands.pop("qom-get guest-stats")
        assert commands == dict.fromkeys(EVERYTHING, 1)
        assert harness.vm("a").facts.seen == facts.seen


@pytest.mark.parametrize("change", ["paused", "migrating", "plugged", "moved"])
async def test_what_changes_without_an_event_is_found_within_ten_seconds(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    qemu = await qemus.start("a", guest=ROOMY)
    async with running_agent(sockets_dir, monkeypatch, settings=CALM) as harness:
        await calm(harness, "a")
        harness.later_s += 11
        commands = counted(qemu, monkeypatch)
        await harness.until(lambda: commands["query-migrate"])  # the first replies to compare with
        await harness.until_sampled("a", samples=1)
        match change:
            case "paused":
                qemu.set_migration(None, "paused")
            case "migrating":
                qemu.set_migration("active")
            case "plugged":
                qemu.plug(64 * MIB)
            case "moved":
                qemu.machine.guest.load_balloon(800 * MIB)
        harness.later_s += 11
        if change == "plugged":
            await harness.until(lambda: harness.record("a").size == 1088 * MIB)
        elif change == "moved":
            await harness.until(lambda: harness.record("a").actual == 800 * MIB)
        else:
            await harness.until_health("a", change)


async def test_figures_that_change_are_taken_and_counters_alone_make_no_record(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", guest=ROOMY)
    async with running_agent(sockets_dir, monkeypatch, settings=CALM) as harness:
        await calm(harness, "a")
        facts, before = harness.vm("a").facts, harness.record("a").sample
        assert before is not None
        faults = before.stats.minor_faults
        await harness.until(lambda: before.stats.minor_faults != faults)  # the same sample, with new counters
        assert harness.vm("a").facts is facts
        available = before.available
        qemu.guest.set_demand(100 * MIB)
        await harness.until(
            lambda: (
                (sample := harness.record("a").sample) is not before
                and sample is not None
                and sample.available != available
            )
        )
        assert harness.vm("a").facts is not facts


async def test_a_driver_that_goes_silent_is_stale_as_before(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", guest=ROOMY)
    async with running_agent(sockets_dir, monkeypatch, settings=CALM) as harness:
        await calm(harness, "a")
        qemu.execute("qom-set", {"path": DEVICE, "property": "guest-stats-polling-interval", "value": 0})
        harness.later_s += 6
        await harness.until_health("a", "stale")
        await harness.until_health("a", "ok")  # polling is turned on again


async def test_a_balloon_that_is_gone_without_an_event_is_found_by_the_next_poll(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", guest=ROOMY)
    async with running_agent(sockets_dir, monkeypatch, settings=CALM) as harness:
        await calm(harness, "a")
        qemu.faults.refuse = frozenset({"qom-get", "query-balloon"})
        await harness.until(lambda: harness.record("a").sample is None)


DEVICE = "/machine/peripheral/balloon0"


async def test_a_quiet_host_is_decided_about_once_until_something_moves(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    step = Guard.step

    def stepped(guard: Guard[Any], state: Any, snapshot: Any) -> Any:
        steps.append(len(snapshot.guests))
        return step(guard, state, snapshot)

    monkeypatch.setattr(Guard, "step", stepped)
    started = [await qemus.start(name, guest=ROOMY) for name in ("a", "b", "c")]
    async with running_agent(sockets_dir, monkeypatch, settings=CALM, governed=True) as harness:
        await calm(harness, "a", "b", "c")
        count = -1
        async with asyncio.timeout(PATIENCE_S):
            while len(steps) != count:  # what follows the attach takes some steps
                count = len(steps)
                for _ in range(3):
                    harness.context.ticks.soon()
                    await harness.governor.ticked.wait()
        started[1].guest.set_demand(100 * MIB)
        await harness.until(lambda: len(steps) > count)
        assert steps[-1] == 3


def test_the_table_of_sockets_is_read_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[float] = []
    now_s = 100.0

    def read() -> dict[bytes, list[tuple[bytes, bytes, bytes]]]:
        reads.append(now_s)
        return {b"/run/a.qmp": [(b"77", b"00010000", b"01")]}

    monkeypatch.setattr(monitor_module, "_read_rows", read)
    tables = monitor_module.SocketTables(lambda: now_s)
    for _ in range(1000):
        assert tables.of("/run/a.qmp", max_age_s=1.0).listening == {b"77"}
        assert not tables.of("/run/b.qmp", max_age_s=1.0).listening
    assert len(reads) == 1
    now_s += 0.9
    tables.of("/run/a.qmp", max_age_s=1.0)
    assert len(reads) == 1
    tables.of("/run/a.qmp", max_age_s=0.5)
    tables.of("/run/a.qmp")
    assert len(reads) == 3


def test_sockets_that_come_one_after_the_other_cause_few_readings_of_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readings, now_s, takes_s = 0, 100.0, 0.01

    def read() -> dict[bytes, list[tuple[bytes, bytes, bytes]]]:
        nonlocal readings, now_s
        readings += 1
        now_s += takes_s
        return {}

    monkeypatch.setattr(monitor_module, "_read_rows", read)
    tables = monitor_module.SocketTables(lambda: now_s)
    for _ in range(1000):
        tables.lately("/run/a.qmp")
        now_s += 0.001
    assert 0 < readings * takes_s < 0.06 * (now_s - 100.0)
    before = readings
    tables.of("/run/a.qmp", max_age_s=0.005)
    assert readings == before + 1


async def test_a_lost_session_wakes_only_the_second_monitor_of_its_qemu(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    for name in ("a", "b", "c"):
        kernel.new_life(qemus.path(name), qemus.path(f"{name}z"))
    started = {name: await qemus.start(name, f"{name}z") for name in ("a", "b", "c")}
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        for name in started:
            await harness.until_health(name, "ok")
        waiting = harness.registry._given_up
        await harness.until(lambda: len(waiting) == 3)
        before = dict(waiting)
        started["a"].drop_clients()
        await harness.until(lambda: before[str(qemus.path("a"))].is_set())
        assert not any(event.is_set() for path, event in before.items() if path != str(qemus.path("a")))
        await harness.until_health("a", "ok")
