"""`top`: which rows are shown in which view."""

from __future__ import annotations

from top_fleet import FakeFleet

from qmpballoon.top.picture import Counts, Picture, Wishes
from qmpballoon.units import MIB


def a_fleet() -> FakeFleet:
    fleet = FakeFleet()
    fleet.host("b")
    fleet.host("a")
    fleet.vm("a", "web2", available=9 * MIB)
    fleet.vm("a", "web1", available=50 * MIB)
    fleet.vm("b", "db", health="stuck", available=20 * MIB)
    fleet.vm("c", "lost")
    return fleet


def shown(picture: Picture, fleet: FakeFleet) -> list[str]:
    picture.update(fleet.hosts, fleet.vms, 0.0)
    picture.arrange()
    return [row.id for row in picture.rows]


def test_the_vms_stand_below_their_hosts() -> None:
    fleet, picture = a_fleet(), Picture()
    assert shown(picture, fleet) == ["a", "a/web1", "a/web2", "b", "b/db", "c", "c/lost"]
    assert picture.counts == Counts(hosts=3, vms=4, not_ok=2, shown=4)


def test_hosts_are_in_the_order_of_their_numbers() -> None:
    fleet = FakeFleet()
    for host in ("edge-10", "edge-9", "db"):
        fleet.host(host)
    assert shown(Picture(), fleet) == ["db", "edge-9", "edge-10"]


def test_the_views_follow_each_other() -> None:
    fleet, picture = a_fleet(), Picture(Wishes(key="available"))
    assert shown(picture, fleet) == ["a", "a/web2", "a/web1", "b", "b/db", "c", "c/lost"]
    picture.wishes.next_view()
    assert shown(picture, fleet) == ["a/web2", "b/db", "a/web1", "c/lost"]
    picture.wishes.next_view()
    assert shown(picture, fleet) == ["a", "b", "c"]
    picture.wishes.next_view()
    assert picture.wishes.view == "tree"


def test_a_filter_leaves_only_hosts_with_a_vm_that_matches() -> None:
    fleet, picture = a_fleet(), Picture(Wishes(filter="stuck"))
    assert shown(picture, fleet) == ["b", "b/db"]
    assert picture.counts.shown == 1
    picture.wishes.view = "hosts"
    assert shown(picture, fleet) == ["b"]


def test_a_host_or_a_glob_of_hosts_can_be_shown_alone() -> None:
    fleet = a_fleet()
    assert shown(Picture(Wishes(host="b")), fleet) == ["b", "b/db"]
    assert shown(Picture(Wishes(host="[ab]", view="hosts")), fleet) == ["a", "b"]


def test_only_the_row_of_a_vm_that_changed_is_made_anew() -> None:
    fleet, picture = a_fleet(), Picture()
    shown(picture, fleet)
    before = {row.id: row for row in picture.rows}
    fleet.vm("a", "web1", available=1 * MIB)
    shown(picture, fleet)
    assert [row.id for row in picture.rows if "/" in row.id and row is not before[row.id]] == ["a/web1"]


def test_what_is_cleared_on_the_broker_vanishes() -> None:
    fleet, picture = a_fleet(), Picture()
    shown(picture, fleet)
    fleet.publish("a/vm/web1/state", None)
    fleet.publish("a/vm/web1/availability", "")
    assert "a/web1" not in shown(picture, fleet)
    assert picture.vm("a/web1") is None


def test_the_same_order_again_is_the_other_way_round() -> None:
    wishes = Wishes()
    wishes.sort_by("held")
    assert (wishes.key, wishes.reverse) == ("held", False)
    wishes.sort_by("held")
    assert (wishes.key, wishes.reverse) == ("held", True)
    wishes.next_key(-1)
    assert wishes.key == "available"
