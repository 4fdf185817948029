"""The health word of a VM: a table of facts and words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.model.facts import BootFacts, Connection, Seen, VmFacts
from qmpballoon.model.health import BOOT_S, FIRST_SAMPLE_S, health_of
from qmpballoon.model.names import VmId
from qmpballoon.model.records import HEALTH_WORDS, GuestStats, Sample
from qmpballoon.units import MIB

FIGURES = GuestStats(available=100 * MIB)
NOW_S = 1000.0


@dataclass(frozen=True)
class Case:
    """The facts that a VM's health depends on; times are seconds before now."""

    connection: Connection
    has_balloon: bool = True
    migrating: bool = False
    run_state: str | None = "running"
    driver_up: bool | None = None
    driver_reports: bool = True
    ever_reported: bool = True
    since_boot_s: float = 0.0
    since_driver_s: float = 0.0
    sample_age_s: float | None = None
    fresh_for_s: float | None = None  # None: no grace is needed
    grace_s: float = 3.0
    stats_interval_s: float = 2.0


def word_of(case: Case) -> str:
    sampled = case.sample_age_s is not None
    seen = Seen(
        run_state=case.run_state,
        migrating=case.migrating,
        has_balloon=case.has_balloon,
        driver=case.driver_up,
        driver_up=sampled if case.driver_up is None else case.driver_up,
        driver_since_s=NOW_S - case.since_driver_s,
        driver_reports=case.driver_reports,
        ever_reported=case.ever_reported,
        sample=None if case.sample_age_s is None else Sample(FIGURES, NOW_S - case.sample_age_s),
    )
    fresh_s = None if case.fresh_for_s is None else NOW_S - case.fresh_for_s
    booted_at_s = NOW_S - max(case.since_boot_s, case.since_driver_s)  # no driver is up before its guest
    boot = BootFacts(booted_at_s, fresh_s, needs_grace=fresh_s is not None)
    facts = VmFacts(
        id=VmId("a"),
        connection=case.connection,
        seen=seen,
        boot=boot,
        grace_s=case.grace_s,
        stats_interval_s=case.stats_interval_s,
    )
    return health_of(facts, NOW_S)


HEALTHY = Case(connection="up", driver_up=True, sample_age_s=1.0, fresh_for_s=60.0)

TABLE: list[tuple[dict[str, Any], str]] = [
    ({}, "ok"),
    ({"fresh_for_s": None}, "ok"),  # a life that was known before needs no grace
    ({"connection": "offline"}, "offline"),
    ({"connection": "unresponsive"}, "unresponsive"),
    ({"connection": "busy"}, "busy"),
    ({"has_balloon": False, "sample_age_s": None}, "no-balloon"),
    ({"migrating": True}, "migrating"),
    ({"run_state": "inmigrate"}, "migrating"),
    ({"run_state": "finish-migrate"}, "migrating"),
    ({"run_state": "paused"}, "paused"),
    ({"run_state": "prelaunch"}, "paused"),
    ({"run_state": "io-error"}, "paused"),
    ({"run_state": None}, "paused"),
    ({"sample_age_s": None, "driver_up": False, "since_boot_s": BOOT_S - 0.1}, "starting"),
    ({"sample_age_s": None, "driver_up": False, "since_boot_s": BOOT_S}, "no-driver"),
    ({"sample_age_s": None, "since_driver_s": FIRST_SAMPLE_S - 0.1}, "starting"),
    ({"sample_age_s": None, "since_driver_s": FIRST_SAMPLE_S}, "no-stats"),
    ({"sample_age_s": None, "driver_reports": False}, "no-stats"),
    ({"sample_age_s": None, "driver_up": None, "ever_reported": False}, "starting"),
    ({"sample_age_s": None, "driver_up": None, "ever_reported": False, "since_boot_s": BOOT_S}, "no-driver"),
    ({"sample_age_s": None, "driver_up": None, "since_driver_s": FIRST_SAMPLE_S}, "no-stats"),
    ({"fresh_for_s": 2.9}, "starting"),
    ({"fresh_for_s": 3.0}, "ok"),
    ({"fresh_for_s": 0.0, "grace_s": 0.0}, "ok"),
    ({"sample_age_s": 6.0}, "ok"),  # three intervals of two seconds
    ({"sample_age_s": 6.1}, "stale"),
    ({"sample_age_s": 5.0, "stats_interval_s": 1}, "ok"),
    ({"sample_age_s": 5.1, "stats_interval_s": 1}, "stale"),
    ({"sample_age_s": 6.1, "stats_interval_s": 10}, "ok"),
]


