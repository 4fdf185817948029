"""A child process that is always reaped, and that never outlives the thread that started it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from qmpballoon.lab.require import LabError, find_program

_LOOK_S: Final = 1.0  # once in thousands of runs the descriptor did not tell the end
_REAP_S: Final = 10.0  # a killed QEMU ends in milliseconds; more means that it hangs in the kernel


class Program:
    """One run of a program, its output in a log file.

    It is started through ``setpriv --pdeathsig KILL``: the kernel kills it when the *thread* that called the
    constructor ends, so start programs from a thread that lives long enough. It has its own session, so that
    a Ctrl-C in the terminal reaches only its parent. All cleanup is synchronous, so a cancelled task cleans
    up too.
    """

    def __init__(self, arguments: Sequence[str], *, log: Path) -> None:
        self.arguments = tuple(arguments)
        self.log = log
        with log.open("ab") as output:
            self._process = self._start(output)
        self.pid = self._process.pid

    def _start(self, output: IO[bytes]) -> subprocess.Popen[bytes]:
        program, *arguments = self.arguments
        return subprocess.Popen(
            [find_program("setpriv"), "--pdeathsig", "KILL", find_program(program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def exit_status(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if the program has ended."""
        self._process.send_signal(number)

    def destroy(self) -> None:
        """Kill the program, stopped or not, and reap it."""
        self.signal(signal.SIGKILL)
        self._process.wait(_REAP_S)

    async def ended(self, *, timeout_s: float) -> int:
        """Wait for the program to end and return its exit status.

        Raises:
            LabError: it still runs after ``timeout_s``.
        """
        if self.exit_status is None:
            loop, ended, descriptor = asyncio.get_running_loop(), asyncio.Event(), os.pidfd_open(self.pid)
            try:
                loop.add_reader(descriptor, ended.set)
                async with asyncio.timeout(timeout_s):
                    while self.exit_status is None:
                        with suppress(TimeoutError):
                            async with asyncio.timeout(_LOOK_S):
                                await ended.wait()
                        ended.clear()
            except TimeoutError as error:
                raise LabError(self.failure(f"did not end within {timeout_s:g} s")) from error
            finally:
                loop.remove_reader(descriptor)
                os.close(descriptor)
        return self._process.wait(_REAP_S)

    def failure(self, what: str) -> str:
        """Return an error message about this program with the tail of its log."""
        status = self.exit_status
        state = "runs" if status is None else f"ended with status {status}"
        return f"{self.arguments[0]} (pid {self.pid}, {state}) {what}{tail(self.log)}"


def tail(path: Path, *, lines: int = 15) -> str:
    """Return the last lines of a log, indented under its name; empty if there are none."""
    try:
        text = path.read_bytes()[-8192:].decode(errors="replace")
    except OSError:
        return ""
    last = [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
    return "".join(f"\n    {line}" for line in [f"{path.name}:", *last]) if last else ""
