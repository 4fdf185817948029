"""`top` as it is used: keys, dialogs, terminals of several sizes, a broker that is lost and comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static
from top_fleet import FakeFleet, screen_lines, screen_text

from qmpballoon.cli.top import explained
from qmpballoon.errors import OutOfRange
from qmpballoon.top.app import TopApp
from qmpballoon.top.details import Details
from qmpballoon.top.dialogs import Confirmation, Help, ModeDialog, TargetDialog
from qmpballoon.top.listing import Listing
from qmpballoon.top.picture import Wishes
from qmpballoon.units import MIB

WHY: dict[str, Any] = {
    "name": "web1",
    "mode": "auto",
    "policy": "fairshare",
    "health": "ok",
    "why": "grow",
    "figures": {"actual": 180 * MIB, "size": 256 * MIB},
    "decisions": [
        {
            "ts": "2026-11-27T16:30:00Z",
            "why": why,
            "outcome": "sent",
            "to": to * MIB,
            "figures": {"actual": 100 * MIB},
        }
        for why, to in (("shrink", 90), ("[red]grow\x1b[0m", 180))
    ],
}


@asynccontextmanager
async def showing(
    fleet: FakeFleet, size: tuple[int, int] = (80, 24), **options: Any
) -> AsyncIterator[tuple[TopApp, Pilot[None]]]:
    app = TopApp(fleet, explained, **options)
    async with app.run_test(size=size, notifications=True) as pilot:
        await pilot.pause()
        yield app, pilot


def a_fleet() -> FakeFleet:
    fleet = FakeFleet()
    fleet.host("edge-7")
    fleet.vm("edge-7", "web1", why="grow")
    fleet.vm("edge-7", "web2", health="stuck")
    fleet.answers["why"] = WHY
    return fleet


def notices(app: TopApp) -> list[str]:
    return [notification.message for notification in app._notifications]


async def renew(app: TopApp, pilot: Pilot[None]) -> None:
    app.look()
    await pilot.pause()


@pytest.mark.parametrize("size", [(80, 24), (160, 48), (40, 12), (20, 5)])
@pytest.mark.parametrize("light", [False, True])
async def test_hosts_and_vms_are_shown_on_terminals_of_any_size(
    size: tuple[int, int], *, light: bool
) -> None:
    async with showing(a_fleet(), size, light=light) as (app, _):
        shown = screen_lines(app)
        assert all(len(line) == size[0] for line in shown)
        assert any(line.startswith("edge-7") for line in shown)
        assert (size[1] < 12) or any(line.startswith(" web2") and "stuck" in line for line in shown)
        assert app.current_theme.dark is not light


async def test_the_head_counts_and_the_foot_explains_the_row_under_the_cursor() -> None:
    async with showing(a_fleet()) as (app, pilot):
        assert "mqtt://localhost  1 host, 2 VMs  1 not ok" in screen_lines(app)[0]
        await pilot.press("down")
        assert "web1: grow: The guest has less than half of the headroom" in screen_lines(app)[-2]


async def test_what_changes_is_drawn_and_only_its_line() -> None:
    fleet = a_fleet()
    async with showing(fleet) as (app, pilot):
        fleet.vm("edge-7", "web2", health="ok", why="no-such-reason")
        await renew(app, pilot)
        assert "no-such-reas." in screen_text(app)
        listing = app.screen.query_one(Listing)
        fleet.vm("edge-7", "web1", actual=70 * MIB)
        app.picture.update(fleet.hosts, fleet.vms, 0.0)
        app.picture.arrange()
        assert listing.refresh_rows() == 1
        assert listing.refresh_rows() == 0


async def test_the_cursor_stays_on_its_vm_while_others_come_and_go() -> None:
    fleet = a_fleet()
    async with showing(fleet) as (app, pilot):
        await pilot.press("end")
        listing = app.screen.query_one(Listing)
        assert listing.row is not None
        assert listing.row.id == "edge-7/web2"
        fleet.vm("edge-7", "aaa")
        await renew(app, pilot)
        assert (listing.row.id, listing.at) == ("edge-7/web2", 3)
        for topic in ("state", "availability"):
            fleet.publish(f"edge-7/vm/web2/{topic}", "" if topic == "availability" else None)
        await renew(app, pilot)
        assert listing.at == 2
        assert listing.row.id == "edge-7/web1"


async def test_a_thousand_vms_are_walked_through() -> None:
    fleet = FakeFleet()
    for number in range(1000):
        fleet.vm(f"host-{number // 100}", f"vm{number}")
    async with showing(fleet, (80, 24)) as (app, pilot):
        await pilot.press("end")
        assert screen_lines(app)[-3].startswith(" vm999")
        await pilot.press("pageup", "home")
        assert screen_lines(app)[2].startswith("host-0")
        await pilot.press(*["pagedown"] * 3, "down", "up")
        assert app.screen.query_one(Listing).at == 57


async def test_order_view_and_filter() -> None:
    fleet = a_fleet()
    async with showing(fleet) as (app, pilot):
        await pilot.press("v", "s")
        assert screen_lines(app)[2].startswith("edge-7/web2")
        assert "HEALTH▼" in screen_lines(app)[1]
        await pilot.press("r")
        assert screen_lines(app)[2].startswith("edge-7/web1")
        await pilot.press("slash", *"web2")
        assert "1 match 'web2'" in screen_lines(app)[0]
        await pilot.press("enter")
        assert app.screen.query_one(Listing).has_focus
        await pilot.press("slash", *"zzz")
        assert "No VM matches 'zzz'" in screen_text(app)
        await pilot.press("escape")
        assert app.picture.wishes.filter == ""
        assert not app.screen.query_one("#filter", Input).display
        await pilot.press("v")
        assert screen_lines(app)[2].startswith("edge-7 ")
        assert "web1" not in screen_text(app)


async def test_a_click_on_a_title_sorts_and_a_double_click_opens() -> None:
    async with showing(a_fleet()) as (app, pilot):
        await pilot.click("Titles", offset=(16, 0))
        assert app.picture.wishes.key == "health"
        await pilot.click(Listing, offset=(3, 1), times=2)
        assert isinstance(app.screen, Details)
        assert app.screen.vm == "edge-7/web2"


async def test_one_vm_has_its_figures_its_chart_and_its_decisions() -> None:
    fleet = a_fleet()
    async with showing(fleet) as (app, pilot):
        await pilot.press("down", "enter")
        await app.workers.wait_for_complete()
        await pilot.pause()
        shown = screen_text(app)
        assert fleet.requests == [("edge-7/web1", "why", {"last": 20})]
        assert "edge-7/web1   ok" in shown
        assert "held 111 MiB   available 69 MiB" in shown
        assert "10 minutes ago" in shown
        assert "[red]grow?[0m" in shown
        assert shown.index("[red]grow") < shown.index("(shrink)")
        fleet.vm("edge-7", "web1", why="shrink", health="stuck")
        await renew(app, pilot)
        await app.workers.wait_for_complete()
        assert len(fleet.requests) == 2
        assert "edge-7/web1   stuck" in screen_text(app)
        await pilot.press("s", "v", "slash", "escape")
        assert not isinstance(app.screen, Details)
        assert app.picture.wishes == Wishes()


async def test_a_refused_question_for_decisions_is_said() -> None:
    fleet = a_fleet()
    fleet.answers["why"] = OutOfRange("no \x1b[1msuch thing")
    async with showing(fleet) as (app, pilot):
        await pilot.press("down", "enter")
        await app.workers.wait_for_complete()
        await pilot.pause()
        assert "no ?[1msuch thing" in screen_text(app)


async def test_a_target_is_set_after_a_confirmation() -> None:
    fleet = a_fleet()
    async with showing(fleet) as (app, pilot):
        await pilot.press("down", "t")
        assert isinstance(app.screen, TargetDialog)
        await pilot.press(*"64M", "enter")
        assert "write 64MiB" in screen_text(app)
        await pilot.press(*"iB", "enter")
        assert isinstance(app.screen, Confirmation)
        asked = " ".join(screen_text(app).replace("│", " ").split())
        assert "target of edge-7/web1 from 180 MiB to 64 MiB?" in asked
        assert "The guest holds 111 MiB" in asked
        await pilot.press("y")
        await app.workers.wait_for_complete()
        assert fleet.requests == [("edge-7/web1", "set-target", {"target": 64 * MIB})]
        assert notices(app) == ["edge-7/web1: target 64 MiB is set"]


@pytest.mark.parametrize(
    "keys", [["escape"], ["5", "0", "%", "enter", "n"], ["5", "0", "%", "enter", "escape"]]
)
async def test_a_target_is_not_set_without_a_yes(keys: list[str]) -> None:
    fleet = a_fleet()
    async with showing(fleet) as (app, pilot):
        await pilot.press("down", "t", *keys)
        await app.workers.wait_for_complete()
        assert fleet.requests == []
        assert isinstance(app.screen.query_one(Listing), Listing)


async def test_a_target_that_is_safe_has_no_warning() -> None:
    fleet = a_fleet()
    async with showing(fleet) as (app, pilot):
        await pilot.press("down", "t", *"50%", "enter")
        assert "The guest holds" in screen_text(app)
        await pilot.press("n", "t", *"75%", "enter")
        assert "The guest holds" not in screen_text(app)


async def test_a_mode_is_set_after_a_confirmation_also_on_the_screen_of_one_vm() -> None:
    fleet = a_fleet()
    async with showing(fleet) as (app, pilot):
        await pilot.press("down", "enter", "m")
        assert isinstance(app.screen, ModeDialog)
        await pilot.press("down", "down", "enter")
        assert "from auto to observe?" in screen_text(app)
        await pilot.press("y")
        await app.workers.wait_for_complete()
        assert fleet.requests[-1] == ("edge-7/web1", "set-mode", {"mode": "observe"})


async def test_a_refusal_is_said_and_not_read_as_markup() -> None:
    fleet = a_fleet()
    fleet.answers["set-mode"] = OutOfRange("below the [bold]floor\x1b[31m")
    async with showing(fleet) as (app, pilot):
        await pilot.press("down", "m", "enter", "y")
        await app.workers.wait_for_complete()
        await pilot.pause()
        assert notices(app) == ["edge-7/web1: below the [bold]floor?[31m"]
        assert "[bold]floor?[31m" in screen_text(app)


async def test_keys_about_a_vm_do_nothing_on_a_host() -> None:
    fleet = a_fleet()
    async with showing(fleet) as (app, pilot):
        await pilot.press("t", "m", "enter")
        await app.workers.wait_for_complete()
        assert app.screen.query_one(Listing).has_focus
        assert fleet.requests == []


async def test_a_vm_that_vanishes_while_it_is_looked_at_is_said_to_be_gone() -> None:
    fleet = a_fleet()
    async with showing(fleet) as (app, pilot):
        await pilot.press("down", "enter")
        fleet.publish("edge-7/vm/web1/state", None)
        fleet.publish("edge-7/vm/web1/availability", "")
        await renew(app, pilot)
        assert "edge-7/web1: it is gone" in screen_text(app)
        await pilot.press("t", "m", "escape")
        assert "web2" in screen_text(app)


async def test_no_broker_yet_then_one_then_lost_and_back() -> None:
    fleet = FakeFleet()
    fleet.problem = "cannot reach the broker \x1b[31mmqtt://localhost"
    async with showing(fleet) as (app, pilot):
        assert "Not connected yet: cannot reach the broker ?[31mmqtt://localhost" in screen_text(app)
        fleet.problem = None
        fleet.has_news = True
        await renew(app, pilot)
        assert "Nothing is published at mqtt://localhost" in screen_text(app)
        fleet.host("edge-7")
        fleet.vm("edge-7", "web1")
        await renew(app, pilot)
        assert "NOT CONNECTED" not in screen_text(app)
        fleet.problem, fleet.has_news = "the broker: closed", True
        await renew(app, pilot)
        assert "NOT CONNECTED: the broker: closed  1 host, 1 VM" in screen_lines(app)[0]
        assert "web1" in screen_text(app)
        assert app.screen.query_one("#head", Static).has_class("lost")
        fleet.problem, fleet.has_news = None, True
        await renew(app, pilot)
        assert "NOT CONNECTED" not in screen_text(app)


async def test_a_host_that_says_nothing_more_goes_offline_by_its_age() -> None:
    fleet, now_s = a_fleet(), [100.0]
    async with showing(fleet, clock=lambda: now_s[0]) as (app, pilot):
        assert "offline" not in screen_text(app)
        fleet.host("edge-7", ts="2026-01-01T00:00:00.000Z")
        fleet.has_news = False  # no message comes: only time passes
        await renew(app, pilot)
        assert "offline" not in screen_text(app)
        now_s[0] += 5.0
        await renew(app, pilot)
        assert "its agent is not connected" in screen_text(app)


async def test_names_with_markup_and_control_characters_are_shown_as_text() -> None:
    fleet = FakeFleet()
    fleet.host("edge-7", name="[b]host[/]\x1b[2J")
    fleet.vm("edge-7", "x", name="[red]e[/]\x1b[2J", health="[i]h", why="[@click=app.quit]w")
    async with showing(fleet, (120, 24)) as (app, pilot):
        await pilot.press("down")
        assert "\x1b" not in screen_text(app)
        assert "[red]e[/]?[2J" in screen_text(app)
        assert "[b]host[/]?[2J" in screen_text(app)
        assert "[i]h" in screen_text(app)
        await pilot.press("enter")
        await app.workers.wait_for_complete()
        assert "[@click=app.quit]w" in screen_text(app)


async def test_help_tells_every_key_and_fits_a_small_terminal() -> None:
    async with showing(a_fleet()) as (app, pilot):
        await pilot.press("question_mark")
        assert isinstance(app.screen, Help)
        shown = screen_text(app)
        for key in ("Enter", "t ", "m ", "s  S", "r ", "v ", "/ ", "Esc", "d ", "? ", "q "):
            assert f" {key}" in shown, key
        await pilot.press("q")
        assert not isinstance(app.screen, Help)


async def test_dark_and_light_change_and_q_quits() -> None:
    async with showing(a_fleet()) as (app, pilot):
        await pilot.press("d")
        assert not app.current_theme.dark
        await pilot.press("d")
        assert app.current_theme.dark
        await pilot.press("q")
        assert not app.is_running
