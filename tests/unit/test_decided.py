"""Decisions with their figures: packed, kept in a bounded history, and told in words."""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Any

import pytest

from qmpballoon.model.names import VmId
from qmpballoon.model.records import GuestStats, Sample
from qmpballoon.policy.decided import FIGURES, MOST_KEPT, NO_FIGURES, Decided, Figures, History, figures_of
from qmpballoon.policy.estimate import Past
from qmpballoon.policy.reasons import KEPT_HOLDS, WORDS
from qmpballoon.policy.sentences import SENTENCES, circumstances, sentence
from qmpballoon.policy.snapshot import GuestSnapshot, Snapshot
from qmpballoon.units import MIB

SOME = Figures(size=256 * MIB, actual=91 * MIB, held=79 * MIB, available=12 * MIB, free=-5)


def a_guest(**changes: Any) -> GuestSnapshot:
    stats = GuestStats(total=240 * MIB, available=30 * MIB, caches=7 * MIB)
    guest = GuestSnapshot(
        id=VmId("web"),
        life="1-1",
        size=256 * MIB,
        actual=100 * MIB,
        target=100 * MIB,
        floor=64 * MIB,
        ceiling=256 * MIB,
        sample=Sample(stats, seen_at_s=10.0, actual=100 * MIB),
        rss=120 * MIB,
    )
    return replace(guest, **changes)


def test_figures_come_out_as_they_went_in_with_unknown_and_negative_ones() -> None:
    assert Decided(1.0, "grow", "sent", SOME, target=MIB).figures == SOME
    assert Decided(1.0, "grow", "held", NO_FIGURES).figures == NO_FIGURES


def test_a_figure_of_too_many_bits_is_the_largest() -> None:
    """Each of thousands of QEMUs may claim 2**53 bytes."""
    figures = Decided(1.0, "grow", "sent", Figures(used=2**70, free=-(2**70)), target=MIB).figures
    assert figures == Figures(used=2**63 - 1, free=-(2**63) + 1)


def test_a_history_keeps_the_newest_and_is_bounded() -> None:
    history = History()
    assert history.last(5) == ()
    for number in range(MOST_KEPT + 3):
        history.note(Decided(float(number), "grow", "sent", SOME))
    assert [each.at for each in history.last(2)] == [MOST_KEPT + 1, MOST_KEPT + 2]
    assert len(history.last(1000)) == MOST_KEPT
    assert history.last(1000)[0].at == 3


def test_figures_are_those_that_the_guard_believes() -> None:
    guest = a_guest()
    past = Past("1-1", 0.0, 10.0, held=60 * MIB, actual=100 * MIB, average=0, trend=8.0 * MIB, peak=0)
    host = Snapshot(
        now_s=10.0, guests=(guest,), budget=300 * MIB, mem_total=1000 * MIB, mem_available=150 * MIB
    )
    figures = figures_of(guest, past, host)
    assert (figures.held, figures.available, figures.growth) == (60 * MIB, 40 * MIB, 8 * MIB)
    assert (figures.used, figures.budget, figures.free) == (100 * MIB, 300 * MIB, 150 * MIB)
    assert (figures.caches, figures.rss) == (7 * MIB, 120 * MIB)
    assert figures_of(guest, past, replace(host, now_s=12.0)).growth < 8 * MIB  # type: ignore[operator]


def test_without_the_guard_they_are_the_guests_own_and_without_a_guest_none() -> None:
    figures = figures_of(a_guest())
    assert (figures.held, figures.available, figures.budget) == (70 * MIB, 30 * MIB, None)
    assert figures_of(None) == NO_FIGURES
    assert figures_of(a_guest(sample=None)).available is None


def test_every_word_has_a_sentence_and_no_sentence_is_of_another_word() -> None:
    assert set(SENTENCES) == set(WORDS)
    assert set(WORDS) > KEPT_HOLDS


@pytest.mark.parametrize("why", WORDS)
def test_every_sentence_can_be_said_with_all_figures_and_with_none(why: str) -> None:
    named = {name for _, name, _, _ in string.Formatter().parse(SENTENCES[why]) if name}
    assert named <= {*FIGURES, "headroom"}
    full = sentence(why, dict.fromkeys(FIGURES, 5 * MIB), to=7 * MIB)
    assert full.count("5 MiB") + full.count("2 MiB") == len(named) + ("12 MiB" in full)
    for text in (full, sentence(why, {})):
        assert text
        assert not text.endswith(".")
        assert "None" not in text
        assert " -" not in text


def test_a_sentence_has_the_figures_of_its_decision() -> None:
    figures = {"available": 12 * MIB, "held": 79 * MIB, "growth": 8 * MIB, "budget": 300 * MIB, "used": MIB}
    assert sentence("grow", figures, to=119 * MIB) == (
        "the guest had 12 MiB available of the 40 MiB that it should keep"
    )
    assert circumstances(figures) == [
        "it held 8 MiB more each second",
        "1 MiB of the budget of 300 MiB were used",
    ]
    assert circumstances({"growth": 1000, "budget": None, "used": 1}) == []


def test_a_word_of_a_newer_agent_is_told_as_it_is() -> None:
    assert sentence("sunspots", {}) == "the reason is sunspots"
