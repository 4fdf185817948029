"""The figures of VMs over the last minutes, and a chart of them. Pure.

A change is one point; changes within STEP_S are one. The number of points and of VMs is bounded.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

from qmpballoon.top.columns import BLOCKS, Cell, Glyphs
from qmpballoon.top.rows import VmRow

STEP_S: Final = 2.5
MOST_POINTS: Final = 240
SPAN_S: Final = STEP_S * MOST_POINTS
MOST_VMS: Final = 2_000
_FIELDS: Final = 4  # time, size, actual, held
_NONE: Final = -1.0


class History:
    """The last points of VMs by their ids; of more than MOST_VMS, only those that came first."""

    def __init__(self) -> None:
        self._points: dict[str, array[float]] = {}

    def add(self, row: VmRow, now_s: float) -> None:
        """Add a VM's figures at a time on the monotonic clock, in seconds."""
        points = self._points.get(row.id)
        if points is None:
            if len(self._points) >= MOST_VMS:
                return
            points = self._points[row.id] = array("d")
        figures = [_figure(value) for value in (row.size, row.actual, row.held)]
        if points and now_s - points[-_FIELDS] < STEP_S:
            points[-_FIELDS + 1 :] = array("d", figures)
            return
        points.extend((now_s, *figures))
        del points[: -MOST_POINTS * _FIELDS]

    def forget(self, vm: str) -> None:
        """Drop the points of a VM that is gone."""
        self._points.pop(vm, None)

    def sampled(self, vm: str, now_s: float, count: int) -> list[tuple[float, float, float] | None]:
        """Return size, actual and held at ``count`` times up to now over SPAN_S; negative: not known.

        None: nothing was seen yet at that time.
        """
        points = self._points.get(vm) or array("d")
        found: list[tuple[float, float, float] | None] = []
        at, newest = 0, None
        for number in range(1, count + 1):
            until_s = now_s - SPAN_S * (1 - number / count)
            while at < len(points) and points[at] <= until_s:
                newest = (points[at + 1], points[at + 2], points[at + 3])
                at += _FIELDS
            found.append(newest)
        return found


def chart(
    samples: Sequence[tuple[float, float, float] | None], height: int, glyphs: Glyphs = BLOCKS
) -> list[list[Cell]]:
    """Return the lines of a chart, the top first: what a guest held, had available, and its balloon above."""
    columns = [_stack(sample, height, glyphs) for sample in samples]
    return [[column[height - 1 - line] for column in columns] for line in range(height)]


def _stack(sample: tuple[float, float, float] | None, height: int, glyphs: Glyphs) -> list[Cell]:
    if sample is None or sample[0] <= 0 or sample[1] < 0:
        return [(" ", "plain")] * height
    size, actual, held = sample
    has = min(height, round(actual / size * height))
    if held < 0:
        parts = [(glyphs.unknown, "unknown")] * has
    else:
        lowest = min(has, max(1, round(held / size * height)))
        parts = [(glyphs.held, "held")] * lowest + [(glyphs.available, "available")] * (has - lowest)
    return parts + [(glyphs.balloon, "balloon")] * (height - has)


def _figure(value: int | None) -> float:
    return _NONE if value is None or value < 0 else float(min(value, 2**53))
