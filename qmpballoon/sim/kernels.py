"""Guest kernels when memory is short, as ``scripts/calibrate.py`` measures them on real guests.

The figures are those of guests of 224 MiB on QEMU 7.2 (Linux 6.1) and 10.0 (Linux 6.12) under TCG. A test
compares them with a real guest of the lab's kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from qmpballoon.units import MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestKernel:
    """One kernel; sizes in bytes.

    Pages that a guest frees, including those of a deflated balloon, first go to a per-CPU list, where they
    can be allocated but are not counted as available. From Linux 6.7 on these lists may grow while memory is
    allocated, also by an inflating balloon, and shrink over time.
    """

    release: str  # ``6.1``: this and newer ones, up to the next known one
    base: int  # that a guest of 224 MiB cannot give; with 6.1 54 MiB of 128, 68 of 512
    unseen: int  # the part of ``base`` that the guest's total does not count
    inflate_stops_at: int  # available memory (MemAvailable) at which the driver can allocate no page
    oom_kills_at: int  # available memory at which it kills
    deflate_on_oom_keeps: int  # available memory that deflate-on-oom restores
    counts_reclaim: bool  # reports ``stat-oom-kills`` and the five other counters of reclaim
    list_capacity: float = 0.0  # the most that the lists may hold, as a part of the size
    list_capacity_kept: float = 1.0  # of that capacity per second


KERNEL_6_1: Final = GuestKernel(
    release="6.1",
    base=59 * MIB,
    unseen=37 * MIB,
    inflate_stops_at=6 * MIB,
    oom_kills_at=5 * MIB,
    deflate_on_oom_keeps=7 * MIB,
    counts_reclaim=False,
)
KERNEL_6_12: Final = GuestKernel(
    release="6.12",
    base=64 * MIB,
    unseen=43 * MIB,
    inflate_stops_at=0,
    oom_kills_at=0,
    deflate_on_oom_keeps=0,
    counts_reclaim=True,
    list_capacity=0.085,
    list_capacity_kept=0.93,
)
HARSHEST: Final = KERNEL_6_12  # causes more kills and more moves under every policy that uses statistics
KERNELS: Final = {kernel.release: kernel for kernel in (KERNEL_6_1, KERNEL_6_12)}
"""By release, oldest first."""


def kernel_like(release: str) -> GuestKernel:
    """Return the newest known kernel that is not newer than ``release`` (``6.12.94+deb13-cloud-amd64``).

    For a release that is older than all known ones it is the oldest.
    """
    wanted = _in_order(release)
    found = KERNEL_6_1
    for kernel in KERNELS.values():
        if _in_order(kernel.release) <= wanted:
            found = kernel
    return found


def _in_order(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"[0-9]+", release)[:2])
