"""The lab's guests of the other processor, emulated: what is written for one machine works on the other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qmpballoon.lab.architecture import AARCH64, ARCHITECTURE, X86_64
from qmpballoon.lab.require import MissingPrograms, require_programs

OTHER = X86_64 if ARCHITECTURE is AARCH64 else AARCH64
# The guest's system calls, line, disk, balloon, workload and reboot.
TESTS = "boots_and_its_balloon_moves or held_in_a_guest or from_its_disk or reboots"


def test_the_lab_boots_and_steers_guests_of_the_other_processor() -> None:
    try:
        require_programs(OTHER.qemu, f"{OTHER.name}-linux-gnu-gcc", "apt-get")
    except MissingPrograms as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", TESTS, "test_lab_guest.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "QMPBALLOON_ARCHITECTURE": OTHER.name},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "4 passed" in done.stdout
