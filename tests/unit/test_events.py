"""QMP's events in the words that users see."""

from __future__ import annotations

from datetime import timedelta

import pytest

from qmpballoon.model.records import utc_now
from qmpballoon.qmp.events import translated


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("BALLOON_CHANGE", "balloon-change"),
        ("STOP", "stopped"),
        ("RESUME", "resumed"),
        ("RESET", "reset"),
        ("SHUTDOWN", "shutdown"),
        ("GUEST_PANICKED", "guest-panicked"),
    ],
)
def test_an_event_has_the_word_of_the_contract(name: str, word: str) -> None:
    event = translated(name, {"actual": 1})
    assert event.event == word
    assert event.data == {"actual": 1}
    assert abs(utc_now() - event.ts) < timedelta(minutes=1)
