"""The figures, compared with hand-computed values."""

from __future__ import annotations

from qmpballoon.sim.figures import HostTally, Need, VmTally, figures
from qmpballoon.sim.trace import Demand, TraceVm
from qmpballoon.units import MIB

KEYS = [
    "trace",
    "policy",
    "oom_kills",
    "vms_killed",
    "starved_vm_s",
    "over_budget_mib_s",
    "shortfall_percent",
    "lent_mib",
    "regret_mib",
    "moves_per_vm_h",
    "reversals_per_vm_h",
    "relief_p50_s",
    "relief_max_s",
]


def a_need(held: int, cache: int, has: int, used: int, *, shares: int = 1000) -> Need:
    vm = TraceVm(
        name="a",
        size=1000 * MIB,
        floor=100 * MIB,
        ceiling=1000 * MIB,
        shares=shares,
        demand=(Demand(0, 0, 0),),
    )
    return Need(vm, held * MIB, cache * MIB, has * MIB, used * MIB)


def test_the_document_has_the_keys_of_the_contract() -> None:
    document = figures("t", "p", HostTally(), [], 0.0).document()
    assert list(document) == KEYS
    assert document["relief_p50_s"] is None


def test_over_budget_counts_only_memory_beyond_the_budget() -> None:
    host = HostTally()
    host.pass_time(2.0, over=100 * MIB)
    host.pass_time(5.0, over=-300 * MIB)
    assert figures("t", "p", host, [], 7.0).over_budget_mib_s == 200


def test_lent_is_what_is_used_beyond_an_equal_split() -> None:
    host = HostTally()
    host.measure(1.0, 800 * MIB, [a_need(600, 0, 700, 600), a_need(50, 0, 100, 50)])
    assert figures("t", "p", host, [], 1.0).lent_mib == 200  # 600 used, 400 is its part


def test_regret_is_measured_against_a_clairvoyant_policy() -> None:
    host = HostTally()
    host.measure(1.0, 800 * MIB, [a_need(600, 0, 450, 450), a_need(100, 50, 350, 150)])
    assert figures("t", "p", host, [], 1.0).regret_mib == 150


def test_the_clairvoyant_policy_fills_anonymous_memory_before_page_cache() -> None:
    host = HostTally()
    # 700 held in all; of the 100 left each gets 50 of page cache
    host.measure(1.0, 800 * MIB, [a_need(500, 300, 500, 500), a_need(200, 300, 300, 300)])
    assert figures("t", "p", host, [], 1.0).regret_mib == 50


def test_the_clairvoyant_policy_divides_scarce_memory_by_shares() -> None:
    host = HostTally()
    needs = [a_need(900, 0, 0, 0, shares=3000), a_need(900, 0, 900, 900)]
    host.measure(1.0, 800 * MIB, needs)
    assert figures("t", "p", host, [], 1.0).regret_mib == 600


def test_shortfall_is_a_part_of_the_demand() -> None:
    vm = VmTally()
    vm.pass_time(3.0, starved=False, asked=100, lacked=0)
    vm.pass_time(1.0, starved=True, asked=100, lacked=100)
    found = figures("t", "p", HostTally(), [vm], 4.0)
    assert (found.shortfall_percent, found.starved_vm_s) == (25.0, 1.0)


def test_relief_is_the_duration_of_a_starvation() -> None:
    vm = VmTally()
    for began_s, ended_s in ((1.0, 2.0), (5.0, 9.0), (20.0, 22.5)):
        vm.starve(began_s, starved=True)
        vm.starve(began_s + 0.1, starved=True)
        vm.starve(ended_s, starved=False)
    vm.starve(50.0, starved=True)
    found = figures("t", "p", HostTally(), [vm], 60.0)
    assert (found.relief_p50_s, found.relief_max_s) == (2.5, 10.0)


def test_a_reversal_is_an_opposite_move_within_two_minutes() -> None:
    vm = VmTally(present_s=1800.0)
    for at_s, up in ((0.0, True), (10.0, True), (130.0, False), (251.0, True), (260.0, False)):
        vm.move(at_s, up=up)
    found = figures("t", "p", HostTally(), [vm], 300.0)
    assert (found.moves_per_vm_h, found.reversals_per_vm_h) == (10.0, 4.0)


def test_kills_and_killed_vms_are_counted_separately() -> None:
    found = figures("t", "p", HostTally(), [VmTally(kills=3), VmTally(), VmTally(kills=1)], 1.0)
    assert (found.oom_kills, found.vms_killed) == (4, 2)
