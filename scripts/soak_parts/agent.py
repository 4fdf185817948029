"""The agent under test: a process with a configuration file that may be broken, a small disk and a clock."""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qmpballoon.lab.process import Program
from qmpballoon.lab.require import LabError
from soak_parts.wall_clock import WallClock

HOST_NAME: Final = "soak"
ROOT: Final = f"qmpballoon/{HOST_NAME}"
TREE: Final = Path(__file__).resolve().parents[2]
STOP_S: Final = 30.0  # a third of systemd's TimeoutStopSec; less than a second on an idle machine

_DISK: Final = "4m"  # of the state directory; the state of 200 VMs takes 100 KiB
_CLONE_NEWNS: Final = 0x00020000  # linux/sched.h
_MOUNT_S: Final = 10.0

_CONFIGURATION: Final = """\
[agent]
host = "{host}"
state_dir = "{directory}/state/agent"
[discovery]
sockets = ["{directory}/*.qmp"]
[mqtt]
url = "{url}"
heartbeat_s = {heartbeat_s}
[host]
budget = "{budget}B"
reserve = "64MiB"
[policy]
mode = "auto"
[vm]
shares = {shares}
"""
_BROKEN: Final = (
    "[agent\n",
    "[agnt]\nhost = 'x'\n",
    "[host]\nbudget = '-5MiB'\n",
    "[policy]\nmode = 'automatic'\n",
    "[mqtt]\nurl = 'http://nowhere'\n",
    "\x00\x01\x02",
    "[discovery]\nsockets = 7\n",
)


def own_mounts() -> bool:
    """Give this process mounts of its own, which end with it; tell whether that is possible.

    It has to be called before other threads and programs are started.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) != 0:
        return False
    done = subprocess.run(
        ["mount", "--make-rprivate", "/"], check=False, timeout=_MOUNT_S, stderr=subprocess.DEVNULL
    )
    return done.returncode == 0


@dataclass(frozen=True, slots=True)
class Use:
    """What the agent's process uses."""

    descriptors: int
    threads: int
    rss: int  # bytes


class Agent:
    """The agent's process, its files and its environment.

    ``has_disk``: its state directory may be a file system of its own (see `own_mounts`).
    """

    def __init__(self, directory: Path, url: str, budget: int, *, has_disk: bool) -> None:
        self.log = directory / "agent.log"
        self.file = directory / "agent.toml"
        self.should_run = False  # else its end is asked for
        self.has_disk = has_disk
        self.clock = WallClock(directory)
        self._directory = directory
        self._url = url
        self._budget = budget
        self._disk = directory / "state"
        self._program: Program | None = None
        self._good = self._text(1.0, 10, 1000)
        self._disk.mkdir()
        if has_disk:
            _mount(self._disk)
        self.write_good()

    # ---- life ----

    @property
    def program(self) -> Program:
        """The process of the current or the last run.

        Raises:
            LabError: never started.
        """
        if self._program is None:
            raise LabError("the agent was never started")
        return self._program

    def start(self) -> None:
        """Start it with a good configuration file."""
        self.write_good()
        environment = [f"PYTHONPATH={TREE}", "PYTHONUNBUFFERED=1", *self.clock.environment]
        command = [sys.executable, "-W", "error", "-m", "qmpballoon", "agent", "-c", str(self.file)]
        self.should_run = True
        self._program = Program(["env", *environment, *command], log=self.log)

    def kill(self) -> None:
        """SIGKILL, and reap."""
        self.should_run = False
        self.program.destroy()

    async def terminate(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop; return its exit status.

        Raises:
            LabError: it still runs after STOP_S.
        """
        self.should_run = False
        self.program.signal(number)
        return await self.program.ended(timeout_s=STOP_S)

    @property
    def takes_signals(self) -> bool:
        """Whether it runs and handles SIGTERM: before that a signal ends it without a trace."""
        if not self.should_run or self.program.exit_status is not None:
            return False
        caught = re.search(r"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{self.program.pid}/status").read_text())
        return caught is not None and bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

    @property
    def died(self) -> bool:
        """Whether it has ended though nobody asked for it."""
        return self.should_run and self.program.exit_status is not None

    def use(self) -> Use:
        """Return what it uses now.

        Raises:
            OSError: it has ended.
        """
        place = Path(f"/proc/{self.program.pid}")
        status = dict(
            line.split(":", 1) for line in place.joinpath("status").read_text().splitlines() if ":" in line
        )
        return Use(
            descriptors=len(os.listdir(place / "fd")),
            threads=int(status["Threads"]),
            rss=int(status["VmRSS"].split()[0]) * 1024,
        )

    def close(self) -> None:
        """End it, whatever state it is in."""
        self.should_run = False
        if self._program is not None:
            self._program.destroy()

    # ---- its surroundings ----

    def write_good(self) -> None:
        """Write the good configuration that is in force."""
        self.file.write_text(self._good)

    def write_other(self, rng: random.Random) -> bool:
        """Write another good configuration; tell whether it differs in what MQTT needs."""
        before = self._good
        heartbeat_s = rng.choice((10, 10, 20))
        self._good = self._text(rng.uniform(0.9, 1.1), heartbeat_s, rng.choice((500, 1000)))
        self.write_good()
        return f"heartbeat_s = {heartbeat_s}\n" not in before

    def write_broken(self, rng: random.Random) -> None:
        """Write a configuration that must be refused."""
        self.file.write_text(rng.choice((*_BROKEN, self._good + "[host]\n")))

    def fill_disk(self) -> None:
        """Fill the file system of the state directory."""
        with suppress(OSError), self._filler.open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))

    def free_disk(self) -> None:
        """Free the file system of the state directory."""
        self._filler.unlink(missing_ok=True)

    @property
    def _filler(self) -> Path:
        return self._disk / "filler"

    def _text(self, part: float, heartbeat_s: int, shares: int) -> str:
        return _CONFIGURATION.format(
            host=HOST_NAME,
            directory=self._directory,
            url=self._url,
            heartbeat_s=heartbeat_s,
            budget=int(self._budget * part),
            shares=shares,
        )


def unmount(directory: Path) -> None:
    """Unmount the file system of the state directory, if there is one."""
    place = directory / "state"
    if place.is_mount():
        subprocess.run(["umount", "-l", place], check=False, timeout=_MOUNT_S)


def _mount(place: Path) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", place], check=True, timeout=_MOUNT_S
    )
