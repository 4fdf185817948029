"""Limits a process to a part of a core: by a control group, else by SIGSTOP and SIGCONT in turns."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

PERIOD_S: Final = 0.1  # the default period of both versions of control groups

_ROOT: Final = Path("/sys/fs/cgroup")


class Limit:
    """A limit in force; ``before`` is the start of the command line of the process that it limits."""

    def __init__(self, share: float, group: Path | None) -> None:
        self.before: tuple[str, ...] = ()
        self._share = share
        self._group = group
        self._turns: asyncio.Task[None] | None = None
        if group is not None:
            enter = 'echo $$ >"$0" && exec "$@"'
            self.before = ("sh", "-c", enter, str(group / "cgroup.procs"))

    @property
    def means(self) -> str:
        """How the process is limited."""
        return "SIGSTOP and SIGCONT in turns" if self._group is None else "a cpu cgroup"

    def apply(self, pid: int) -> None:
        """Limit this process, if it is not in the control group already."""
        if self._group is None:
            self._turns = asyncio.create_task(self._take_turns(pid), name="turns")

    async def lift(self, pid: int) -> None:
        """Remove the limit: the process may end quickly."""
        if self._group is not None:
            _set_quota(self._group, None)
        elif self._turns is not None:
            self._turns.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._turns
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    async def _take_turns(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(PERIOD_S * (1 - self._share))
                os.kill(pid, signal.SIGCONT)
                await asyncio.sleep(PERIOD_S * self._share)


@asynccontextmanager
async def limited(share: float) -> AsyncGenerator[Limit, None]:
    """Make a limit to this part of one core; its control group is removed at the end."""
    group = _make_group(share)
    try:
        yield Limit(share, group)
    finally:
        if group is not None:
            for _ in range(50):
                with contextlib.suppress(OSError):  # the kernel still removes an ended process from it
                    group.rmdir()
                    break
                await asyncio.sleep(0.1)


def _make_group(share: float) -> Path | None:
    """Return a new control group with this limit, None if it cannot be made."""
    for parent in (_ROOT, _ROOT / "cpu", _ROOT / "cpu,cpuacct"):
        group = parent / f"qmpballoon-bench-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            _set_quota(group, share)
        except OSError:  # the cpu controller is not available here
            group.rmdir()
            continue
        return group
    return None


def _set_quota(group: Path, share: float | None) -> None:
    period_us = round(PERIOD_S * 1e6)
    if (group / "cpu.max").exists():
        quota = "max" if share is None else str(round(share * period_us))
        (group / "cpu.max").write_text(f"{quota} {period_us}")
    else:
        with open(group / "cpu.cfs_quota_us", "r+") as file:  # not created where it is missing
            file.write("-1" if share is None else str(round(share * period_us)))
