"""The one-shot verbs against real guests; a second monitor of each QEMU checks the result."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from qmpballoon.api import connect
from qmpballoon.cli import main
from qmpballoon.lab.demo.run import run_demo
from qmpballoon.lab.demo.workload import BUDGET, SIZE
from qmpballoon.lab.lab import Lab
from qmpballoon.model.tolerance import is_reached
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]
WAIT_S = 180.0  # for what takes some seconds on an idle machine


async def command(*argv: str) -> int:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.to_thread(main, argv)


@asynccontextmanager
async def process(*argv: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run the program as a process, killed at the end if it still runs."""
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "qmpballoon",
        *argv,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(WAIT_S):
            yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


def errors_in(err: bytes) -> list[str]:
    """Return the lines on stderr, without those of asyncio's debug mode on a slow machine."""
    return [line for line in err.decode().splitlines() if not line.startswith("Executing <")]


async def test_status_shows_real_vms_in_whatever_state_they_are(lab: Lab, capsys: Capture) -> None:
    web = await lab.guest("web")
    await lab.empty_qemu("halted")
    await lab.empty_qemu("bare", balloon=None)
    hung = await lab.empty_qemu("hung")
    hung.stop()
    held = await lab.empty_qemu("held")
    async with connect(held.socket):
        argv = ("status", "--json", "--timeout", "5", f"{lab.directory}/*.qmp")
        assert await command(*argv) == 0
    seen = {vm["name"]: vm for vm in json.loads(capsys.readouterr().out)}
    assert {name: vm["health"] for name, vm in seen.items()} == {
        "web": "ok",
        "halted": "paused",
        "bare": "no-balloon",
        "hung": "unresponsive",
        "held": "busy",
    }
    assert seen["halted"]["run_state"] == "prelaunch"
    assert "kill -CONT" in seen["hung"]["error"]["message"]
    assert (seen["web"]["pid"], seen["web"]["size"]) == (web.pid, web.memory)
    memory = await web.guest_memory()
    assert abs(seen["web"]["guest"]["available"] - memory.available) < 16 * MIB


async def test_set_moves_a_real_balloon_and_keeps_the_guests_memory(lab: Lab, capsys: Capture) -> None:
    guest = await lab.guest("web", memory=192 * MIB)
    await guest.command("hold 60")
    assert await command("set", str(guest.socket), "160MiB", "--wait", "--json") == 0
    (done,) = json.loads(capsys.readouterr().out)
    assert (done["reached"], is_reached(done["actual"], 160 * MIB, guest.memory)) == (True, True)
    actual = await guest.monitor.until_actual((160 * MIB).__eq__, timeout_s=WAIT_S, what="the last of 32 MiB")

    assert await command("set", str(guest.socket), "64MiB", "--json") == 1
    (refused,) = json.loads(capsys.readouterr().out)
    assert await guest.monitor.actual() == actual
    least = refused["error"]["least"] + MIB  # what a guest holds moves by some pages all the time
    assert await command("set", str(guest.socket), str(least), "--wait") == 0
    memory = await guest.guest_memory()
    assert (memory.held, memory.oom_kills) == (60 * MIB, 0), "the least safe size is safe"


async def test_a_one_shot_verb_restores_what_it_changed(lab: Lab) -> None:
    guest = await lab.guest("web")
    before = await guest.monitor.actual()
    assert await command("status", str(guest.socket)) == 0
    path = await guest.monitor.balloon_path()
    interval = {"path": path, "property": "guest-stats-polling-interval"}
    assert await guest.monitor.execute("qom-get", interval) == 0
    assert await guest.monitor.actual() == before


async def test_watch_follows_a_restarted_qemu_and_ends_with_ctrl_c(lab: Lab) -> None:
    qemu = await lab.empty_qemu("web")
    async with process("watch", "--json", "--interval", "0.1", str(qemu.socket)) as watch:
        assert watch.stdout is not None
        seen: list[str] = []

        async def until(word: str) -> None:
            while word not in seen[-1:]:
                seen.append(json.loads(await watch.stdout.readline())["event"])  # type: ignore[union-attr]

        await until("stats")
        await qemu.monitor.execute("cont")
        await until("resumed")
        await qemu.kill()
        await until("offline")
        await qemu.start()
        await until("online")
        watch.send_signal(signal.SIGINT)
        _, err = await watch.communicate()
    assert (watch.returncode, errors_in(err)) == (130, [])


