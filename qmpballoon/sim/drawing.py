"""Draws a run as SVG: one panel for the host, one per VM.

Each panel shows memory over time: the VM's size, its actual, held memory and demand. Kills are crosses, moves
are small triangles below. No library is needed.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from qmpballoon.model.names import VmId
from qmpballoon.sim.host import Point, Run
from qmpballoon.units import GIB, MIB, format_size

MOST_PANELS: Final = 24
_WIDTH: Final = 1100.0
_LEFT: Final = 86.0
_RIGHT: Final = 24.0
_HOST_HEIGHT: Final = 170.0
_VM_HEIGHT: Final = 96.0
_HEAD: Final = 124.0
_GAP: Final = 52.0
_STYLE: Final = """\
text{font:12px system-ui,sans-serif;fill:#333}
.title{font-size:17px;font-weight:600}.about{fill:#666}.panel{font-weight:600}.small{font-size:11px;fill:#666}
.grid{stroke:#e6e6e6;stroke-width:1}.frame{fill:#fff;stroke:#bbb}
.size{fill:none;stroke:#999;stroke-width:1;stroke-dasharray:2 3}
.actual{fill:none;stroke:#1f5fa8;stroke-width:1.8}
.held{fill:#9cc3e6;fill-opacity:.55;stroke:none}
.demand{fill:none;stroke:#d1741b;stroke-width:1.3;stroke-dasharray:5 3}
.budget{fill:none;stroke:#b3261e;stroke-width:1.6}
.kill{stroke:#b3261e;stroke-width:2.2}.up{fill:#2e7d32}.down{fill:#6a4fa3}
"""
_LINES: Final = (
    ("size", "size", "line"),
    ("actual", "actual: what the VM has", "line"),
    ("held", "held: what its guest cannot give", "area"),
    ("demand", "demand, with page cache", "line"),
)


def draw(run: Run) -> str:
    """Return the SVG document of a recorded run. At most 24 VMs are drawn, by kills and moves."""
    names = _shown(run)
    left_out = len(run.points) - len(names)
    height = _HEAD + _HOST_HEIGHT + _GAP + len(names) * (_VM_HEIGHT + _GAP) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH:g}" height="{height:g}" '
        f'viewBox="0 0 {_WIDTH:g} {height:g}" role="img">',
        f"<title>{_escaped(run.trace.name)} under {_escaped(run.policy)}</title><style>{_STYLE}</style>",
        f'<rect width="{_WIDTH:g}" height="{height:g}" fill="#fafafa"/>',
        *_head(run, left_out),
    ]
    top = _HEAD
    moves = sum(step.target is not None for step in run.steps)
    sums = _sums(run)
    title = f"host: all {len(run.points)} VMs together, {moves} moves"
    panel = _Panel(
        run.trace.duration_s, max([run.trace.budget, *(point.size for point in sums)]), top, _HOST_HEIGHT
    )
    parts += panel.frame(title)
    parts += panel.curves(sums)
    parts += panel.level(run.trace.budget, f"budget {format_size(run.trace.budget)}")
    top += _HOST_HEIGHT + _GAP
    for name in names:
        points, kills = run.points[name], run.kills[name]
        moved = [step for step in run.steps if step.vm == name and step.target is not None]
        panel = _Panel(run.trace.duration_s, max(point.size for point in points), top, _VM_HEIGHT)
        parts += panel.frame(f"{name}: {_count(len(kills), 'kill')}, {_count(len(moved), 'move')}")
        parts += panel.curves(points)
        parts += panel.kills(kills, points)
        parts += panel.moves([(step.at_s, (step.target or 0) > step.actual) for step in moved])
        top += _VM_HEIGHT + _GAP
    return "\n".join([*parts, "</svg>", ""])


def _shown(run: Run) -> list[VmId]:
    """Return the VMs that get a panel, in the order of the trace."""
    moves = dict.fromkeys(run.points, 0)
    for step in run.steps:
        moves[step.vm] = moves.get(step.vm, 0) + (step.target is not None)
    ranked = sorted(run.points, key=lambda name: (-len(run.kills[name]), -moves[name]))
    chosen = set(ranked[:MOST_PANELS])
    return [name for name in run.points if name in chosen]


def _head(run: Run, left_out: int) -> Iterator[str]:
    found = run.figures
    title = _escaped(f"{run.trace.name} under {run.policy}")
    yield f'<text class="title" x="{_LEFT:g}" y="28">{title}</text>'
    yield f'<text class="about" x="{_LEFT:g}" y="48">{_escaped(run.trace.about)}</text>'
    summary = (
        f"{_count(found.oom_kills, 'kill')} in {_count(found.vms_killed, 'VM')}, "
        f"{found.starved_vm_s:.0f} VM-seconds starved, "
        f"{found.over_budget_mib_s:.0f} MiB·s over budget, {found.lent_mib:.0f} MiB lent, "
        f"{found.moves_per_vm_h:.0f} moves per VM and hour"
    )
    if left_out:
        summary += f"; {left_out} quieter VMs are not drawn"
    yield f'<text class="about" x="{_LEFT:g}" y="66">{_escaped(summary)}</text>'
    x = _LEFT
    for name, label, shape in _LINES:
        if shape == "area":
            yield f'<rect class="{name}" x="{x:g}" y="80" width="26" height="10"/>'
        else:
            yield f'<line class="{name}" x1="{x:g}" y1="85" x2="{x + 26:g}" y2="85"/>'
        yield f'<text x="{x + 32:g}" y="89">{label}</text>'
        x += 52 + 6.6 * len(label)
    for mark, label in (
        (_cross(x, 85), "kill"),
        (_triangle(x, 85, up=True), "grow"),
        (_triangle(x, 85, up=False), "shrink"),
    ):
        shift = 0 if label == "kill" else 56 if label == "grow" else 112
        yield f'<g transform="translate({shift + 6})">{mark}<text x="{x + 10:g}" y="89">{label}</text></g>'


class _Panel:
    """Axes with a scale, and the drawing inside them."""

    def __init__(self, duration_s: float, most: int, top: float, height: float) -> None:
        self.duration_s = duration_s
        self.step = _round_step(most * 1.05 / (4 if height > 120 else 2))
        self.most = max(most * 1.06, self.step)
        self.top, self.height = top, height

    def x(self, at_s: float) -> float:
        return _LEFT + at_s / self.duration_s * (_WIDTH - _LEFT - _RIGHT)

    def y(self, size: float) -> float:
        return self.top + self.height * (1 - size / self.most)

    def frame(self, title: str) -> Iterator[str]:
        right, bottom = _WIDTH - _RIGHT, self.top + self.height
        yield f'<text class="panel" x="{_LEFT:g}" y="{self.top - 6:g}">{_escaped(title)}</text>'
        area = f'x="{_LEFT:g}" y="{self.top:g}" width="{right - _LEFT:g}" height="{self.height:g}"'
        yield f'<rect class="frame" {area}/>'
        level = 0
        while level <= self.most:
            y = self.y(level)
            yield f'<line class="grid" x1="{_LEFT:g}" y1="{y:.1f}" x2="{right:g}" y2="{y:.1f}"/>'
            label = f"{level / GIB:g} GiB" if self.step >= GIB // 2 else f"{level // MIB} MiB"
            yield f'<text class="small" x="{_LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
            level += self.step
        unit_s, unit = (
            (1, "s") if self.duration_s <= 120 else (60, "min") if self.duration_s <= 7200 else (3600, "h")
        )
        between_s = _round_time(self.duration_s / unit_s / 10) * unit_s
        at_s = 0.0
        while at_s <= self.duration_s:
            x = self.x(at_s)
            yield f'<line class="grid" x1="{x:.1f}" y1="{self.top:g}" x2="{x:.1f}" y2="{bottom:g}"/>'
            last = at_s + between_s > self.duration_s
            label = f"{at_s / unit_s:g}{' ' + unit if last or at_s == 0 else ''}"
            yield f'<text class="small" x="{x:.1f}" y="{bottom + 24:g}" text-anchor="middle">{label}</text>'
            at_s += between_s

    def curves(self, points: Sequence[Point]) -> Iterator[str]:
        if not points:
            return
        first, last = self.x(points[0].at_s), self.x(points[-1].at_s)
        base = self.y(0)
        held = self._path(points, lambda point: point.held)
        yield f'<polygon class="held" points="{first:.1f},{base:.1f} {held} {last:.1f},{base:.1f}"/>'
        for name, value in (
            ("size", lambda point: point.size),
            ("demand", lambda point: point.demand),
            ("actual", lambda point: point.actual),
        ):
            yield f'<polyline class="{name}" points="{self._path(points, value)}"/>'

    def level(self, size: int, label: str) -> Iterator[str]:
        y, right = self.y(size), _WIDTH - _RIGHT
        yield f'<line class="budget" x1="{_LEFT:g}" y1="{y:.1f}" x2="{right:g}" y2="{y:.1f}"/>'
        yield f'<text x="{right - 6:g}" y="{y - 5:.1f}" text-anchor="end" style="fill:#b3261e">{label}</text>'

    def kills(self, times_s: Sequence[float], points: Sequence[Point]) -> Iterator[str]:
        for at_s in times_s:
            near = min(points, key=lambda point: abs(point.at_s - at_s))
            yield _cross(self.x(at_s), self.y(near.actual))

    def moves(self, moves: Sequence[tuple[float, bool]]) -> Iterator[str]:
        for at_s, up in moves:
            yield _triangle(self.x(at_s), self.top + self.height + (5 if up else 11), up=up)

    def _path(self, points: Sequence[Point], value: Callable[[Point], int]) -> str:
        return " ".join(f"{self.x(point.at_s):.1f},{self.y(value(point)):.1f}" for point in points)


def _sums(run: Run) -> list[Point]:
    """Return the sum of all VMs at each moment; a VM that has not booted yet counts as zero."""
    moments: dict[float, list[Point]] = {}
    for points in run.points.values():
        for point in points:
            moments.setdefault(point.at_s, []).append(point)
    return [
        Point(
            at_s,
            sum(point.size for point in points),
            sum(point.actual for point in points),
            sum(point.held for point in points),
            sum(point.demand for point in points),
            None,
        )
        for at_s, points in sorted(moments.items())
    ]


def _cross(x: float, y: float) -> str:
    return (
        f'<path class="kill" d="M{x - 4:.1f} {y - 4:.1f}L{x + 4:.1f} {y + 4:.1f}'
        f'M{x - 4:.1f} {y + 4:.1f}L{x + 4:.1f} {y - 4:.1f}"/>'
    )


def _triangle(x: float, y: float, *, up: bool) -> str:
    tip = -3 if up else 3
    return (
        f'<path class="{"up" if up else "down"}" '
        f'd="M{x - 3:.1f} {y - tip:.1f}L{x + 3:.1f} {y - tip:.1f}L{x:.1f} {y + tip:.1f}Z"/>'
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _round_step(size: float) -> int:
    step = 32 * MIB
    while step < size * 0.75:
        step *= 2
    return step


def _round_time(units: float) -> float:
    return next(
        (step for step in (1, 2, 5, 10, 15, 20, 30, 60) if step >= units), 60 * max(1, round(units / 60))
    )


def _escaped(text: str) -> str:
    """Return text of a trace escaped for XML, without control characters, which XML does not allow."""
    return html.escape("".join(character if character.isprintable() else "\ufffd" for character in text))
