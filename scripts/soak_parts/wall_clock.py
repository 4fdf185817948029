"""A wall clock for the agent's process alone, which jumps; the machine's clock is not changed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

_SOURCE: Final = Path(__file__).with_name("wall_clock.c")
_COMPILE_S: Final = 60.0
_SECONDS: Final = struct.Struct("=q")


class WallClock:
    """The files of a process's wall clock; ``environment`` gives it to a program."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "clock"
        self._library = directory / "clock.so"
        self._file.write_bytes(_SECONDS.pack(0))
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "tcc"))), None)
        self.works = False  # else the clock is the machine's: there is no compiler
        if compiler is not None:
            command: list[str | Path] = [compiler, "-shared", "-fPIC", "-o", self._library, _SOURCE]
            done = subprocess.run(command, check=False, timeout=_COMPILE_S, capture_output=True)
            self.works = done.returncode == 0

    @property
    def environment(self) -> list[str]:
        """The environment of a program that is to have this clock."""
        return [f"LD_PRELOAD={self._library}", f"SOAK_CLOCK={self._file}"] if self.works else []

    def jump(self, seconds: int) -> None:
        """Set the clock this far from the machine's."""
        with self._file.open("r+b") as file:  # programs have it mapped: it must not be cut
            file.write(_SECONDS.pack(seconds))
