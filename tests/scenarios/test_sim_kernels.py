"""The kernels of simulated guests, and their differences."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmpballoon.policy.registry import simulated
from qmpballoon.sim.guest import NOT_REPORTED, GuestSpec, SimulatedGuest
from qmpballoon.sim.host import Host, play
from qmpballoon.sim.kernels import KERNEL_6_1, KERNEL_6_12, KERNELS, GuestKernel, kernel_like
from qmpballoon.sim.traces import built_in
from qmpballoon.units import MIB

EACH = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


@pytest.mark.parametrize(
    ("release", "kernel"),
    [
        ("6.1.0-50-cloud-amd64", KERNEL_6_1),
        ("6.9.7", KERNEL_6_1),
        ("6.12.117+deb13-cloud-amd64", KERNEL_6_12),
        ("7.3.4+deb13-cloud-amd64", KERNEL_6_12),
        ("5.10.0-30-amd64", KERNEL_6_1),
        ("", KERNEL_6_1),
    ],
)
def test_a_release_uses_the_newest_known_kernel_before_it(release: str, kernel: GuestKernel) -> None:
    assert kernel_like(release) is kernel


def a_guest(kernel: GuestKernel, *, deflate_on_oom: bool = False) -> SimulatedGuest:
    spec = GuestSpec(size=256 * MIB, kernel=kernel, base=kernel.base, deflate_on_oom=deflate_on_oom)
    guest = SimulatedGuest(spec, booted=True)
    guest.set_polling_interval(1)
    guest.set_demand(40 * MIB)
    return guest


@EACH
def test_inflation_stops_where_the_kernel_has_no_page_left(kernel: GuestKernel) -> None:
    guest = a_guest(kernel)
    guest.set_target(1)
    guest.advance(10.0)
    assert (guest.available, guest.oom_kills) == (kernel.inflate_stops_at, 0)
    assert guest.actual == kernel.base + 40 * MIB + kernel.inflate_stops_at


@EACH
def test_a_kernel_kills_below_its_threshold_and_not_at_it(kernel: GuestKernel) -> None:
    guest = a_guest(kernel)
    guest.set_target(kernel.base + 100 * MIB)
    guest.advance(10.0)
    guest.set_demand(100 * MIB - kernel.oom_kills_at)
    assert (guest.available, guest.oom_kills) == (kernel.oom_kills_at, 0)
    guest.set_demand(100 * MIB - kernel.oom_kills_at + 4096)
    assert guest.oom_kills == 1


@EACH
def test_deflate_on_oom_keeps_what_the_kernel_needs(kernel: GuestKernel) -> None:
    guest = a_guest(kernel, deflate_on_oom=True)
    guest.set_target(kernel.base + 60 * MIB)
    guest.advance(10.0)
    guest.set_demand(80 * MIB)
    guest.advance(12.0)
    assert (guest.available, guest.oom_kills) == (kernel.deflate_on_oom_keeps, 0)


@EACH
def test_the_total_excludes_memory_that_the_kernel_does_not_count(kernel: GuestKernel) -> None:
    guest = a_guest(kernel)
    guest.advance(10.0)
    assert 256 * MIB - guest.statistics["stat-total-memory"] == pytest.approx(kernel.unseen, abs=MIB)


COUNTERS = ("oom-kills", "alloc-stalls", "async-scans", "direct-scans", "async-reclaims", "direct-reclaims")


def counters(guest: SimulatedGuest) -> list[int]:
    return [guest.statistics[f"stat-{name}"] for name in COUNTERS]


def test_only_newer_kernels_report_kills_since_the_boot() -> None:
    older, newer = a_guest(KERNEL_6_1), a_guest(KERNEL_6_12)
    for guest in (older, newer):
        guest.set_demand(256 * MIB)
        guest.advance(2.0)
        assert guest.oom_kills == 1
    assert counters(older) == [NOT_REPORTED] * 6
    assert counters(newer) == [1, 0, 0, 0, 0, 0]
    newer.set_demand(0)
    newer.reset()
    newer.advance(10.0)
    assert counters(newer) == [0] * 6


def test_unseen_memory_is_at_most_two_thirds_of_the_base() -> None:
    assert replace(GuestSpec(), base=30 * MIB).unseen == 20 * MIB


def test_freed_memory_is_reported_late_and_usable_at_once() -> None:
    kernel = KERNEL_6_12
    guest = a_guest(kernel)
    guest.advance(10.0)
    guest.set_demand(100 * MIB)
    guest.set_demand(0)
    unseen = 256 * MIB - kernel.base - guest.available
    assert unseen == int(kernel.list_capacity * 256 * MIB)
    guest.advance(20.0)
    later = 256 * MIB - kernel.base - guest.available
    assert later == pytest.approx(unseen * kernel.list_capacity_kept**10, abs=4096)
    guest.set_demand(256 * MIB - kernel.base)
    assert (guest.available, guest.oom_kills) == (0, 0)


def test_deflated_memory_is_reported_late_until_a_reset() -> None:
    kernel = KERNEL_6_12
    guest = a_guest(kernel)
    guest.set_target(kernel.base + 60 * MIB)
    guest.advance(10.0)
    assert guest.available == 20 * MIB
    guest.set_target(kernel.base + 70 * MIB)
    guest.advance(11.0)
    assert guest.actual == kernel.base + 70 * MIB
    assert guest.available == 20 * MIB
    guest.reset()
    guest.advance(20.0)
    assert guest.available == 30 * MIB  # its balloon is inflated again


def test_linux_6_1_counts_freed_memory_as_available_at_once() -> None:
    guest = a_guest(KERNEL_6_1)
    guest.set_demand(0)
    assert guest.available == 256 * MIB - KERNEL_6_1.base


def killed(policy: str, kernel: GuestKernel) -> int:
    return play(built_in("unequal", 1), simulated(policy), host=Host(seed=1, kernel=kernel)).figures.oom_kills


@EACH
def test_fairshare_has_no_kill_with_either_kernel_and_qubes_has_some(kernel: GuestKernel) -> None:
    assert killed("fairshare", kernel) == 0
    assert killed("qubes", kernel) > 0
