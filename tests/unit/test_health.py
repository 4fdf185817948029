"""One word for how a VM is: the table of signs and words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.model.health import BOOT_S, FIRST_SAMPLE_S, Connection, Signs, health_of
from qmpballoon.model.records import HEALTH_WORDS

WELL = Signs(connection="up", driver_up=True, sample_age_s=1.0, fresh_for_s=60.0)

TABLE: list[tuple[dict[str, Any], str]] = [
    ({}, "ok"),
    ({"fresh_for_s": None}, "ok"),  # the life was known before: no grace is needed
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
def test_these_signs_mean_this_word(changes: dict[str, Any], word: str) -> None:
    assert health_of(replace(WELL, **changes)) == word


CONNECTIONS: list[Connection] = ["offline", "unresponsive", "busy"]
ALONE: dict[str, dict[str, Any]] = {
    "no-balloon": {"has_balloon": False},
    "migrating": {"migrating": True},
    "paused": {"run_state": "paused"},
    "starting": {"fresh_for_s": 0.0},
    "stale": {"sample_age_s": 99.0},
}


@given(words=st.sets(st.sampled_from([*ALONE, *CONNECTIONS]), min_size=1))
def test_of_several_that_are_true_the_first_is_said(words: set[str]) -> None:
    connections = [word for word in CONNECTIONS if word in words]
    changes = {key: value for word in words & ALONE.keys() for key, value in ALONE[word].items()}
    signs = replace(WELL, **changes, connection=connections[0] if connections else "up")
    assert health_of(signs) == min(words, key=HEALTH_WORDS.index)


@given(
    st.builds(
        Signs,
        connection=st.sampled_from(["offline", "unresponsive", "busy", "up"]),
        run_state=st.sampled_from(["running", "paused", "inmigrate", None]),
        sample_age_s=st.none() | st.floats(0, 100),
        fresh_for_s=st.none() | st.floats(0, 100),
        since_boot_s=st.floats(0, 100),
        since_driver_s=st.floats(0, 100),
    )
)
def test_any_signs_mean_a_word_of_the_contract(signs: Signs) -> None:
    assert health_of(signs) in set(HEALTH_WORDS) - {"untrusted", "uncooperative", "stuck"}
