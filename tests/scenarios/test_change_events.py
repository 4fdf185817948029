"""An event tells each change of a VM or of the host that is no figure: names, mode, limits, policy, holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_harness import QUICK, AgentHarness, Kernel, Qemus, running_agent

from qmpballoon.config import DiscoverySettings, PolicySettings, VmMatch
from qmpballoon.errors import OutOfRange
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.units import MIB

CHANGES = {"added", "removed", "renamed", "mode", "limits", "policy", "hold"}


def changes(harness: AgentHarness) -> list[tuple[str | None, str, dict[str, Any]]]:
    """Return the events of changes since the last call: VM, word, data."""
    found: list[tuple[str | None, str, dict[str, Any]]] = [
        (vm, one.event, dict(one.data)) for vm, one in harness.events if one.event in CHANGES
    ]
    harness.events.clear()
    return found


async def test_a_vm_that_appears_is_added_once_and_not_again_after_a_restart_of_the_agent(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    kernel.new_life(qemus.path("a"))
    await qemus.start("a", machine=MachineSpec(name="web 1"))
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("web_1", "ok")
        assert changes(harness) == [("web_1", "added", {"name": "web 1", "socket": "a.qmp"})]
        await harness.store.saved()
    async with running_agent(sockets_dir, monkeypatch, kernel) as again:
        await again.until_health("web_1", "ok")
        assert changes(again) == []


async def test_a_vm_that_gets_another_name_is_renamed_and_nothing_else(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a", machine=MachineSpec(name="old"))
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("old", "ok")
        changes(harness)
        harness.reconfigure(replace(harness.configuration, matches=(VmMatch(name="old", rename="new"),)))
        await harness.until_health("new", "ok")
        assert changes(harness) == [("old", "renamed", {"from": "old", "to": "new"})]


async def test_a_vm_that_is_not_configured_any_more_is_removed(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        changes(harness)
        nothing = DiscoverySettings(sockets=(f"{sockets_dir}/b*.qmp",))
        harness.reconfigure(replace(harness.configuration, discovery=nothing))
        assert changes(harness) == [("a", "removed", {"why": "not-configured"})]


async def test_a_vm_that_is_gone_for_long_is_removed(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    life = kernel.new_life(qemus.path("a"))
    qemu = await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch, kernel) as harness:
        await harness.until_health("a", "ok")
        changes(harness)
        qemu.die()
        await harness.until_health("a", "offline")
        qemus.path("a").unlink()
        kernel.end_process(life)
        await harness.until(lambda: all(one.is_over for one in harness.supervisor._connectors.values()))
        harness.supervisor.forget_absent_vms()
        harness.later_s += 86_401
        harness.supervisor.forget_absent_vms()
        assert changes(harness) == [("a", "removed", {"why": "gone"})]


async def test_mode_and_limits_are_told_when_they_change(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        size = (await harness.until_health("a", "ok")).size
        changes(harness)
        await harness.ask("a", "set-mode", mode="auto")
        assert changes(harness) == []  # it was so before
        await harness.ask("a", "set-target", target=size)
        assert changes(harness) == [("a", "mode", {"from": "auto", "to": "manual"})]
        with pytest.raises(OutOfRange):
            await harness.ask("a", "set-target", target=1)
        assert changes(harness) == []
        await harness.ask("a", "set-limits", floor="50%", shares=7)
        floor = (size or 0) // 2
        data = {"floor": floor, "ceiling": size, "shares": 7, "overridden": ["floor", "shares"]}
        assert changes(harness) == [("a", "limits", data)]
        harness.reconfigure(replace(harness.configuration, vm=replace(QUICK, ceiling=QUICK.floor)))
        assert [word for _, word, _ in changes(harness)] == ["limits"]


async def test_policy_and_mode_of_the_host_and_the_modes_that_follow_are_told(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as harness:
        await harness.until_health("a", "ok")
        changes(harness)
        await harness.ask(None, "set-policy", name="fixed", mode="observe")
        assert changes(harness) == [
            (None, "policy", {"from": "fairshare", "to": "fixed"}),
            (None, "mode", {"from": "auto", "to": "observe"}),
            ("a", "mode", {"from": "auto", "to": "observe"}),
        ]
        await harness.ask(None, "set-policy", name="fixed")
        assert changes(harness) == []


async def test_the_begin_and_end_of_a_hold_are_told(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manual = PolicySettings(mode="manual")
    async with running_agent(sockets_dir, monkeypatch, governed=True, policy=manual) as harness:
        await harness.until(lambda: harness.hosts)
        result = await harness.ask(None, "reclaim", size=MIB, deadline_s=0)
        hold = {"hold": result["hold"], "size": MIB}
        assert changes(harness) == [(None, "hold", {**hold, "change": "taken"})]
        await harness.ask(None, "release", hold=result["hold"])
        assert changes(harness) == [(None, "hold", {**hold, "change": "released"})]
        await harness.ask(None, "reclaim", size=MIB, deadline_s=0, hold_s=0)
        await harness.until(lambda: any(one.data.get("change") == "expired" for _, one in harness.events))
        assert [data["change"] for _, _, data in changes(harness)] == ["taken", "expired"]
