"""`top`: the figures of the last minutes, and the chart of them."""

from __future__ import annotations

from dataclasses import replace

from test_top_rows import row

from qmpballoon.top.columns import ASCII
from qmpballoon.top.history import MOST_POINTS, MOST_VMS, SPAN_S, STEP_S, History, chart
from qmpballoon.units import MIB


def test_a_figure_holds_until_the_next_and_is_unknown_before_the_first() -> None:
    history = History()
    history.add(row(actual=100 * MIB), 1000.0)
    history.add(row(actual=200 * MIB), 1000.0 + SPAN_S / 2)
    found = history.sampled("edge-7/web1", 1000.0 + 0.74 * SPAN_S, 4)
    assert [None if each is None else each[1] / MIB for each in found] == [None, 100, 100, 200]
    assert history.sampled("edge-7/other", 1000.0, 3) == [None, None, None]


def test_changes_within_a_step_are_one_point() -> None:
    history = History()
    history.add(row(actual=100 * MIB), 1000.0)
    history.add(row(actual=120 * MIB), 1000.0 + STEP_S / 2)
    assert history.sampled("edge-7/web1", 1000.0, 1) == [(256 * MIB, 120 * MIB, 51 * MIB)]


def test_points_and_vms_are_bounded() -> None:
    history = History()
    for number in range(MOST_POINTS + 50):
        history.add(row(), number * STEP_S)
    assert len(history._points["edge-7/web1"]) == 4 * MOST_POINTS
    made = row()
    for number in range(MOST_VMS + 10):
        history.add(replace(made, id=f"h/{number}"), 0.0)
    assert len(history._points) == MOST_VMS
    history.forget("edge-7/web1")
    history.add(replace(made, id="h/new"), 0.0)
    assert "h/new" in history._points


def test_a_chart_stacks_held_available_and_balloon() -> None:
    samples = [(8.0, 6.0, 2.0), (8.0, 4.0, -1.0), None, (8.0, -1.0, -1.0), (8.0, 8.0, 8.0)]
    lines = ["".join(text for text, _ in line) for line in chart(samples, 4, ASCII)]
    assert lines == [
        "..  #",
        "=.  #",
        "=|  #",
        "#|  #",
    ]
