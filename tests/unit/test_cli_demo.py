"""The demo's picture, its lines and its results: pure, so no guest is needed."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest

from qmpballoon import screen
from qmpballoon.lab.demo.measurement import Outcome, compared
from qmpballoon.lab.demo.output import moves_line
from qmpballoon.lab.demo.picture import (
    ASCII,
    MEANINGS,
    Move,
    Note,
    Picture,
    PublishedGuest,
    drawn,
    merged,
    reason,
)
from qmpballoon.lab.demo.workload import (
    BUDGET,
    EQUAL_PART,
    IDLE_MIB,
    NAMES,
    PLAYED_S,
    SCRIPT,
    SIZE,
    Step,
    step_at,
    wanted,
)
from qmpballoon.terminal import coloured
from qmpballoon.units import MIB

KERNEL = 60 * MIB  # held by an idle lab guest beside its work


def a_guest(name: str = "web", *, actual: int | None = 150, available: int | None = 50) -> PublishedGuest:
    return PublishedGuest(
        name,
        192 * MIB,
        None if actual is None else actual * MIB,
        None if actual is None or available is None else (actual - available) * MIB,
        "ok",
        "give",
    )


def move(at_s: float, was: int, now: int, why: str = "grow", vm: str = "web") -> Move:
    return Move(at_s, vm, was * MIB, now * MIB, (why,))


PICTURE = Picture(
    title="a title",
    progress="3 of 54 s",
    guests=(a_guest("web"), a_guest("db", actual=100, available=2)),
    budget=300 * MIB,
    log=tuple(move(at, 100, 120) for at in range(40)),
    hint="a hint",
)


def paint(text: str, colour: str) -> str:
    return f"\x1b[{colour}]{text}\x1b[/]"


def unpainted(line: str) -> str:
    return re.sub(r"\x1b\[[a-z/]*\]", "", line)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 10, 11, 24, 60])
@pytest.mark.parametrize("columns", [1, 5, 20, 33, 40, 60, 80, 200])
def test_a_picture_fits_a_terminal_of_any_size(columns: int, rows: int) -> None:
    lines = drawn(PICTURE, columns, rows, paint=paint)
    assert 0 < len(lines) <= rows
    assert all(len(unpainted(line)) <= columns for line in lines)
    assert unpainted(lines[0]) == f"a title{' ' * max(1, columns - 16)}3 of 54 s"[:columns]


def test_bars_are_in_proportion_to_what_a_guest_holds_has_and_could_have() -> None:
    text = drawn(replace(PICTURE, guests=(a_guest(actual=96, available=48),)), 4 + 32 + 20 + 13, 24)
    bar = re.search(r"web +(█*)(▒*)(·*) +(\d+) +(\d+) +(\d+)  (.*)", "\n".join(text))
    assert bar
    assert [len(part) for part in bar.groups()[:3]] == [8, 8, 16]
    assert bar.groups()[3:] == ("48", "96", "192", "give")


def test_the_budget_is_marked_on_the_sum_and_red_only_if_exceeded() -> None:
    def mark(budget: int) -> str:
        lines = drawn(replace(PICTURE, budget=budget * MIB), 80, 24, paint=paint)
        (line,) = (line for line in lines if unpainted(line).startswith("all"))
        found = re.search(r"\x1b\[(\w+)\]│\x1b", line)
        assert found
        return found[1]

    assert (mark(300), mark(200)) == ("green", "red")


def test_a_guest_that_is_nearly_out_of_memory_is_red_and_an_offline_one_is_named_so() -> None:
    picture = replace(PICTURE, guests=(*PICTURE.guests, replace(a_guest("mail"), health="offline")))
    lines = {unpainted(line)[:4].strip(): line for line in drawn(picture, 80, 24, paint=paint)}
    assert "\x1b[green]" in lines["web"]
    assert "\x1b[red]" in lines["db"]
    assert "offline" in lines["mail"]
    assert "give" not in lines["mail"]


def test_a_guest_of_which_nothing_is_known_has_no_figures() -> None:
    unknown = PublishedGuest("web", None, None, None, "unknown", None)
    lines = drawn(replace(PICTURE, guests=(unknown,)), 80, 24)
    assert re.search(r"^web +- +- +-  unknown$", "\n".join(lines), re.MULTILINE)


def test_control_characters_are_not_drawn() -> None:
    picture = replace(
        PICTURE,
        title="t\x1b[2J",
        guests=(replace(a_guest("we\x1b]0;b\x07"), why="gi\nve"),),
        log=(Note(1.0, "a\r\nb\x9b"), move(2.0, 1, 2, "x\x1b[1m", vm="we\x1bb")),
        hint="\x07",
    )
    assert all(character.isprintable() for line in drawn(picture, 80, 24) for character in line)


def test_the_newest_of_the_log_is_kept_where_there_is_little_room() -> None:
    picture = replace(PICTURE, log=tuple(Note(at, f"thing {at}.") for at in range(40)))
    text = "\n".join(drawn(picture, 80, 14))
    assert "thing 39." in text
    assert "thing 30." not in text


def test_a_picture_can_be_drawn_in_ascii() -> None:
    assert all(line.isascii() for line in drawn(PICTURE, 80, 24, glyphs=ASCII))


def test_moves_of_one_guest_in_one_direction_within_a_short_time_are_merged() -> None:
    moves = [
        move(1.0, 100, 120),
        move(1.1, 90, 80, "give", vm="db"),
        move(2.5, 120, 150, "emergency"),
        move(4.0, 150, 160, "emergency"),
        move(4.1, 160, 140, "give"),
        move(9.0, 140, 120, "give"),
    ]
    found = [(one.at_s, one.vm, one.was // MIB, one.now // MIB, one.whys) for one in merged(moves)]
    assert found == [
        (1.0, "web", 100, 160, ("grow", "emergency")),
        (1.1, "db", 90, 80, ("give",)),
        (4.1, "web", 160, 140, ("give",)),
        (9.0, "web", 140, 120, ("give",)),
    ]


def test_a_known_reason_is_explained() -> None:
    assert reason(("grow", "emergency")) == f"grow, emergency: {MEANINGS['emergency']}"
    assert reason(("a-new-word",)) == "a-new-word"


def test_a_moves_line_names_the_growing_and_the_shrinking_guests() -> None:
    moves = [move(1, 90, 80, "give", vm="db"), move(1, 70, 60, "give", vm="mail"), move(1, 100, 120)]
    text = moves_line(moves, ", ".join)
    assert text == "web 100 -> 120 MiB (grow); db 90 -> 80, mail 70 -> 60 MiB (give)"


def test_the_screen_is_restored_when_drawing_fails() -> None:
    stream = io.StringIO()

    def draw_and_fail() -> None:
        with screen.whole_screen(stream) as taken:
            taken.draw(["a", "b"])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        draw_and_fail()
    drawn_text = "\x1b[Ha\x1b[K\r\nb\x1b[K\x1b[J"
    assert stream.getvalue() == f"\x1b[?1049h\x1b[?25l{drawn_text}\x1b[0m\x1b[?25h\x1b[?1049l"
    assert screen.Screen(stream).size() == (80, 24), "without a terminal size"


def test_a_picture_is_only_for_a_terminal_that_can_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert screen.can_draw(Terminal())
    assert not screen.can_draw(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not screen.can_draw(Terminal())


def test_without_colour_nothing_is_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any("\x1b" in line for line in drawn(PICTURE, 80, 24, paint=coloured))


def test_the_demand_grows_at_the_rate_and_falls_at_once() -> None:
    steps = (Step(10, 44), Step(20, 8))
    demands = [wanted(steps, at_s) / MIB for at_s in (0, 10, 11, 12, 13, 19.9, 20, 30)]
    assert demands == [8, 8, 20, 32, 44, 44, 8, 8]
    assert [step_at(steps, at_s).mib for at_s in (0, 10, 19, 20)] == [IDLE_MIB, 44, 44, 8]


def test_the_demands_of_the_script_fit_the_budget_but_not_all_fit_an_equal_part() -> None:
    moments = [tenth / 10 for tenth in range(int(PLAYED_S * 10))]
    sums = [sum(wanted(steps, at_s) + KERNEL for steps in SCRIPT.values()) for at_s in moments]
    assert max(sums) < 0.9 * BUDGET
    largest = {name: max(wanted(SCRIPT[name], at_s) for at_s in moments) + KERNEL for name in NAMES}
    assert {name for name, size in largest.items() if size > EQUAL_PART} == {"web", "build"}
    assert max(largest.values()) < SIZE
    assert all(wanted(steps, PLAYED_S) == IDLE_MIB * MIB for steps in SCRIPT.values())


def test_an_outcome_counts_what_was_held_as_wanted_and_what_was_lent() -> None:
    outcome = Outcome()
    outcome.add(
        0.5, [EQUAL_PART + 20 * MIB, EQUAL_PART - 40 * MIB], [10 * MIB, 90 * MIB], [20 * MIB, 60 * MIB]
    )
    outcome.add(9.0, [EQUAL_PART] * 2, [0, 0], [20 * MIB, 60 * MIB])
    assert outcome.seconds == 1.5, "a gap between two samples counts as one second"
    assert outcome.work == 0.5 * 70 * MIB
    assert outcome.wanted == 1.5 * 80 * MIB
    assert (outcome.most_lent, outcome.most) == (20 * MIB, 2 * EQUAL_PART)
    assert outcome.lent_on_average == round(20 * MIB / 3)
    assert outcome.work_percent == 29


def test_a_comparison_states_both_results_whichever_is_better() -> None:
    better = Outcome(work=9.996, wanted=10, seconds=2, lent=80 * MIB, most_lent=50 * MIB)
    worse = Outcome(work=5, wanted=10, kills=2)
    text = compared(better, worse)
    assert "moved by need, no work was killed and 99 % of" in text, "not 100: some of it was missing"
    assert "split equally, work was killed twice and 50 % was held" in text
    assert "2.00 times the work, with 40 MiB on average (at most 50) lent" in text
    text = compared(worse, better)
    assert "moved by need, work was killed twice" in text
    assert "0.50 times the work" in text
