"""The users and directories of examples/: an agent without a capability steers the QEMU of another user."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from agent_process import PATIENCE_S, until
from doc_pages import ROOT

from qmpballoon.control import connected_to, find_agents
from qmpballoon.lab.process import Program
from qmpballoon.units import MIB

EXAMPLES: Final = ROOT / "examples"
NEEDED: Final = ("systemd-sysusers", "systemd-tmpfiles", "setpriv", "qemu-system-x86_64")

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(program) is None for program in NEEDED),
    reason=f"needs root and {', '.join(NEEDED)}",
)


class Host:
    """A directory with the users and directories of examples/, as systemd makes them at boot."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.monitors = root / "run/qmpballoon"
        for kind in ("sysusers", "tmpfiles"):
            for name in ("qmpballoon", "vm"):
                at = root / f"usr/lib/{kind}.d/{name}.conf"
                at.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(EXAMPLES / f"{name}.{kind}", at)
        (root / "etc").mkdir()
        subprocess.run(["systemd-sysusers", f"--root={root}"], check=True, capture_output=True, timeout=30)
        rows = (line.split(":") for line in (root / "etc/passwd").read_text(encoding="utf-8").splitlines())
        self.ids = {row[0]: (int(row[2]), int(row[3])) for row in rows} | {"nobody": (65534, 65534)}
        # systemd-tmpfiles looks for names in an access list among the users of this machine, not of the root.
        made = root / "usr/lib/tmpfiles.d/vm.conf"
        text = made.read_text(encoding="utf-8").replace("user:vm:", f"user:{self.ids['vm'][0]}:")
        made.write_text(text, encoding="utf-8")
        done = subprocess.run(
            ["systemd-tmpfiles", f"--root={root}", "--create", "qmpballoon.conf", "vm.conf"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert done.stderr == ""

    def user(self, name: str) -> pwd.struct_passwd:
        """Return a user of the directory, as `pwd.getpwnam` does for those of this machine."""
        uid, gid = self.ids[name]
        return pwd.struct_passwd((name, "x", uid, gid, "", "/", "/usr/sbin/nologin"))

    def as_user(self, name: str) -> list[str]:
        """Return the words in front of a command that make it run as a user, without a capability."""
        uid, gid = self.ids[name]
        who = [f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        return ["setpriv", *who, "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


@pytest.fixture
def host(sockets_dir: Path) -> Host:
    sockets_dir.chmod(0o755)
    made = Host(sockets_dir)
    if subprocess.run(
        [*made.as_user("vm"), sys.executable, "-c", "import qmpballoon"], check=False
    ).returncode:
        pytest.skip("this tree may be read by its owner alone")
    return made


def listens(path: Path) -> bool:
    return path.exists() and stat.S_ISSOCK(path.stat().st_mode)


CONNECT: Final = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"


async def test_an_agent_without_rights_reaches_the_vm_of_another_user_who_cannot_reach_it(
    host: Host, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor, control, state = host.monitors / "web1.qmp", host.monitors / "agent.sock", sockets_dir / "state"
    state.mkdir()
    os.chown(state, *host.ids["qmpballoon"])
    machine = ["-S", "-m", "64", "-nodefaults", "-display", "none", "-device", "virtio-balloon-pci"]
    python = [sys.executable, "-W", "error"]
    agent_words = ["-m", "qmpballoon", "agent", str(monitor), "--state-dir", state, "--control", control]
    with contextlib.ExitStack() as stack:
        qemu = Program(
            [
                "sh",
                "-c",
                'umask 007; exec "$@"',
                "sh",
                *host.as_user("vm"),
                "qemu-system-x86_64",
                *machine,
                "-name",
                "web1",
                "-qmp",
                f"unix:{monitor},server=on,wait=off",
            ],
            log=sockets_dir / "qemu.log",
        )
        stack.callback(qemu.destroy)
        await until(lambda: listens(monitor), what="QEMU listens")
        agent = Program(
            [*host.as_user("qmpballoon"), *python, *map(str, agent_words)], log=sockets_dir / "agent.log"
        )
        stack.callback(agent.destroy)
        await until(lambda: listens(control), what="the agent listens")

        assert mode_of(monitor) == (*host.ids["vm"][:1], host.ids["qmpballoon"][1], 0o770)
        assert mode_of(control) == (*host.ids["qmpballoon"], 0o660)
        (row,) = await until(lambda: status(control), what="the agent lists the VM")
        assert (row["name"], row["health"], row["size"]) == ("web1", "paused", 64 * MIB)
        assert row["rss"] > MIB

        may_connect = [sys.executable, "-c", CONNECT]
        for user, path, is_allowed in (
            ("vm", control, False),
            ("nobody", monitor, False),
            ("nobody", control, False),
            ("qmpballoon", control, True),
        ):
            done = subprocess.run(
                [*host.as_user(user), *may_connect, str(path)],
                capture_output=True,
                text=True,
                check=False,
                timeout=30,
            )
            assert (done.returncode == 0) is is_allowed, (user, path, done.stderr)
            assert is_allowed or "PermissionError" in done.stderr
        removed = subprocess.run(
            [*host.as_user("vm"), "rm", "-f", str(control)], capture_output=True, check=False, timeout=30
        )
        assert removed.returncode != 0

        found = await find_agents()
        assert str(control) not in [one.path for one in found.running]
        assert any(f"{control}: belongs to user" in problem for problem in found.problems)
        monkeypatch.setattr("pwd.getpwnam", host.user)
        assert str(control) in [one.path for one in (await find_agents()).running]

        agent.signal(signal.SIGTERM)
        assert await agent.ended(timeout_s=PATIENCE_S) == 0


async def test_a_directory_that_may_not_be_read_is_told_and_not_taken_for_an_empty_one(
    host: Host, sockets_dir: Path
) -> None:
    closed, control = sockets_dir / "closed", host.monitors / "agent.sock"
    closed.mkdir(mode=0o700)
    python = [sys.executable, "-W", "error", "-m", "qmpballoon"]
    asked = subprocess.run(
        [*host.as_user("nobody"), *python, "status", f"{closed}/*.qmp", "--control", ""],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert asked.returncode != 0
    assert f"{closed}: this user may not read the directory" in asked.stderr
    words = ["agent", f"{closed}/*.qmp", "--state-dir", "", "--control", str(control)]
    log = sockets_dir / "agent.log"
    agent = Program([*host.as_user("qmpballoon"), *python, *words], log=log)
    try:
        await until(lambda: "socket-refused" in log.read_text(), what="it is logged")
        assert f"socket={closed}: the agent's user may not read this directory" in log.read_text()
        async with connected_to(str(control)) as client:
            answer = await client.request("agent")
        assert isinstance(answer, dict)
        assert answer["unidentified"] == [str(closed)]
        agent.signal(signal.SIGTERM)
        assert await agent.ended(timeout_s=PATIENCE_S) == 0
        assert log.read_text().count("socket-refused") == 1
    finally:
        agent.destroy()


def mode_of(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def status(control: Path) -> list[dict[str, Any]]:
    """Return what ``status --json`` prints, asked by root; none before the agent has the VM."""
    words = [sys.executable, "-m", "qmpballoon", "status", "--json", "--control", str(control)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    rows = [row for line in done.stdout.splitlines() for row in flat(json.loads(line))]
    return [row for row in rows if row.get("rss") is not None and row.get("health") != "starting"]


def flat(value: Any) -> list[dict[str, Any]]:
    return value if isinstance(value, list) else value.get("vms", [value])