@pytest.mark.parametrize(("changes", "word"), TABLE)
def test_facts_give_a_health_word(changes: dict[str, Any], word: str) -> None:
    assert word_of(replace(HEALTHY, **changes)) == word


CONNECTIONS: list[Connection] = ["offline", "unresponsive", "busy"]
ALONE: dict[str, dict[str, Any]] = {
    "no-balloon": {"has_balloon": False},
    "migrating": {"migrating": True},
    "paused": {"run_state": "paused"},
    "starting": {"fresh_for_s": 0.0},
    "stale": {"sample_age_s": 99.0},
}


@given(words=st.sets(st.sampled_from([*ALONE, *CONNECTIONS]), min_size=1))
def test_the_first_true_health_word_wins(words: set[str]) -> None:
    connections = [word for word in CONNECTIONS if word in words]
    changes = {key: value for word in words & ALONE.keys() for key, value in ALONE[word].items()}
    case = replace(HEALTHY, **changes, connection=connections[0] if connections else "up")
    assert word_of(case) == min(words, key=HEALTH_WORDS.index)


@given(
    st.builds(
        Case,
        connection=st.sampled_from(["offline", "unresponsive", "busy", "up"]),
        run_state=st.sampled_from(["running", "paused", "inmigrate", None]),
        sample_age_s=st.none() | st.floats(0, 100),
        fresh_for_s=st.none() | st.floats(0, 100),
        since_boot_s=st.floats(0, 100),
        since_driver_s=st.floats(0, 100),
    )
)
def test_any_facts_give_a_documented_health_word(case: Case) -> None:
    assert word_of(case) in set(HEALTH_WORDS) - {"untrusted", "uncooperative", "stuck"}


def test_a_sample_without_fresh_since_is_still_in_the_grace_time() -> None:
    seen = Seen(driver=True, driver_up=True, sample=Sample(FIGURES, NOW_S))
    facts = VmFacts(id=VmId("a"), seen=seen, boot=BootFacts(NOW_S - 5, None, needs_grace=True))
    assert health_of(facts, NOW_S) == "starting"


@pytest.mark.parametrize("judged", ["untrusted", "uncooperative", "stuck"])
def test_the_guards_judgement_is_the_health_of_an_otherwise_ok_vm(judged: str) -> None:
    seen = Seen(driver=True, driver_up=True, sample=Sample(FIGURES, NOW_S))
    facts = VmFacts(id=VmId("a"), seen=seen, judged=judged)
    assert health_of(facts, NOW_S) == judged
    assert health_of(facts._replace(connection="busy"), NOW_S) == "busy"


def test_a_driver_that_is_proved_by_a_moving_balloon_and_reports_nothing() -> None:
    seen = Seen(driver=None, driver_up=True, ever_reported=False, driver_since_s=NOW_S - FIRST_SAMPLE_S)
    facts = VmFacts(id=VmId("a"), seen=seen, boot=BootFacts(NOW_S - BOOT_S))
    assert health_of(facts, NOW_S) == "no-stats"


def test_statistics_without_free_memory_are_no_stats() -> None:
    word = {
        name: health_of(
            VmFacts(
                id=VmId("a"),
                seen=Seen(driver=True, driver_up=True, sample=Sample(stats, NOW_S)),
                boot=BootFacts(NOW_S - 1000),
            ),
            NOW_S,
        )
        for name, stats in {
            "nothing": GuestStats(),  # Windows without its balloon service
            "total": GuestStats(total=512 * MIB),
            "free": GuestStats(total=512 * MIB, free=100 * MIB),  # Linux before 4.16
        }.items()
    }
    assert word == {"nothing": "no-stats", "total": "no-stats", "free": "ok"}
