"""QEMUs that are seen from elsewhere: other namespaces, bind mounts, relative paths."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from agent_process import PATIENCE_S

import qmpballoon
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab

PID = ("unshare", "--pid", "--fork", "--mount-proc")
USER = ("unshare", "--user", "--map-root-user")
NETWORK = ("unshare", "--net")
ALL = ("unshare", "--pid", "--fork", "--mount-proc", "--net", "--ipc", "--uts", "--user", "--map-root-user")


async def run_in(namespace: tuple[str, ...], *command: str, cwd: Path | None = None) -> tuple[int, str, str]:
    """Run a command in namespaces of its own; skip the test where this process may not make them."""

    def run() -> subprocess.CompletedProcess[str]:
        if namespace and subprocess.run([*namespace, "true"], capture_output=True).returncode != 0:
            pytest.skip(f"{' '.join(namespace)} is not permitted here")
        return subprocess.run(
            [*namespace, *command], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE_S
        )

    done = await asyncio.to_thread(run)
    return done.returncode, done.stdout, done.stderr


def qmpballoon_command(*words: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "qmpballoon", *map(str, words))


async def status_in(namespace: tuple[str, ...], socket: object, cwd: Path | None = None) -> dict[str, Any]:
    code, printed, error = await run_in(
        namespace, *qmpballoon_command("status", "--json", "--timeout", "1", socket), cwd=cwd
    )
    assert printed, error
    [row] = json.loads(printed)
    return {**row, "code": code}


@pytest.mark.parametrize(
    ("namespace", "sees_pid"), [(PID, False), (USER, True), (NETWORK, True), (ALL, False)]
)
async def test_a_qemu_outside_of_the_own_namespaces(
    namespace: tuple[str, ...], sees_pid: bool, lab: Lab
) -> None:
    guest = await lab.guest("far")
    row = await status_in(namespace, guest.socket)
    assert (row["code"], row["name"], row["size"], row["health"]) == (0, "far", guest.memory, "ok")
    assert (row["pid"], row["rss"] is not None) == ((guest.pid, True) if sees_pid else (None, False))
    code, _, error = await run_in(
        namespace, *qmpballoon_command("set", guest.socket, "112MiB", "--wait", "30")
    )
    assert code == 0, error
    await guest.monitor.until_actual(
        (112 * 2**20).__eq__, timeout_s=PATIENCE_S, what="the last step of the move"
    )


async def test_a_qemu_in_a_container_of_its_own(lab: Lab, sockets_dir: Path) -> None:
    """The pid of a process in a namespace below is known by another number."""
    socket = sockets_dir / "inside.sock"
    qemu = ("qemu-system-x86_64", "-m", "64M", "-nodefaults", "-display", "none", "-device", "virtio-balloon")
    if (await run_in(ALL, "true"))[0] != 0:
        pytest.skip("no namespaces here")
    process = await asyncio.create_subprocess_exec(
        *ALL, "--kill-child", *qemu, "-qmp", f"unix:{socket},server=on,wait=off"
    )
    try:
        async with qmpballoon.connect(socket, timeout_s=PATIENCE_S, process=process) as vm:
            assert vm.pid is not None
            assert Path(f"/proc/{vm.pid}/comm").read_text().startswith("qemu-system")
            assert (await vm.state(fresh_s=0)).size == 64 * 2**20
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize("namespace", [(), PID, NETWORK, ALL])
async def test_a_held_monitor_seen_through_a_bind_mount(
    namespace: tuple[str, ...], lab: Lab, sockets_dir: Path
) -> None:
    guest = await lab.empty_qemu("web")
    place = sockets_dir / "mounted"
    place.mkdir()
    words = qmpballoon_command("status", "--json", "--timeout", "0.3", place / guest.socket.name)
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    mounting = ("sh", "-c", script, "sh", str(sockets_dir), str(place), *words)
    bound = (*(namespace or ("unshare",)), "--mount")
    code, printed, error = await run_in(bound, *mounting)
    assert (code, json.loads(printed)[0]["name"]) == (0, "web"), error
    async with qmpballoon.connect(guest.socket):
        for _ in range(4):
            code, printed, error = await run_in(bound, *mounting)
            assert (code, json.loads(printed)[0]["health"]) == (3, "busy"), error
    async with qmpballoon.connect(guest.socket, timeout_s=PATIENCE_S) as vm:
        assert vm.name == "web"


async def test_a_relative_path(lab: Lab, sockets_dir: Path) -> None:
    guest: LabGuest = await lab.empty_qemu("web")
    for typed in (guest.socket.name, f"./{guest.socket.name}", f"../{sockets_dir.name}/*.qmp"):
        row = await status_in((), typed, cwd=sockets_dir)
        assert (row["code"], row["name"], row["pid"]) == (0, "web", guest.pid)
