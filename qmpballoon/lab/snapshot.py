"""Snapshots of booted guests: the memory is saved once and resumed in a fraction of a second."""

from __future__ import annotations

import hashlib
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from qmpballoon.lab.guest import LabGuest, Machine
from qmpballoon.lab.require import LabError, find_program
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB

_SAVE_S: Final = 180.0  # a second on an idle machine


async def snapshot_of(machine: Machine, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Return the saved state of this machine after a boot; boot and save it if the cache does not have it.

    Saved states are stored beside the image, keyed by the machine's options and the QEMU binary. Each takes
    about two thirds of the guest's memory on disk. All guests that resume one share its state: uptime, random
    numbers, and a count of one boot.

    Raises:
        LabError: the guest does not boot or cannot be saved.
    """
    if machine.image is None or machine.paused:
        raise LabError("only a guest that boots has a state worth saving")
    saved = machine.image.kernel.with_name(f"snapshot-{_key(machine)}")
    if not saved.exists():
        progress(f"booting a guest of {machine.memory // MIB} MiB once, to resume it from now on")
        await _save(machine, saved)
    return saved


def _key(machine: Machine) -> str:
    qemu = Path(find_program(machine.program)).stat()
    recipe = repr((machine.options(), qemu.st_size, qemu.st_mtime_ns))
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]


async def _save(machine: Machine, saved: Path) -> None:
    # No lock: a concurrent process boots a guest too, and the last rename wins.
    with (
        tempfile.TemporaryDirectory(prefix="saving-", dir=saved.parent) as work,
        tempfile.TemporaryDirectory(prefix="qb-", dir="/tmp") as sockets,
    ):
        unfinished = Path(work) / "state"
        async with LabGuest(Path(sockets), machine, name="snapshot") as guest:
            await guest.booted()
            await guest.monitor.execute("migrate-set-parameters", {"max-bandwidth": 10 * 2**30})
            await guest.monitor.execute("migrate", {"uri": f"exec:cat > {shlex.quote(str(unfinished))}"})
            await eventually(
                lambda: guest.monitor.execute("query-migrate"),
                _is_over,
                timeout_s=_SAVE_S,
                what="the guest's state is saved",
            )
        unfinished.rename(saved)


def _is_over(migration: object) -> bool:
    status = migration.get("status") if isinstance(migration, dict) else None
    if status in ("failed", "cancelled"):
        raise LabError(f"QEMU could not save the guest's state: {migration!r}")
    return status == "completed"