async def test_a_closed_pipe_ends_watch_without_an_error(lab: Lab) -> None:
    qemu = await lab.empty_qemu("web")
    reading, writing = os.pipe()
    watch = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpballoon", "watch", "--interval", "0.05", str(qemu.socket)),
        stdout=writing,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(writing)
    try:
        await asyncio.to_thread(os.read, reading, 1)
        os.close(reading)
        async with asyncio.timeout(WAIT_S):
            _, err = await watch.communicate()
        assert (watch.returncode, errors_in(err)) == (0, [])
    finally:
        if watch.returncode is None:
            watch.kill()
            await watch.wait()


def directory_of(output: str) -> Path:
    """Return the directory of the demo's files, as printed."""
    found = re.search(r"monitors\s+(/\S+)/NAME", output)
    assert found, output
    return Path(found[1])


def is_removed(directory: Path) -> bool:
    return len(directory.parts) > 2 and not directory.exists() and not list_processes(str(directory))


async def test_the_demo_prints_every_step_and_leaves_nothing_behind(
    guest_image: object, capsys: Capture
) -> None:
    async with asyncio.timeout(2 * WAIT_S):
        await run_demo(None, played_s=14.0)  # the first burst, which takes 9 s, and time for a busy machine
    output, err = capsys.readouterr()
    assert errors_in(err.encode()) == []
    assert "\x1b" not in output, "no colour where there is no terminal"
    for text in (
        "mosquitto listens on 127.0.0.1:",
        "booted in",
        "qmpballoon/demo/vm/web/state  ok, ",
        "web's workload grows to 100 MiB",
        "(give: other guests need the memory)",
        "second monitors read 119 MiB for each guest",
        "split equally, work was killed",
        "times the work",
        "< out-of-range: ",
        "offline on MQTT",
        "build's target is still 100 MiB",
        "the largest change of a balloon was 0 B",
        "mosquitto_pub -h 127.0.0.1",
    ):
        assert text in output
    within = re.search(r"within the budget after .* second monitors read ([0-9.]+) MiB in all", output)
    assert within
    assert float(within[1]) * MIB <= 1.01 * BUDGET
    moved = re.search(r"119 MiB -> ([0-9.]+) MiB; its second monitor reads ([0-9.]+) MiB", output)
    assert moved
    assert all(is_reached(int(float(seen) * MIB), 100 * MIB, SIZE) for seen in moved.groups())
    assert is_removed(directory_of(output))


async def test_a_terminated_demo_ends_what_it_started(guest_image: object) -> None:
    async with process("demo") as demo:
        assert demo.stdout is not None
        output = b""
        while b"QEMUs run" not in output:
            output += await demo.stdout.readline()
        directory = directory_of(output.decode())
        assert list_processes(str(directory))
        demo.send_signal(signal.SIGTERM)
        _, err = await demo.communicate()
    assert (demo.returncode, errors_in(err)) == (143, [])
    assert is_removed(directory)


async def test_ctrl_c_restores_the_terminal_from_the_live_picture(guest_image: object) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "", "LINES": "", "NO_COLOR": "1"}
    demo = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpballoon", "demo"), stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    shown = b""

    async def read_until(words: bytes) -> None:
        nonlocal shown
        while words not in shown:
            shown += await asyncio.to_thread(os.read, ours, 65536)

    try:
        async with asyncio.timeout(WAIT_S):
            await read_until(b"of 595")
            assert b"\x1b[?1049h" in shown
            assert b"\x1b[?1049l" not in shown
            assert not re.search(rb"\x1b\[[0-9;]*m", shown), "NO_COLOR is respected"
            demo.send_signal(signal.SIGINT)
            await read_until(b"\x1b[?1049l")
            await demo.wait()
    finally:
        if demo.returncode is None:
            demo.kill()
            await demo.wait()
        os.close(ours)
    assert demo.returncode == 130
    assert shown.endswith(b"\x1b[?25h\x1b[?1049l")
    assert is_removed(directory_of(shown.decode(errors="replace")))


def list_processes(words: str) -> list[str]:
    """Return the command lines of other processes that contain the words."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if words in line and place.parent.name != str(os.getpid()):
            found.append(line)
    return found
