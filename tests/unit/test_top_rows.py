"""`top`: rows of hosts and VMs, their order and their filter."""

from __future__ import annotations

import pytest
from top_fleet import FakeFleet

from qmpballoon.policy.reasons import MAY_NEED_A_PERSON
from qmpballoon.top.rows import _URGENT, SortKey, VmRow, host_row, in_order, matching, natural, vm_row
from qmpballoon.units import GIB, MIB


def row(vm: str = "web1", host: str = "edge-7", **document: object) -> VmRow:
    fleet = FakeFleet()
    fleet.host(host)
    fleet.vm(host, vm, **document)
    return vm_row(fleet.vms[f"{host}/{vm}"])


def test_a_row_has_the_figures_of_its_vm() -> None:
    made = row(actual=180 * MIB, available=69 * MIB, why="grow", target=200 * MIB)
    assert (made.id, made.health, made.why, made.mode) == ("edge-7/web1", "ok", "grow", "auto")
    assert (made.held, made.available, made.balloon) == (111 * MIB, 69 * MIB, 76 * MIB)
    assert (made.size, made.target, made.rss) == (256 * MIB, 200 * MIB, 190 * MIB)


def test_the_vm_of_an_agent_that_is_gone_is_offline_and_its_old_figures_are_not_shown() -> None:
    fleet = FakeFleet()
    fleet.host("edge-7")
    fleet.vm("edge-7", "web1")
    fleet.publish("edge-7/status", "offline")
    made = vm_row(fleet.vms["edge-7/web1"])
    assert (made.health, made.tone) == ("offline", "bad")
    assert (made.actual, made.held, made.available, made.balloon, made.rss) == (None,) * 5
    assert made.size == 256 * MIB


def test_a_guest_that_reports_no_available_memory_has_its_free_memory_instead() -> None:
    assert row(available=None).available == 60 * MIB


def test_names_and_words_are_stripped_of_control_characters_and_cut() -> None:
    made = row("x", name="a\x1b[31m\nb\u202ec", health="w\x07" * 99)
    assert made.name == "a?[31m?b?c"
    assert made.health == "w?" * 32


@pytest.mark.parametrize(
    ("health", "tone"),
    [("ok", "good"), ("stuck", "warning"), ("paused", "quiet"), ("busy", "bad"), ("unheard", "warning")],
)
def test_a_health_has_its_tone(health: str, tone: str) -> None:
    assert row(health=health).tone == tone


def test_the_reasons_shown_as_urgent_are_those_that_may_need_a_person() -> None:
    assert _URGENT is MAY_NEED_A_PERSON
    assert row(why="emergency").why_tone == "bad"
    assert row(why="grow").why_tone == "plain"


def test_a_host_row_has_its_figures_and_its_alarms() -> None:
    fleet = FakeFleet()
    fleet.host("edge-7", level="hard", used=7 * GIB, alarms=["over-\x1bbudget", 3])
    made = host_row(fleet.hosts["edge-7"], "edge-7", 4, 3)
    assert (made.level, made.tone, made.used, made.budget) == ("hard", "bad", 7 * GIB, 6 * GIB)
    assert (made.vms, made.vms_online) == (4, 3)
    assert made.alarms == ("over-?budget", "3")


def test_a_host_that_published_nothing_has_a_row_all_the_same() -> None:
    made = host_row(None, "ghost", 2, 0)
    assert (made.name, made.online, made.tone, made.vms) == ("ghost", False, "bad", 2)


ROWS = [
    row("web10", health="ok", available=100 * MIB, actual=128 * MIB),
    row("web2", health="stuck", available=20 * MIB, actual=256 * MIB),
    row("Alpha", health="offline", available=None, actual=None, size=GIB),
]


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("name", ["Alpha", "web2", "web10"]),
        ("health", ["Alpha", "web2", "web10"]),
        ("available", ["web2", "web10", "Alpha"]),
        ("held", ["web2", "web10", "Alpha"]),
        ("balloon", ["web10", "web2", "Alpha"]),
        ("size", ["Alpha", "web2", "web10"]),
    ],
)
def test_rows_are_in_order_of_a_key_the_most_urgent_first(key: SortKey, names: list[str]) -> None:
    assert [made.name for made in in_order(ROWS, key)] == names


def test_a_reversed_order_leaves_what_is_unknown_last() -> None:
    assert [made.name for made in in_order(ROWS, "held", reverse=True)] == ["web10", "web2", "Alpha"]
    assert [made.name for made in in_order(ROWS, "name", reverse=True)] == ["web10", "web2", "Alpha"]


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("", ["web10", "web2", "Alpha"]),
        ("web", ["web10", "web2"]),
        ("WEB 2", ["web2"]),
        ("edge-7/al", ["Alpha"]),
        ("stu", ["web2"]),
        ("!ok", ["web2", "Alpha"]),
        ("!ok !off", ["web2"]),
        ("!", ["web10", "web2", "Alpha"]),
        ("manual", []),
    ],
)
def test_a_filter_lets_through_what_all_its_words_match(typed: str, names: list[str]) -> None:
    assert [made.name for made in ROWS if matching(typed)(made)] == names


def test_names_are_in_the_order_of_their_letters_and_numbers() -> None:
    names = ["b", "a10", "a9b", "a9", "10", "9", "Ab", "", "日本"]
    assert sorted(names, key=natural) == ["", "9", "10", "a9", "a9b", "a10", "Ab", "b", "日本"]
