"""`status`, `set` and `watch` as commands, against simulated QEMUs on real sockets."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from signalled import ended_by

from qmpballoon import api
from qmpballoon.cli import main, status, watch
from qmpballoon.cli import set as cli_set
from qmpballoon.cli.vms import Chosen
from qmpballoon.qmp import balloon
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.statistics import Sampler
from qmpballoon.sim.guest import Behaviour, GuestSpec
from qmpballoon.sim.qemu.faults import Babble, Faults
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]
WAIT_S = 20.0

VM_KEYS = {
    "name",
    "socket",
    "pid",
    "qemu",
    "run_state",
    "size",
    "actual",
    "balloon",
    "target",
    "held",
    "guest",
    "rss",
}


async def command(*argv: str) -> int:
    """Run the command line in a thread; this loop runs the simulated QEMUs."""
    async with asyncio.timeout(WAIT_S):
        return await asyncio.to_thread(main, argv)


def a_qemu(directory: Path, name: str = "web", **changed: Any) -> SimulatedQemu:
    """A simulated QEMU with a booted guest."""
    changed.setdefault("machine", MachineSpec(name=name))
    return SimulatedQemu(directory / f"{name}.qmp", **changed)


# ---- status ----


async def test_status_is_a_table_with_a_row_for_each_vm(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir, "web"), a_qemu(sockets_dir, "db", guest=GuestSpec(size=512 * MIB)):
        assert await command("status", f"{sockets_dir}/*.qmp") == 0
    header, db, web = capsys.readouterr().out.splitlines()
    assert header.split() == [
        *("NAME", "SIZE", "ACTUAL", "AVAILABLE", "FREE", "CACHES", "RSS", "AGE", "HEALTH")
    ]
    assert db.startswith("db    512 MiB  512 MiB")
    assert web.startswith("web   256 MiB  256 MiB")
    assert db.endswith("ok")
    assert web.endswith("ok")


async def test_status_as_json_has_every_key_and_bytes(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir) as qemu:
        assert await command("status", "--json", str(qemu.path)) == 0
    (vm,) = json.loads(capsys.readouterr().out)
    assert set(vm) == VM_KEYS | {"health", "mode", "agent", "error"}
    assert (vm["name"], vm["socket"], vm["health"], vm["error"]) == ("web", str(qemu.path), "ok", None)
    assert (vm["pid"], vm["size"], vm["actual"], vm["balloon"]) == (os.getpid(), 256 * MIB, 256 * MIB, 0)
    assert vm["target"] is None
    assert vm["guest"]["available"] > 0
    assert vm["guest"]["age_s"] >= 0


async def test_failing_vms_have_rows_and_reasons_and_the_good_one_is_shown(
    sockets_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "_FRESH_S", 0.2)
    async with AsyncExitStack() as stack:
        for qemu in (
            a_qemu(sockets_dir, "good"),
            a_qemu(sockets_dir, "mad", faults=Faults(babble=Babble.NOT_AN_OBJECT)),
            a_qemu(sockets_dir, "bare", machine=MachineSpec(name="bare", device=None)),
            a_qemu(sockets_dir, "halted", machine=MachineSpec(name="halted", stopped=True)),
        ):
            await stack.enter_async_context(qemu)
        dead = await stack.enter_async_context(a_qemu(sockets_dir, "dead"))
        dead.die()
        assert await command("status", "--timeout", "0.5", "--json", f"{sockets_dir}/*.qmp") == 0
        health = {vm["name"]: vm["health"] for vm in json.loads(capsys.readouterr().out)}
        assert await command("status", "--timeout", "0.5", f"{sockets_dir}/*.qmp") == 0
        table, _, reasons = capsys.readouterr().out.partition("\n\n")
    assert health == {
        "good": "ok",
        "mad": "unresponsive",
        "bare": "no-balloon",
        "halted": "paused",
        "dead": "offline",
    }
    assert "paused (prelaunch)" in table
    assert [line.partition(":")[0] for line in reasons.splitlines()] == ["bare", "dead", "mad"]
    assert "start QEMU with -device virtio-balloon-pci" in reasons


async def test_a_monitor_that_another_client_holds_is_busy(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir) as qemu, api.connect(qemu.path):
        assert await command("status", "--timeout", "0.3", "--json", str(qemu.path)) == 3
    (vm,) = json.loads(capsys.readouterr().out)
    assert (vm["health"], vm["error"]["code"]) == ("busy", "busy")
    assert vm["guest"]["available"] is None


async def test_status_distinguishes_no_driver_from_no_statistics(
    sockets_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "_FRESH_S", 0.2)
    monkeypatch.setattr(status, "age_of", lambda life: 1000.0)
    async with (
        a_qemu(sockets_dir, "silent", guest=GuestSpec(statistics=False)),
        a_qemu(sockets_dir, "bare", guest=GuestSpec(driver=False)),
    ):
        await command("status", "--json", f"{sockets_dir}/*.qmp")
    health = {vm["name"]: vm["health"] for vm in json.loads(capsys.readouterr().out)}
    assert health["silent"] == "no-stats"
    assert health["bare"] == "no-driver"


async def test_a_named_vm_that_is_offline_is_exit_3_and_one_of_a_glob_is_not(
    sockets_dir: Path, capsys: Capture
) -> None:
    async with a_qemu(sockets_dir, "web"), a_qemu(sockets_dir, "gone") as gone:
        gone.die()
        assert await command("status", f"{sockets_dir}/*.qmp") == 0
        assert await command("status", f"{sockets_dir}/*.qmp", str(gone.path)) == 3
        assert await command("status", f"{sockets_dir}/g*.qmp") == 3
    assert "offline" in capsys.readouterr().out


async def test_a_name_from_a_vm_cannot_move_the_cursor(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir, machine=MachineSpec(name="we\x1b[2Jb")) as qemu:
        await command("status", str(qemu.path))
    output = capsys.readouterr().out
    assert "we?[2Jb" in output
    assert "\x1b" not in output


# ---- set ----


async def test_set_sends_the_target_and_prints_it(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir) as qemu:
        assert await command("set", str(qemu.path), "50%") == 0
        assert qemu.guest.target == 128 * MIB
    assert capsys.readouterr() == ("web: 256 MiB -> 128 MiB asked for\n", "")


async def test_set_with_wait_returns_when_the_target_is_reached(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir) as qemu:
        assert await command("set", str(qemu.path), "160MiB", "--wait", "10", "--json") == 0
        assert qemu.guest.actual == 160 * MIB
    (done,) = json.loads(capsys.readouterr().out)
    assert (done["before"], done["target"], done["actual"]) == (256 * MIB, 160 * MIB, 160 * MIB)
    assert (done["reached"], done["error"]) == (True, None)
    assert done["guest"]["available"] > 0


async def test_set_that_is_not_reached_in_time_is_exit_4(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir, guest=GuestSpec(behaviour=Behaviour.STUCK)) as qemu:
        assert await command("set", str(qemu.path), "160MiB", "--wait", "0.2") == 4
        assert qemu.guest.target == 160 * MIB
    output = capsys.readouterr().err
    start = "qmpballoon: web is at 256 MiB after 0.2 s and did not reach 160 MiB: its balloon driver is slow"
    assert output.startswith(start)
    assert output.endswith("available in the guest; the target stays\n")


async def test_a_size_below_what_the_guest_holds_is_refused_with_the_least_safe_one(
    sockets_dir: Path, capsys: Capture
) -> None:
    async with a_qemu(sockets_dir) as qemu:
        assert await command("set", str(qemu.path), "40MiB", "--json") == 1
        assert qemu.guest.target == 256 * MIB
        captured = capsys.readouterr()
        (refused,) = json.loads(captured.out)
        assert refused["error"]["code"] == "not-allowed"
        assert "--force" in captured.err
        least = refused["error"]["least"]
        assert await command("set", str(qemu.path), str(least - MIB)) == 1
        assert await command("set", str(qemu.path), str(least)) == 0
        assert qemu.guest.target == -(-least // 4096) * 4096


async def test_a_balloon_that_moves_meanwhile_does_not_make_an_unsafe_size_safe(
    sockets_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The balloon inflates right after the sample: do not subtract its available from the new actual.
    async with a_qemu(sockets_dir, guest=GuestSpec(inflate_bytes_per_s=1e15)) as qemu:
        refresh = Sampler.refresh
        moved: list[int] = []

        async def refreshed(sampler: Sampler, *, timeout_s: float) -> bool:
            came = await refresh(sampler, timeout_s=timeout_s)
            if not moved:
                moved.append(qemu.guest.actual)
                qemu.execute("balloon", {"value": 156 * MIB})
                qemu.settle()
            return came

        monkeypatch.setattr(Sampler, "refresh", refreshed)
        holds = qemu.guest.actual - qemu.guest.available
        assert await command("set", str(qemu.path), str(holds), "--json") == 1
        (refused,) = json.loads(capsys.readouterr().out)
        assert moved == [256 * MIB]
        assert qemu.guest.actual == 156 * MIB
        assert abs(refused["error"]["least"] - (holds + 24 * MIB)) < MIB


async def test_a_balloon_that_keeps_moving_is_not_set_without_force(
    sockets_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_set, "_READ_AGAIN_S", 0.001)
    query_actual, calls = balloon.query_actual, itertools.count()

    async def moving(session: Session) -> int:
        return await query_actual(session) - next(calls) % 2 * 50 * MIB

    monkeypatch.setattr(balloon, "query_actual", moving)
    async with a_qemu(sockets_dir) as qemu:
        assert await command("set", str(qemu.path), "200MiB") == 1
        assert "its balloon is moving" in capsys.readouterr().err
        assert await command("set", str(qemu.path), "200MiB", "--force") == 0


async def test_force_sets_what_is_refused_without_it(sockets_dir: Path) -> None:
    async with a_qemu(sockets_dir) as qemu:
        assert await command("set", str(qemu.path), "40MiB", "--force") == 0
        assert qemu.guest.target == 40 * MIB


async def test_a_guest_without_statistics_is_not_shrunk_but_may_grow(
    sockets_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpballoon.cli.set._FRESH_S", 0.2)
    async with a_qemu(sockets_dir, guest=GuestSpec(statistics=False)) as qemu:
        assert await command("set", str(qemu.path), "200MiB") == 1
        assert qemu.guest.target == 256 * MIB
        assert "nobody knows how far it can shrink" in capsys.readouterr().err
        assert await command("set", str(qemu.path), "200MiB", "--force", "--wait", "10") == 0
        assert await command("set", str(qemu.path), "100%", "--wait", "10") == 0
        assert qemu.guest.actual == 256 * MIB


async def test_more_than_the_size_of_the_vm_is_wrong_usage(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir) as qemu:
        assert await command("set", str(qemu.path), "1GiB", "--force") == 2
    assert "1GiB is more than the VM's 256 MiB" in capsys.readouterr().err


async def test_a_glob_sets_all_and_exits_with_the_worst(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir, "a") as a, a_qemu(sockets_dir, "b") as b:
        b.die()
        assert await command("set", f"{sockets_dir}/*.qmp", "200MiB") == 3
        assert a.guest.target == 200 * MIB
    captured = capsys.readouterr()
    assert captured.out == "a: 256 MiB -> 200 MiB asked for\n"
    assert "nobody listens on this socket" in captured.err


async def test_setting_a_missing_vm_prints_what_to_do(sockets_dir: Path, capsys: Capture) -> None:
    assert await command("set", f"{sockets_dir}/x.qmp", "200MiB") == 3
    assert "no such socket; is the VM running, with -qmp unix:" in capsys.readouterr().err


# ---- watch ----


class Lines:
    """What `watch` has printed so far."""

    def __init__(self, capsys: Capture) -> None:
        self._capsys = capsys
        self.text = ""

    async def until(self, wanted: Callable[[list[str]], bool]) -> list[str]:
        async with asyncio.timeout(WAIT_S):
            while True:
                self.text += self._capsys.readouterr().out
                if wanted(self.text.splitlines()):
                    return self.text.splitlines()
                await asyncio.sleep(0.01)


def watching(*paths: Path, as_json: bool = True) -> asyncio.Task[None]:
    """Run `watch` in this loop; cancel the task as Ctrl-C does."""
    sockets = [Chosen(str(path), is_named=True) for path in paths]
    return asyncio.create_task(watch._watch_all(sockets, 0.05, as_json=as_json), name="watch")


async def stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,), timeout=WAIT_S)
    assert task.cancelled()


def events_of(lines: list[str]) -> list[str]:
    return [json.loads(line)["event"] for line in lines]


async def test_watch_streams_events_and_figures_of_several_vms(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir, "a") as a, a_qemu(sockets_dir, "b") as b:
        task, lines = watching(a.path, b.path), Lines(capsys)
        await lines.until(lambda output: events_of(output).count("stats") > 4)
        a.guest.set_target(200 * MIB)
        a.settle()
        output = await lines.until(lambda output: "balloon-change" in events_of(output))
        await stopped(task)
    seen = [json.loads(line) for line in output]
    assert {row["name"] for row in seen} == {"a", "b"}
    assert all(set(row) == {"ts", "name", "socket", "event", "data"} for row in seen)
    change = next(row for row in seen if row["event"] == "balloon-change")
    assert change["name"] == "a"
    stats = next(row for row in seen if row["event"] == "stats")
    assert set(stats["data"]) == VM_KEYS - {"name", "socket", "pid", "qemu"}


async def test_a_lost_vm_is_reported_once_and_reconnected(sockets_dir: Path, capsys: Capture) -> None:
    lines = Lines(capsys)
    async with a_qemu(sockets_dir) as qemu:
        task = watching(qemu.path)
        await lines.until(lambda output: "stats" in events_of(output))
        qemu.die()
        await lines.until(lambda output: "offline" in events_of(output))
    async with a_qemu(sockets_dir):
        output = await lines.until(lambda output: events_of(output).count("online") == 2)
        await stopped(task)
    reasons = [json.loads(line)["data"]["message"] for line in output if '"offline"' in line]
    assert len(reasons) == len(set(reasons)), "each reason is printed once"


async def test_watch_streams_the_events_of_a_vm_without_balloon(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir, machine=MachineSpec(name="bare", device=None)) as qemu:
        task, lines = watching(qemu.path, as_json=False), Lines(capsys)
        await lines.until(lambda output: any("no-balloon" in line for line in output))
        qemu.machine.execute("stop", {})
        qemu.settle()
        output = await lines.until(lambda output: any(" stopped" in line for line in output))
        await stopped(task)
    assert not [line for line in output if " stats " in line]


async def test_watch_prints_text_without_json(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir) as qemu:
        task, lines = watching(qemu.path, as_json=False), Lines(capsys)
        output = await lines.until(lambda output: any(" stats " in line for line in output))
        await stopped(task)
    assert "online" in output[0]
    assert "actual  256 MiB of 256 MiB" in next(line for line in output if " stats " in line)


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("tcp:192.0.2.1:4444", "--allow-remote"),
        ("tcp:127.0.0.1:4444,server=on", "must be the address alone: tcp:127.0.0.1:4444"),
        ("tcp::4444", "must be tcp:HOST:PORT"),
        ("127.0.0.1:4444", "or an address of TCP as tcp:127.0.0.1:4444"),
        ("[::1]:4444,server=on", "or an address of TCP as tcp:[::1]:4444"),
        ("telnet:127.0.0.1:4444,server=on", "or tcp:HOST:PORT"),
        ("@web,abstract=on", "must be @ and the name of an abstract socket"),
        ("@web*", "must be @ and the name of an abstract socket"),
        ("vsock:3:5000", "give QEMU a unix socket as well"),
        ("unix:/run/web.qmp,server=on", "must be the path alone: /run/web.qmp"),
        (".", " is a directory; name its sockets: '"),
    ],
)
@pytest.mark.parametrize("verb", [["status"], ["watch"], ["agent"]])
async def test_text_that_is_no_socket_path_is_refused_with_a_hint(
    verb: list[str], typed: str, reason: str, capsys: Capture
) -> None:
    assert await command(*verb, typed) == 2
    error = capsys.readouterr().err
    assert reason in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "typed", [("watch", "{}"), ("wait", "{}", "actual<1MiB"), ("set", "{}", "40MiB", "--force", "--wait")]
)
async def test_a_signal_ends_a_verb_that_restores_the_polling_interval(
    sockets_dir: Path, number: signal.Signals, typed: tuple[str, ...]
) -> None:
    async with a_qemu(sockets_dir, guest=GuestSpec(behaviour=Behaviour.STUCK)) as qemu:

        async def is_polled() -> None:
            while not qemu.guest.polling_interval_s:
                await asyncio.sleep(0.01)

        words = (word.format(qemu.path) for word in typed)
        assert await ended_by(number, *words, begun=is_polled) == (128 + number, b"")
        assert qemu.guest.polling_interval_s == 0


async def test_a_stopped_qemu_is_told_from_a_monitor_that_is_held_when_its_backlog_is_full(
    sockets_dir: Path, capsys: Capture
) -> None:
    path = str(sockets_dir / "web.qmp")
    qemu = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpballoon.sim.qemu", path), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert qemu.stdout is not None
        async with asyncio.timeout(WAIT_S):
            assert b"ready" in await qemu.stdout.readline()
        qemu.send_signal(signal.SIGSTOP)
        while is_connected_and_given_up(path):
            pass
        assert await command("status", path, "--timeout", "0.1", "--control=") == 3
        assert (
            f"QEMU (pid {qemu.pid}) is stopped; continue it: kill -CONT {qemu.pid}" in capsys.readouterr().out
        )
        assert await command("doctor", path, "--timeout", "0.1", "--control=", "--json") == 3
        (vm,) = json.loads(capsys.readouterr().out)["vms"]
        assert [finding["word"] for finding in vm["findings"]] == ["qemu-stopped"]
    finally:
        qemu.kill()
        await qemu.wait()


def is_connected_and_given_up(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as given_up:
        given_up.setblocking(False)
        return given_up.connect_ex(path) == 0


async def test_auto_needs_an_agent_and_nothing_to_wait_for(sockets_dir: Path, capsys: Capture) -> None:
    async with a_qemu(sockets_dir) as qemu:
        assert await command("set", str(qemu.path), "auto", "--control=") == 1
        assert await command("set", str(qemu.path), "auto", "--wait", "--control=") == 2
    without_agent, waits = capsys.readouterr().err.splitlines()
    assert "web: not set: no agent holds its monitor" in without_agent
    assert "--wait: waits until a size is reached" in waits
