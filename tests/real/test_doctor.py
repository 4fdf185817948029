"""`doctor` on real QEMUs, each started so that it has what is to be found."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
from agent_process import AgentWatch, StartAgent, until
from both_qemus import installed_version
from played_driver import DEFLATE_ON_OOM, FIGURE, REPORTING, STATISTICS, played_driver
from recorded_commands import recorded_commands
from test_huge_pages import POOL

from qmpballoon.api import connect
from qmpballoon.cli import main
from qmpballoon.control import connected_to
from qmpballoon.doctor.host_rules import HOST_RULES
from qmpballoon.doctor.vm_rules import VM_RULES
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import BalloonDevice, LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.procfs import rss_of
from qmpballoon.qmp.commands import DRIVER_STATUS, may_be_sent
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]
WAIT_S = 180.0  # for what takes some seconds on an idle machine
GOOD = BalloonDevice(deflate_on_oom=True, free_page_reporting=True)
INTERVAL = "guest-stats-polling-interval"


async def command(*argv: str) -> int:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.to_thread(main, argv)


async def examined(capsys: Capture, *argv: str, code: int = 0) -> dict[str, Any]:
    """Run ``doctor --json``; return what it printed."""
    assert await command("doctor", "--json", *argv) == code
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


async def findings_of(capsys: Capture, socket: Path, *, code: int = 0) -> dict[str, dict[str, str]]:
    """Examine one VM; return its findings by their words."""
    (vm,) = (await examined(capsys, str(socket), code=code))["vms"]
    return {finding["word"]: finding for finding in vm["findings"]}


# ---- QEMUs without a guest ----

MEMORY = "id=ram0,size=64M"


TELLS_SHARED = installed_version() >= (6, 1, 0)


@pytest.mark.parametrize(
    ("balloon", "arguments", "words"),
    [
        (GOOD, (), []),
        (None, (), ["no-balloon"]),
        (BalloonDevice(free_page_reporting=True), (), ["deflate-on-oom-off"]),
        (BalloonDevice(deflate_on_oom=True), (), ["free-page-reporting-off"]),
        (GOOD, ("-overcommit", "mem-lock=on"), ["locked-memory"]),
        (GOOD, ("-object", f"memory-backend-ram,{MEMORY},prealloc=on"), ["preallocated"]),
        (GOOD, ("-object", f"memory-backend-memfd,{MEMORY},share=on"), ["shared-memory"]),
        (GOOD, ("-object", f"memory-backend-file,{MEMORY},share=on,mem-path=/dev/shm"), ["shared-memory"]),
        (GOOD, ("-object", f"memory-backend-file,{MEMORY},mem-path=/dev/shm"), ["private-file"]),
        (GOOD, ("-mem-path", "/dev/shm", "-mem-prealloc"), ["private-file", "preallocated"]),
    ],
)
async def test_each_trouble_of_a_qemu_is_found(
    lab: Lab, capsys: Capture, balloon: BalloonDevice | None, arguments: tuple[str, ...], words: list[str]
) -> None:
    if "-object" in arguments:
        arguments += ("-machine", "memory-backend=ram0")
    if "mem-lock=on" in arguments and os.geteuid() != 0:
        pytest.skip("only root may lock so much memory")
    qemu = await lab.empty_qemu("web", memory=64 * MIB, balloon=balloon, arguments=arguments)
    found = await findings_of(capsys, qemu.socket)
    if not TELLS_SHARED:
        words = [word for word in words if word not in ("shared-memory", "private-file")]
    assert list(found) == [*words, "paused"]
    assert qemu.program.exit_status is None


@pytest.mark.skipif(not os.access(POOL, os.W_OK), reason="only root may reserve huge pages")
async def test_huge_pages_are_found(lab: Lab, capsys: Capture) -> None:
    pages = 64 // 2
    POOL.write_text(str(int(POOL.read_text()) + pages))
    try:
        backend = f"memory-backend-memfd,{MEMORY},hugetlb=on,hugetlbsize=2M"
        arguments = ("-object", backend, "-machine", "memory-backend=ram0")
        qemu = await lab.empty_qemu("web", memory=64 * MIB, balloon=GOOD, arguments=arguments)
        found = await findings_of(capsys, qemu.socket)
        await qemu.kill()
    finally:
        POOL.write_text(str(max(0, int(POOL.read_text()) - pages)))
    assert "64 MiB" in found["huge-pages"]["seen"]


@pytest.mark.skipif(installed_version() < (6, 1, 0), reason="this QEMU reserves the memory at once")
async def test_a_vm_larger_than_the_host_is_found(lab: Lab, capsys: Capture) -> None:
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = (host // MIB + 1024) // 128 * 128 * MIB
    backend = f"memory-backend-ram,id=ram0,size={size},reserve=off"
    arguments = ("-object", backend, "-machine", "memory-backend=ram0")
    qemu = await lab.empty_qemu("web", memory=size, balloon=GOOD, arguments=arguments)
    assert "larger-than-host" in await findings_of(capsys, qemu.socket)


async def test_a_pretty_monitor_and_a_human_one_are_found(lab: Lab, capsys: Capture) -> None:
    pretty, human = lab.directory / "pretty.sock", lab.directory / "human.sock"
    arguments = (
        *("-chardev", f"socket,id=pretty,path={pretty},server=on,wait=off"),
        *("-mon", "chardev=pretty,mode=control,pretty=on"),
        *("-monitor", f"unix:{human},server=on,wait=off"),
    )
    qemu = await lab.empty_qemu("web", balloon=GOOD, arguments=arguments)
    assert "pretty-monitor" in await findings_of(capsys, pretty)
    assert list(await findings_of(capsys, human, code=3)) == ["human-monitor"]
    assert "pretty-monitor" not in await findings_of(capsys, qemu.socket)


async def test_who_holds_a_busy_monitor_is_found(lab: Lab, capsys: Capture) -> None:
    qemu = await lab.empty_qemu("web")
    async with connect(qemu.socket):
        busy = await findings_of(capsys, qemu.socket, code=3)
    assert f"(pid {os.getpid()})" in busy["monitor-busy"]["seen"]


async def test_a_stopped_qemu_and_one_that_has_ended_are_found(lab: Lab, capsys: Capture) -> None:
    qemu = await lab.empty_qemu("web")
    qemu.stop()
    stopped = await findings_of(capsys, qemu.socket, code=3)
    assert stopped["qemu-stopped"]["mend"] == f"`kill -CONT {qemu.pid}`"
    await qemu.kill()
    assert list(await findings_of(capsys, qemu.socket, code=3)) == ["not-reached"]


async def test_a_proxy_hides_the_process(lab: Lab, capsys: Capture, sockets_dir: Path) -> None:
    qemu = await lab.empty_qemu("web", balloon=GOOD, memory=4096 * MIB)  # more than this process has
    async with recorded_commands(qemu.socket, sockets_dir / "proxy"):
        assert "process-unseen" in await findings_of(capsys, sockets_dir / "proxy")


# ---- Linux guests ----


async def test_a_good_guest_has_no_findings_and_is_left_as_it_was(lab: Lab, capsys: Capture) -> None:
    guest = await lab.guest("web", balloon=GOOD)
    device = {"path": await guest.monitor.balloon_path(), "property": INTERVAL}
    await guest.monitor.execute("qom-set", {**device, "value": 7})
    before = await guest.monitor.actual()
    version = await guest.monitor.version()
    (vm,) = (await examined(capsys, str(guest.socket)))["vms"]
    assert vm["findings"] == []
    asked = may_be_sent(DRIVER_STATUS, version)
    assert vm["can"] == {
        "balloon": True,
        "driver": True,
        "statistics": True,
        "deflate_on_oom": "on" if asked else "offered",
        "free_page_reporting": "on" if asked else "offered",
        "frees": True,
    }
    assert len(vm["not_told"]) == (not asked) + (not TELLS_SHARED)
    assert await guest.monitor.execute("qom-get", device) == 7
    assert await guest.monitor.actual() == before


async def test_strict_fails_on_errors_and_warnings_and_not_on_notes(lab: Lab, capsys: Capture) -> None:
    guest = await lab.guest("web", balloon=BalloonDevice(deflate_on_oom=True))
    code = await command("doctor", "--strict", "--json", str(guest.socket))
    printed = json.loads(capsys.readouterr().out)
    assert [finding["severity"] for finding in printed["vms"][0]["findings"]] == ["note"]
    assert code == any(finding["severity"] != "note" for finding in printed["host"]["findings"])


@pytest.mark.parametrize(
    ("arguments", "frees"),
    [
        ((), True),
        (
            ("-object", "memory-backend-memfd,id=ram0,size=128M,share=on", "-machine", "memory-backend=ram0"),
            True,
        ),
        (("-overcommit", "mem-lock=on"), False),
    ],
)
async def test_a_balloon_frees_host_memory_where_it_is_said(
    lab: Lab, capsys: Capture, arguments: tuple[str, ...], frees: bool
) -> None:
    if not frees and os.geteuid() != 0:
        pytest.skip("only root may lock so much memory")
    balloon = BalloonDevice(deflate_on_oom=True)  # no free pages are reported before they are taken
    guest = await lab.guest("web", fresh=True, balloon=balloon, arguments=arguments)
    await guest.command("hold 60")
    await guest.command("hold 0")
    before = rss_of(guest.pid)
    await guest.monitor.set_target(72 * MIB)
    await guest.monitor.until_actual((72 * MIB).__eq__, timeout_s=WAIT_S, what="56 MiB are given")
    after = rss_of(guest.pid)
    assert before is not None
    assert after is not None
    assert (before - after > 24 * MIB) == frees, (before, after)
    (vm,) = (await examined(capsys, str(guest.socket)))["vms"]
    assert vm["can"]["frees"] == frees


async def test_a_guest_without_a_driver_is_found(lab: Lab, capsys: Capture) -> None:
    guest = await lab.guest("web", balloon=GOOD, driver=False)
    found = await findings_of(capsys, guest.socket)
    assert list(found) == ["no-driver"]
    assert "after QEMU's start" in found["no-driver"]["seen"]


async def test_swap_that_is_not_told_is_found_without_deflate_on_oom(lab: Lab, capsys: Capture) -> None:
    guest = await lab.guest("web")
    found = await findings_of(capsys, guest.socket)
    assert list(found) == ["deflate-on-oom-off", "free-page-reporting-off", "guest-swap-unseen"]
    assert await command("doctor", "--strict", str(guest.socket)) == 1


async def test_only_listed_commands_are_sent(lab: Lab, sockets_dir: Path, capsys: Capture) -> None:
    guest = await lab.guest("web", balloon=GOOD)
    async with recorded_commands(guest.socket, sockets_dir / "proxy") as sent:
        await findings_of(capsys, sockets_dir / "proxy")
    assert "query-memdev" in sent
    assert "balloon" not in sent
    assert (DRIVER_STATUS in sent) == may_be_sent(DRIVER_STATUS, await guest.monitor.version())
    assert guest.program.exit_status is None


async def test_a_sick_vm_delays_no_other(lab: Lab, capsys: Capture) -> None:
    good = await lab.guest("good", balloon=GOOD)
    hung = await lab.empty_qemu("hung")
    async with connect(hung.socket):  # it greeted, and then answers nothing
        pass
    hung.stop()
    printed = await examined(capsys, str(good.socket), str(hung.socket), code=3)
    assert [vm["name"] for vm in printed["vms"]] == ["hung", "good"]
    assert [finding["word"] for vm in printed["vms"] for finding in vm["findings"]] == ["qemu-stopped"]


# ---- drivers that a test plays ----

ALL = STATISTICS | DEFLATE_ON_OOM | REPORTING


@pytest.mark.parametrize(
    ("features", "sample", "words"),
    [
        (ALL, b"\0", ["no-service"]),  # as Windows without its service
        (ALL, None, ["no-statistics"]),
        (DEFLATE_ON_OOM | REPORTING, None, ["no-statistics"]),
        (STATISTICS | REPORTING, FIGURE, ["no-statistics", "deflate-on-oom-refused", "guest-swap-unseen"]),
        (STATISTICS | DEFLATE_ON_OOM, FIGURE, ["no-statistics", "free-page-reporting-refused"]),
    ],
)
async def test_each_trouble_of_a_driver_is_found(
    lab: Lab, capsys: Capture, features: int, sample: bytes | None, words: list[str]
) -> None:
    async with played_driver(lab.directory) as driver:
        await driver.load(features)
        if sample is not None:
            await driver.send_statistics(sample)
        (vm,) = (await examined(capsys, str(driver.path)))["vms"]
    found = [finding["word"] for finding in vm["findings"]]
    if may_be_sent(DRIVER_STATUS, vm["qemu"]):
        assert found == words
    elif sample is None:  # then nothing tells that there is a driver
        assert found == ["no-driver"]
    else:
        assert found == [word for word in words if not word.endswith(("-refused", "-unseen"))]


# ---- through an agent ----


async def test_an_agent_tells_the_same_over_mqtt_and_to_the_command_line(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent, capsys: Capture
) -> None:
    guest = await lab.guest("web", balloon=BalloonDevice(free_page_reporting=True))
    await lab.empty_qemu("bare", balloon=None)
    agent = start_agent(broker)
    await watch.until_health("web", "ok")
    await watch.until_health("bare", "no-balloon")
    before = await interval_of(guest)
    told = await watch.do("web", "doctor")
    assert [finding["word"] for finding in told["findings"]] == ["deflate-on-oom-off", "guest-swap-unseen"]
    bare = await watch.do("bare", "doctor")
    assert [finding["word"] for finding in bare["findings"]] == ["no-balloon", "paused"]
    assert await watch.refused("nobody", "doctor") == "unknown-vm"
    host = await watch.do(None, "doctor")
    assert set(host) == {"findings", "not_told"}
    assert await interval_of(guest) == before

    control = f"--control={agent.state_dir}/agent.sock"
    printed = await examined(capsys, control)
    vms = {vm["name"]: vm for vm in printed["vms"]}
    assert vms["web"]["agent"] == vms["bare"]["agent"] == "edge-7"
    assert {key: vms["web"][key] for key in told} == told
    assert words_of(printed["host"]) == words_of(host)
    assert await command("doctor", control, "web") == 0
    assert "1 through the agent edge-7" in capsys.readouterr().out


def words_of(told: dict[str, Any]) -> list[str]:
    """Return the words of findings, without that of other agents that run on this machine."""
    return [finding["word"] for finding in told["findings"] if finding["word"] != "several-agents"]


async def interval_of(guest: LabGuest) -> object:
    device = {"path": await guest.monitor.balloon_path(), "property": INTERVAL}
    return await guest.monitor.execute("qom-get", device)


async def test_an_agent_tells_who_holds_a_monitor_and_which_qemu_is_stopped(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    qemu = await lab.empty_qemu("web", balloon=GOOD)
    agent = start_agent(broker)
    await watch.until_health("web", "paused")
    qemu.stop()
    await watch.until_health("web", "unresponsive")
    (stopped,) = (await watch.do("web", "doctor"))["findings"]
    assert stopped["mend"] == f"`kill -CONT {qemu.pid}`"
    qemu.cont()
    await watch.until_health("web", "paused")
    assert await agent.terminate() == 0
    async with connect(qemu.socket):
        agent.start()
        await watch.until_health("web", "busy")
        (busy,) = (await watch.do("web", "doctor"))["findings"]
        assert busy["word"] == "monitor-busy"
        assert f"(pid {os.getpid()})" in busy["seen"]
    await watch.until_health("web", "paused")
    await qemu.kill()
    await watch.until_health("web", "offline")
    (offline,) = (await watch.do("web", "doctor"))["findings"]
    assert offline["word"] == "not-reached"


async def host_words(control: Path) -> dict[str, str]:
    """Ask an agent about its host; return what was seen, by word."""
    async with connected_to(str(control)) as client:
        told = await client.request("doctor", timeout_s=WAIT_S)
    assert isinstance(told, dict)
    return {finding["word"]: finding["seen"] for finding in told["findings"]}


async def test_what_only_an_agent_knows_of_its_host_is_found(lab: Lab, start_agent: StartAgent) -> None:
    await lab.empty_qemu(
        "web", balloon=GOOD, arguments=("-monitor", f"unix:{lab.directory}/human.qmp,server=on,wait=off")
    )
    limit = ("prlimit", "--nofile=90:90")
    agent = start_agent(None, before=limit, host={"budget": "32MiB"}, vm={"floor": "100%"})
    other = start_agent(
        None,
        name="other",
        agent={"state_dir": str(lab.directory / "other"), "host": "edge-8"},
        discovery={"sockets": []},
    )
    await agent.until_logged("health vm=web")
    await agent.until_logged("socket-not-qmp")
    await other.until_logged("agent-started")
    await until(lambda: (other.directory / "other" / "agent.sock").exists(), what="the other agent listens")
    found = await host_words(agent.state_dir / "agent.sock")
    assert found["floors-over-budget"] == "the floors of all VMs together are 64 MiB, the budget is 32 MiB"
    assert "may open 90 files" in found["few-descriptors"]
    assert str(lab.directory / "other" / "agent.sock") in found["several-agents"]
    assert found["socket-unidentified"].startswith(f"{lab.directory}/human.qmp: ")
    assert "several-agents" in await host_words(lab.directory / "other" / "agent.sock")


def test_the_words_of_both_tables_are_distinct() -> None:
    words = [rule.word for rule in VM_RULES] + [rule.word for rule in HOST_RULES]
    assert len(words) == len(set(words))
