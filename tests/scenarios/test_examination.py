"""The request `doctor` of an agent whose QEMUs are simulated: findings, and sick VMs beside good ones."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_harness import QUICK, AgentHarness, Kernel, Qemus, running_agent

from qmpballoon.errors import RequestRefused
from qmpballoon.sim.guest import Behaviour, GuestSpec
from qmpballoon.sim.qemu.faults import Faults
from qmpballoon.sim.qemu.machine import MachineSpec

GOOD = GuestSpec(deflate_on_oom=True, free_page_reporting=True)
PATIENT = replace(QUICK, qmp_timeout_s=30.0)


async def words(harness: AgentHarness, vm: str | None) -> list[str]:
    told: dict[str, Any] = await harness.ask(vm, "doctor")
    return [finding["word"] for finding in told["findings"]]


async def test_each_vm_has_its_own_findings(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("good", guest=GOOD)
    await qemus.start("gpu", guest=GOOD, machine=MachineSpec(name="gpu", devices=(("gpu", "vfio-pci"),)))
    await qemus.start("windows", guest=replace(GOOD, service=False))
    await qemus.start("mute", guest=replace(GOOD, statistics=False))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        for vm in ("good", "gpu"):
            await harness.until_health(vm, "ok")
        await harness.until(lambda: harness.health("windows") is not None)
        await harness.until(lambda: harness.health("mute") is not None)
        await harness.until(lambda: harness.record("windows").sample is not None)
        await harness.until_health("mute", "no-stats", "starting")
        assert await words(harness, "good") == []
        assert await words(harness, "gpu") == ["vfio"]
        assert await words(harness, "windows") == ["no-service"]
        assert await words(harness, "mute") == ["no-statistics"]
        with pytest.raises(RequestRefused, match="no VM is called nobody"):
            await harness.ask("nobody", "doctor")
        host = await harness.ask(None, "doctor")
        assert set(host) == {"findings", "not_told"}


async def test_statistics_that_stopped_are_found(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a", guest=GOOD)
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        assert await words(harness, "a") == []
        qemu.set_behaviour(Behaviour.FROZEN_STATS)
        harness.later_s = 60.0
        await harness.until_health("a", "stale")
        told = await harness.ask("a", "doctor")
        assert [finding["seen"] for finding in told["findings"]] == [
            "statistics came, and none come any more"
        ]
        assert (told["can"]["driver"], told["can"]["statistics"]) == (True, False)


async def test_a_vm_that_answers_nothing_delays_no_other(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sick = await qemus.start("sick", guest=GOOD, faults=Faults())
    await qemus.start("well", guest=GOOD)
    async with running_agent(sockets_dir, monkeypatch, settings=PATIENT) as harness:
        await harness.until_health("sick", "ok")
        await harness.until_health("well", "ok")
        sick.faults.silent_to = frozenset({"query-memdev"})
        asked = asyncio.create_task(words(harness, "sick"))
        assert await words(harness, "well") == []
        assert not asked.done()
        sick.die()
        assert await asked == ["not-reached"]


async def test_a_vm_without_a_session_is_told_as_far_as_it_is_known(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    qemu = await qemus.start("a", guest=GOOD)
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        qemu.die()
        await harness.until_health("a", "offline", "unresponsive")
        told = await harness.ask("a", "doctor")
        assert [finding["word"] for finding in told["findings"]] == ["not-reached"]
        assert set(told["can"].values()) == {None}
