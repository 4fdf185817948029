"""A VM of the agent: every health word on the simulated QEMU, resets, moves, waits."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from agent_harness import PATIENCE_S, QUICK, Kernel, Qemus, running_agent
from scripted_peer import session_with

from qmpballoon.agent import connector as connector_module
from qmpballoon.agent.context import TickSignal
from qmpballoon.agent.vm import ENDED_AFTER_S
from qmpballoon.agent.vm_session import VmSession, look_first
from qmpballoon.errors import QmpError
from qmpballoon.model.facts import Connection
from qmpballoon.model.health import BOOT_S, FIRST_SAMPLE_S
from qmpballoon.policy.schedule import VmSchedule
from qmpballoon.qmp.asked import Asked
from qmpballoon.sim.guest import Behaviour, GuestSpec
from qmpballoon.sim.qemu.faults import Faults
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.units import MIB

# ── every health word ───────────────────────────────────────────────────────────────────────────────────


async def test_a_sound_vm_is_ok_and_its_record_is_complete(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uuid = "9b1f6a0e-3d53-4a0e-8c3e-0123456789ab"
    qemu = await qemus.start("a", machine=MachineSpec(name="web 1", uuid=uuid))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        record = await harness.until_health("web_1", "ok")
        assert (record.name, record.uuid, record.qemu) == ("web 1", uuid, "7.2.22")
        assert (record.run_state, record.size, record.actual) == ("running", 256 * MIB, 256 * MIB)
        assert (record.limits.floor, record.limits.ceiling) == (64 * MIB, 256 * MIB)
        assert record.life is not None
        assert record.pid == record.life.pid
        assert record.driver_up
        assert record.answers
        assert record.balloon == 0
        assert record.sample is not None
        assert record.sample.stats.available == qemu.guest.available
        assert qemu.guest.polling_interval_s == QUICK.stats_interval_s
        assert "health" in harness.events_of("web_1")


@pytest.mark.parametrize("stops", [False, True])
async def test_what_was_asked_on_arrival_is_not_asked_again_unless_an_event_came(
    qemus: Qemus, sockets_dir: Path, stops: bool
) -> None:
    qemu = await qemus.start("a", machine=MachineSpec(name="web"))
    came = asyncio.Event()
    async with session_with(sockets_dir / "a.qmp", lambda name, details: came.set()) as session:
        first, (name,) = await look_first(session, Asked("query-name"))
        assert name == {"name": "web"}
        qemu.faults = Faults() if stops else Faults(refuse=frozenset(["query-status"]))
        if stops:
            qemu.execute("stop", {})
            await asyncio.wait_for(came.wait(), PATIENCE_S)
        vm = VmSession(session, None, stats_interval_s=1, clock=asyncio.get_running_loop().time, first=first)
        await vm.look()
        assert (vm.run_state, vm.size) == ("paused" if stops else "running", 256 * MIB)
        assert vm.resizer is not None
        assert first.answers == ()
        qemu.faults = Faults(refuse=frozenset(["query-status"]))
        with pytest.raises(QmpError, match="refused on purpose"):  # these answers are taken once
            await vm.look()


async def test_a_vm_behind_a_proxy_has_no_pid_no_rss_and_no_life(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    kernel.proxy(kernel.new_life(sockets_dir / "a.qmp", sockets_dir / "b.qmp"))  # one process serves both
    await qemus.start("a")
    await qemus.start("b")
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        for name in ("a", "b"):
            record = await harness.until_health(name, "ok")
            assert (record.pid, record.rss, record.life) == (None, None, None)
            guest = harness.vm(name).guest()
            assert guest is not None
            assert guest.rss is None


async def test_a_vm_whose_process_is_unknown_is_charged_until_it_is_offline_for_long(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    kernel.proxy(kernel.new_life(sockets_dir / "a.qmp"))
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        qemu.die()
        await harness.until_health("a", "offline")
        harness.later_s = ENDED_AFTER_S - 10
        harness.vm("a").check_life()
        guest = harness.vm("a").guest()
        assert guest is not None
        assert guest.charge == 256 * MIB
        harness.later_s = ENDED_AFTER_S + 1
        harness.vm("a").check_life()
        assert harness.vm("a").guest() is None


async def test_the_nil_uuid_is_no_uuid(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        assert (await harness.until_health("a", "ok")).uuid is None


async def test_offline_and_back(qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        qemu.die(unlink=True)
        record = await harness.until_health("a", "offline")
        assert not record.answers
        await qemus.start("a")
        await harness.until_health("a", "ok")


async def test_unresponsive_and_back(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    settings = replace(QUICK, qmp_timeout_s=0.5)
    async with running_agent(sockets_dir, monkeypatch, settings=settings) as harness:
        await harness.until_health("a", "ok")
        qemu.faults = Faults(silent_to=frozenset({"*"}))
        with harness.vm("a").watched():
            record = await harness.until_health("a", "unresponsive")
        assert not record.answers
        assert (record.run_state, record.actual, record.sample) == (None, None, None)
        assert record.size == 256 * MIB
        harness.healths.clear()
        qemu.faults = Faults()
        await harness.until_health("a", "ok")
        assert "offline" not in harness.healths


async def test_busy_until_the_other_client_disconnects(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connector_module, "LOOK_AT_SILENCE_S", 0.05)
    qemu = await qemus.start("a")
    settings = replace(QUICK, qmp_timeout_s=0.5)
    async with running_agent(sockets_dir, monkeypatch, settings=settings) as harness:
        await harness.until_health("a", "ok")
        async with AsyncExitStack() as holder:
            greeting = asyncio.create_task(holder.enter_async_context(session_with(qemu.path)))
            await asyncio.sleep(0)  # it waits in the backlog, and is next when the agent is disconnected
            qemu.drop_clients()
            await greeting
            assert not (await harness.until_health("a", "busy")).answers
        await harness.until_health("a", "ok")


async def test_no_balloon(qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await qemus.start("a", machine=MachineSpec(device=None))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        record = await harness.until_health("a", "no-balloon")
        assert record.answers
        assert (record.actual, record.sample, record.size) == (None, None, 256 * MIB)


async def test_migrating(qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = await qemus.start("a")
    qemu.set_migration("active")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "migrating")
        qemu.set_migration("completed")
        with harness.vm("a").watched():
            record = await harness.until_sampled("a", samples=2)
            assert record.health == "migrating"  # no event reports its end
            harness.later_s += 11  # it is queried every ten seconds
            record = await harness.until_sampled("a", samples=2)
            assert record.health == "ok"


async def test_paused_and_resumed(qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        qemu.execute("stop", {})
        assert (await harness.until_health("a", "paused")).run_state == "paused"
        qemu.execute("cont", {})
        assert (await harness.until_health("a", "ok")).run_state == "running"
        events = [word for word in harness.events_of("a") if word not in ("added", "health")]
        assert events == ["stopped", "resumed"]


async def test_starting_until_the_driver_and_its_samples_are_there(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    kernel.age_s = 1.0
    await qemus.start("a", guest=GuestSpec(boot_s=1.0), booted=False)
    async with running_agent(sockets_dir, monkeypatch, kernel, replace(QUICK, grace_s=600.0)) as harness:
        record = await harness.until_health("a", "starting")
        assert not record.driver_up
        await harness.until(lambda: harness.record("a").sample is not None)
        assert harness.health("a") == "starting"  # the grace time of fresh stats runs
        harness.later_s += 400
        with harness.vm("a").watched():
            await harness.until_sampled("a", samples=1)
            assert harness.health("a") == "starting"
            harness.later_s += 200
            await harness.until_health("a", "ok")


async def test_a_vm_that_ran_long_before_the_agent_needs_no_grace(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, settings=replace(QUICK, grace_s=600.0)) as harness:
        await harness.until_health("a", "ok")


@pytest.mark.parametrize("version", [(7, 2, 22), (11, 1, 3)])  # one is asked for the driver, one not
async def test_no_driver(
    version: tuple[int, int, int], qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    kernel.age_s = BOOT_S - 30
    await qemus.start("a", guest=GuestSpec(driver=False), machine=MachineSpec(version=version))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "starting")
        harness.later_s += 31
        with harness.vm("a").watched():
            record = await harness.until_health("a", "no-driver")
        assert not record.driver_up
        assert record.answers


async def test_no_stats(qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await qemus.start("a", guest=GuestSpec(statistics=False))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        assert (await harness.until_health("a", "no-stats")).driver_up


async def test_stale(qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        qemu.set_behaviour(Behaviour.FROZEN_STATS)
        harness.later_s += 6
        with harness.vm("a").watched():
            record = await harness.until_health("a", "stale")
            assert record.sample is not None  # with its age
            qemu.set_behaviour(Behaviour.IDEAL)
            await harness.until_health("a", "ok")


async def test_samples_of_a_host_that_slept_are_stale(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        qemu.set_behaviour(Behaviour.FROZEN_STATS)
        harness.vm("a").age_sample(100.0)
        harness.vm("a").touch()
        assert harness.health("a") == "stale"


# ── resets, plugged memory, other clients ───────────────────────────────────────────────────────────────────


async def test_a_reset_drops_the_figures_and_the_driver(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", guest=GuestSpec(boot_s=0.2))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        life = (await harness.until_health("a", "ok")).life
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        qemu.execute("system_reset", {})
        record = await harness.until_health("a", "starting")
        assert record.sample is None
        assert not record.driver_up
        assert not record.is_at(200 * MIB)  # although actual still has that value
        record = await harness.until_health("a", "ok")
        assert record.life == life
        assert record.target == 200 * MIB
        assert harness.events_of("a").count("reset") == 1  # QEMU sends it twice


async def test_plugged_memory_is_seen(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        qemu.plug(64 * MIB)
        assert (await harness.ask("a", "get"))["size"] == 320 * MIB
        assert harness.record("a").limits.ceiling == 320 * MIB


async def test_a_loaded_state_brings_its_own_target_and_the_manual_one_is_sent_again(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qmpballoon")
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, governed=True) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        assert qemu.guest.target == 200 * MIB
        qemu.load_state(240 * MIB)
        await harness.until(lambda: qemu.guest.target == 200 * MIB)
        await harness.until(lambda: harness.record("a").is_at(200 * MIB))
        assert harness.record("a").mode == "manual"
        assert not {"stuck", "uncooperative", "untrusted"} & set(harness.healths)
    assert len([line for line in caplog.messages if "target-forgotten" in line]) == 1


async def test_a_guest_that_is_stopped_and_continued_keeps_its_target(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qmpballoon")
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-target", target=200 * MIB)  # stopped while it moves
        qemu.execute("stop", {})
        await harness.until_health("a", "paused")
        qemu.execute("cont", {})
        await harness.until_health("a", "ok")
        await harness.until(lambda: harness.record("a").is_at(200 * MIB))
        assert harness.record("a").target == 200 * MIB
    assert "target-forgotten" not in caplog.text


async def test_an_automatic_target_that_a_killed_agent_had_not_saved_is_unknown_to_the_next(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    kernel = Kernel()
    kernel.new_life(qemu.path)
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        assert harness.record("a").mode == "auto"
        await harness.vm("a").send_target(200 * MIB, "give")
        await harness.until(lambda: harness.record("a").is_at(200 * MIB))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:  # all was saved
        await harness.until_health("a", "ok")
        assert harness.record("a").target == 200 * MIB
    qemu.guest.set_target(150 * MIB)  # sent, and not saved
    qemu.load_state(150 * MIB)
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        assert (harness.record("a").target, harness.record("a").actual) == (None, 150 * MIB)


async def test_a_balloon_that_was_replugged_while_the_agent_was_away_gets_the_manual_target_again(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, kernel, governed=True) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
    qemu.guest.set_target(256 * MIB)
    qemu.load_state(256 * MIB)
    async with running_agent(sockets_dir, monkeypatch, kernel, governed=True) as harness:
        await harness.until(lambda: qemu.guest.target == 200 * MIB)
        await harness.until(lambda: harness.record("a").is_at(200 * MIB))


async def test_a_target_of_another_client_is_seen_in_actual(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        qemu.execute("balloon", {"value": 255 * MIB})
        await harness.until(lambda: harness.record("a").actual == 255 * MIB)
        assert harness.record("a").target is None
        await harness.until(lambda: "balloon-change" in harness.events_of("a"))  # up to a second late


@pytest.mark.parametrize(
    "details", [{}, {"actual": -1}, {"actual": "1"}, {"actual": True}, {"actual": 2**60}]
)
async def test_an_absurd_balloon_event_changes_nothing(
    details: dict[str, object], qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        harness.vm("a").on_qmp_event("BALLOON_CHANGE", details)
        assert harness.record("a").actual == 256 * MIB
        assert "balloon-change" not in harness.events_of("a")


async def test_statistics_are_enabled_again_after_a_reconnect(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        life = (await harness.until_health("a", "ok")).life
        await harness.ask("a", "set-target", target=200 * MIB, wait_s=PATIENCE_S)
        qemu.guest.set_polling_interval(0)
        qemu.drop_clients()
        await harness.until_health("a", "offline")
        record = await harness.until_health("a", "ok")
        assert qemu.guest.polling_interval_s == QUICK.stats_interval_s
        assert (record.life, record.target) == (life, 200 * MIB)


async def test_an_unplugged_balloon_is_no_balloon(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        monkeypatch.setattr(qemu.machine, "spec", replace(qemu.machine.spec, device=None))
        harness.vm("a").on_qmp_event("DEVICE_DELETED", {})
        await harness.until_health("a", "no-balloon", "offline")
        record = await harness.until_health("a", "no-balloon")
        assert record.actual is None
        assert not record.driver_up


# ── limits ───────────────────────────────────────────────────────────────────────────────────────


async def test_limits_set_by_request_stay_within_those_of_the_file(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-limits", floor="100MiB", ceiling="90%", shares=5)
        qemu.die()
        kernel.new_life(qemus.path("a"))
        await qemus.start("a", guest=GuestSpec(size=128 * MIB))  # the same name, now smaller
        await harness.until(lambda: harness.record("a").size == 128 * MIB)
        limits = harness.record("a").limits
        assert limits.floor == 100 * MIB
        assert limits.ceiling == round(128 * MIB * 0.9)
        assert limits.overridden == ("floor", "ceiling", "shares")
        assert limits.shares == 5
    assert os.fspath(qemus.path("a")) in harness.store.sockets


# ── where QEMU is not asked for the driver ───────────────────────────────────────────────────────

UNASKED = MachineSpec(version=(11, 1, 3))  # which would abort on it


async def test_statistics_prove_a_driver_and_offered_features_count_as_negotiated(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a", machine=UNASKED, guest=GuestSpec(deflate_on_oom=True))
    await qemus.start("b", machine=UNASKED)
    async with running_agent(sockets_dir, monkeypatch) as harness:
        assert (await harness.until_health("a", "ok")).driver_up
        assert (await harness.until_health("b", "ok")).driver_up
        guests = {vm.id: vm.guest() for vm in harness.registry}
        assert {name: guest and guest.deflate_on_oom for name, guest in guests.items()} == {
            "a": True,
            "b": False,
        }


async def test_a_moving_balloon_proves_a_driver_that_reports_nothing(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", machine=UNASKED, guest=GuestSpec(statistics=False))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "no-driver")
        assert not harness.record("a").driver_up
        qemu.execute("balloon", {"value": 128 * MIB})
        await harness.until(lambda: harness.record("a").driver_up)
        await harness.until_health("a", "starting", "no-stats")
        guest = harness.vm("a").guest()
        assert guest is not None
        assert guest.charge < 256 * MIB


async def test_after_a_reset_the_driver_is_down_until_it_is_seen_again(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", machine=UNASKED)
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        qemu.execute("balloon", {"value": 128 * MIB})
        await harness.until(lambda: harness.record("a").actual == 128 * MIB)
        qemu.set_behaviour(Behaviour.NO_DRIVER)
        qemu.execute("system_reset", {})
        await harness.until_health("a", "starting")
        assert not harness.record("a").driver_up
        guest = harness.vm("a").guest()
        assert guest is not None
        assert guest.charge == 256 * MIB
        qemu.set_behaviour(Behaviour.IDEAL)
        await harness.until_health("a", "ok")
        assert harness.record("a").driver_up


async def test_a_late_driver_has_time_for_its_first_sample(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", machine=UNASKED, guest=GuestSpec(statistics=False))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "no-driver")
        harness.later_s += FIRST_SAMPLE_S + 1
        qemu.execute("balloon", {"value": 128 * MIB})
        await harness.until(lambda: harness.record("a").driver_up)
        assert harness.health("a") == "starting"


async def test_an_unloaded_driver_is_detected_when_the_balloon_empties(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", machine=UNASKED)
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        await harness.ask("a", "set-target", target=128 * MIB, wait_s=PATIENCE_S)
        qemu.set_behaviour(Behaviour.NO_DRIVER)
        harness.vm("a").on_qmp_event("BALLOON_CHANGE", {"actual": 256 * MIB})
        assert not harness.record("a").driver_up
        assert harness.record("a").sample is None


async def test_the_first_step_towards_a_target_is_no_unloaded_driver(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a", machine=UNASKED, guest=GuestSpec(behaviour=Behaviour.SLOW))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        was = list(harness.healths)
        await harness.ask("a", "set-target", target=128 * MIB, wait_s=PATIENCE_S)
        assert harness.healths == was


async def test_an_emergency_in_a_sample_of_a_request_asks_for_a_tick_at_once(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    calls: list[str] = []

    def sampled(self: VmSchedule, guest: object, settings: object) -> bool:
        calls.append("urgent")
        return True

    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        monkeypatch.setattr(VmSchedule, "sampled", sampled)
        monkeypatch.setattr(TickSignal, "at_once", lambda self: calls.append("tick"))
        for _ in range(3):
            await harness.vm("a").refreshed(timeout_s=PATIENCE_S)
    assert calls
    assert calls == ["urgent", "tick"] * (len(calls) // 2)


async def test_a_vm_whose_session_ended_is_offline_in_the_facts_before_the_reason_is_published(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        vm = harness.vm("a")
        calls: list[tuple[str, str]] = []
        original = vm.mark_unreachable

        def mark_unreachable(how: Connection, pid: int | None = None) -> None:
            calls.append((vm.facts.connection, vm.status.health))
            original(how, pid)

        monkeypatch.setattr(vm, "mark_unreachable", mark_unreachable)
        qemu.die(unlink=True)
        await harness.until_health("a", "offline")
        assert calls[0] == ("offline", "ok")
