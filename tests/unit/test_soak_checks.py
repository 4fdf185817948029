"""The checks of the soak find what they are for, and excuse only what an absence explains."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from soak_parts.agent import Agent, Use
from soak_parts.checks import Meters, differences, judge_moves
from soak_parts.clients import Observer
from soak_parts.journal import AGENT, BROKER, Journal
from soak_parts.ledger import ANSWER_S, Ledger
from soak_parts.log_check import DISK, LogCheck
from soak_parts.vms import Moved, SimulatedVm, SoakVm, Truth
from soak_parts.wall_clock import WallClock

from qmpballoon.units import MIB

STAMP = "2026-11-27T11:10:26.962Z"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal(clock: Clock) -> Journal:
    return Journal(lambda line: None, clock)


def invariants(journal: Journal) -> list[str]:
    return [violation.invariant for violation in journal.violations]


# ---- requests ----


@pytest.mark.parametrize(("answers", "found"), [(0, ["one answer"]), (1, []), (2, ["one answer"])])
def test_a_request_has_one_answer(clock: Clock, journal: Journal, answers: int, found: list[str]) -> None:
    ledger = Ledger(journal)
    ledger.sent(b"1", "asker", "get", wait_s=4)
    for _ in range(answers):
        ledger.answered(b"1", "ok")
    clock.advance(4 + ANSWER_S)
    ledger.judge()
    assert invariants(journal) == found


@pytest.mark.parametrize("who", [AGENT, BROKER, "asker"])
@pytest.mark.parametrize(("away_after_s", "found"), [(0.1, []), (20, ["one answer"])])
def test_only_an_absence_near_a_request_excuses_it(
    clock: Clock, journal: Journal, who: str, away_after_s: float, found: list[str]
) -> None:
    ledger = Ledger(journal)
    ledger.sent(b"1", "asker", "get", wait_s=0)
    clock.advance(away_after_s)
    with journal.absences.of(who):
        clock.advance(1)
    clock.advance(ANSWER_S)
    ledger.judge()
    assert invariants(journal) == found


def test_absences_of_one_party_may_overlap(clock: Clock, journal: Journal) -> None:
    first = journal.absences.begin(AGENT)
    clock.advance(1)
    with journal.absences.of(AGENT):
        clock.advance(1)
    clock.advance(10)
    assert journal.absences.any(AGENT, clock.now_s, clock.now_s)
    journal.absences.end(AGENT, first)
    clock.advance(1)
    assert not journal.absences.any(AGENT, clock.now_s, clock.now_s)
    assert not journal.absences.any(BROKER, 0, clock.now_s)


# ---- the log ----


def read(journal: Journal, directory: Path, *lines: str) -> LogCheck:
    log = directory / "agent.log"
    log.write_text("".join(f"{line}\n" for line in lines))
    check = LogCheck(log, journal)
    check.finish()
    return check


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (f"{STAMP} INFO agent-started host=soak", []),
        (f"{STAMP} WARNING session-lost vm=a socket=/a: QEMU closed the monitor", []),
        (f"{STAMP} WARNING news vm=a", ["expected log lines"]),
        (f"{STAMP} ERROR session-lost vm=a", ["expected log lines"]),
        (f"{STAMP} ERROR reload-refused: the old one stays", ["expected log lines"]),
        (f"{STAMP} CRITICAL crashed: a bug in this program", ["expected log lines"]),
        ("Traceback (most recent call last):", ["no bug"]),
        ("/x.py:1: RuntimeWarning: coroutine 'y' was never awaited", ["no bug"]),
    ],
)
def test_bugs_and_unexpected_levels_are_found(
    journal: Journal, tmp_path: Path, line: str, found: list[str]
) -> None:
    read(journal, tmp_path, line)
    assert invariants(journal) == found


def test_an_error_is_expected_after_its_cause(clock: Clock, journal: Journal, tmp_path: Path) -> None:
    with journal.absences.of(DISK):
        clock.advance(1)
    read(journal, tmp_path, f"{STAMP} ERROR state-not-saved file=/a reason=x: what is set now would be lost")
    assert invariants(journal) == []


def test_a_traceback_is_one_violation_with_all_its_lines(journal: Journal, tmp_path: Path) -> None:
    read(journal, tmp_path, "Traceback:", "  File x", "ValueError: y", f"{STAMP} INFO agent-started host=a")
    assert [violation.text for violation in journal.violations] == [
        "Traceback:\n      File x\n    ValueError: y"
    ]


def test_a_move_right_after_a_restart_for_a_silence_that_cannot_be_is_found(
    journal: Journal, tmp_path: Path
) -> None:
    moved = f'{STAMP} INFO target vm=a was="64 MiB" now="80 MiB" why='
    check = read(
        journal, tmp_path, f"{STAMP} INFO agent-started host=soak", f"{moved}grow", f"{moved}long-stale"
    )
    assert invariants(journal) == ["no move after a restart"]
    assert [now for _, now in check.targets["a"]] == ["80 MiB", "80 MiB"]


# ---- balloons ----


def judged(
    clock: Clock,
    journal: Journal,
    *,
    decided: list[tuple[float, int]] | None = None,
    logged: list[tuple[float, str]] | None = None,
) -> None:
    """Judge a command of 64 MiB that a QEMU received now, and that was told as given, seconds later."""
    began_s = clock.now_s
    vm = SimpleNamespace(moves=deque([Moved("a", began_s, 64 * MIB)]))
    decisions = [(began_s + later_s, to) for later_s, to in decided or ()]
    targets = [(began_s + later_s, now) for later_s, now in logged or ()]
    observer = SimpleNamespace(name="observer", decisions={"a": decisions})
    log = SimpleNamespace(targets={"a": targets}, not_sent={"a": []})
    clock.advance(60)
    judge_moves([cast("SimulatedVm", vm)], cast("Observer", observer), cast("LogCheck", log), journal)
    assert not vm.moves


def test_a_command_with_a_decision_or_a_log_line_is_explained(clock: Clock, journal: Journal) -> None:
    judged(clock, journal, decided=[(0.1, 64 * MIB)])
    judged(clock, journal, logged=[(0.1, "64 MiB")])
    assert invariants(journal) == []


def test_a_command_that_nobody_told_is_found(clock: Clock, journal: Journal) -> None:
    judged(clock, journal)
    judged(clock, journal, decided=[(0.1, 65 * MIB), (50, 64 * MIB)], logged=[(0.1, "65 MiB")])
    assert invariants(journal) == ["no balloon moves unasked"] * 2


def test_a_command_is_not_judged_while_messages_are_lost(clock: Clock, journal: Journal) -> None:
    with journal.absences.of(BROKER):
        judged(clock, journal)
    assert invariants(journal) == []


# ---- what is retained ----


def a_vm(truth: Truth) -> SoakVm:
    async def ask() -> Truth:
        return truth

    return cast("SoakVm", SimpleNamespace(name="a", truth=ask))


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        ({}, set()),
        ({"status": "offline"}, {"the agent"}),
        ({"vms": []}, {"a"}),
        ({"vm/a/availability": "offline"}, {"a"}),
        ({"vm/a/state": ""}, {"a"}),
        ({"vm/a/state": {"actual": 5, "run_state": "paused", "target": 7, "health": "ok"}}, {"a"}),
        ({"vm/a/state": {"actual": 6, "run_state": "running", "target": 7, "health": "ok"}}, {"a"}),
        ({"vm/a/state": {"actual": 5, "run_state": "running", "target": 8, "health": "ok"}}, {"a"}),
        ({"vm/a/state": {"actual": 5, "run_state": "running", "target": None, "health": "ok"}}, set()),
        ({"vm/b/state": {"actual": 5}}, {"b"}),
    ],
)
async def test_a_difference_from_the_second_monitor_is_found(
    clock: Clock, journal: Journal, changed: dict[str, Any], differs: set[str]
) -> None:
    state = {"actual": 5, "run_state": "running", "target": 7, "health": "ok"}
    found = {"status": "online", "vms": [{"vm": "a"}], "vm/a/availability": "online", "vm/a/state": state}
    truth = Truth(5, "running", Moved("a", clock.now_s, 7))
    assert set(await differences([a_vm(truth)], {**found, **changed}, journal)) == differs


async def test_a_target_that_was_sent_while_the_disk_was_full_may_be_forgotten(
    clock: Clock, journal: Journal
) -> None:
    state = {"actual": 5, "run_state": "running", "target": 8, "health": "ok"}
    found = {"status": "online", "vms": [{"vm": "a"}], "vm/a/availability": "online", "vm/a/state": state}
    with journal.absences.of(DISK):
        truth = Truth(5, "running", Moved("a", clock.now_s, 7))
        clock.advance(1)
    assert await differences([a_vm(truth)], found, journal) == {}


# ---- the clock ----


def test_only_the_wall_clock_of_the_program_jumps(tmp_path: Path) -> None:
    clock = WallClock(tmp_path)
    if not clock.works:
        pytest.skip("no C compiler")
    program = "import time; print(time.time(), time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME))"
    for jump_s in (0, 86_400, -86_400):
        clock.jump(jump_s)
        before = [time.time(), time.monotonic(), time.clock_gettime(time.CLOCK_BOOTTIME)]
        command = ["env", *clock.environment, sys.executable, "-c", program]
        done = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
        wall_s, *others_s = (
            now - was for now, was in zip(map(float, done.stdout.split()), before, strict=True)
        )
        assert abs(wall_s - jump_s) < 3600
        assert all(0 <= other_s < 3600 for other_s in others_s)


# ---- what the agent uses ----


@pytest.mark.parametrize(
    ("last", "found"),
    [
        (Use(430, 4, 60 * MIB), []),
        (Use(470, 4, 60 * MIB), ["flat use"]),
        (Use(430, 9, 60 * MIB), ["flat use"]),
        (Use(430, 4, 90 * MIB), ["flat use"]),
    ],
)
def test_growth_is_found(journal: Journal, last: Use, found: list[str]) -> None:
    meters = Meters(journal)
    for use in (*[Use(428, 3, 48 * MIB)] * 8, last):
        meters.take(cast("Agent", SimpleNamespace(use=lambda use=use: use)))
    assert invariants(journal) == found


def test_only_the_first_violations_of_an_invariant_are_listed(journal: Journal) -> None:
    for number in range(100):
        journal.violation("some", str(number))
    journal.violation("other", "x")
    assert (journal.found, len(journal.violations)) == (101, 21)
