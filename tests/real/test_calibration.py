"""A simulated guest is killed no later than a real one: the comparison of ``scripts/calibrate.py``."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

CALIBRATE = Path(__file__).parents[2] / "scripts" / "calibrate.py"


@pytest.mark.usefixtures("guest_image")
async def test_a_simulated_guest_starves_and_is_killed_where_a_real_one_is() -> None:
    program = await asyncio.create_subprocess_exec(
        sys.executable, CALIBRATE, "--json", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(500):
            out, errors = await program.communicate()
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    assert program.returncode in (0, 1), errors.decode()
    figures = {one["figure"]: one for one in json.loads(out or b"[]")}
    assert figures, errors.decode()

    off = {
        name: (one["real"], one["simulated"], one["tolerance"])
        for name, one in figures.items()
        if not one["agrees"]
    }
    assert off == {}
    # what must hold for the real guests, independent of the simulator
    for rate in (8, 20, 40):
        assert figures[f"available before the kill at {rate} MiB/s"]["real"] < 12
    assert figures["balloon at the kill with deflate-on-oom"]["real"] < 8
    assert figures["kills with deflate-on-oom"]["real"] == 0
