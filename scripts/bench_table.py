"""The figures of ``make bench`` as one table, each with its aim. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from bench_figures import Attach, Case, Scene, Turns, Window, cost_us, spread
from bench_mqtt import Latency
from bench_processes import Memory

from qmpballoon.units import MIB

MOST_TIMES_BARE: Final = {"quiet": (1.5, 100), "busy": (5.0, 500)}  # with that many VMs, or more
MOST_ONLINE_S: Final = {500: 1.0, 1000: 3.0}
MOST_MEMORY: Final = {500: 60 * MIB, 1000: 90 * MIB}
MOST_TIMES_ALONE: Final = 1.2
MOST_LATE_S: Final = 0.1  # p99 of the gaps between samples, beside mute and stopped QEMUs
MOST_ONLINE_TENTH_S: Final = 30.0
MOST_ADDED_S: Final = 0.005
MOST_GET_S: Final = 0.06
MOST_HELP_S: Final = 0.3


@dataclass(slots=True)
class Figures:
    """All measurements of one run; what was not measured is empty or None."""

    machine: str
    window_s: float
    scenes: list[Scene] = field(default_factory=list)
    neighbours: list[Case] = field(default_factory=list)
    tenth: Case | None = None
    busy_start: Case | None = None
    idle: Memory | None = None
    latency: list[Latency] = field(default_factory=list)
    help_s: list[float] = field(default_factory=list)
    python_s: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # a sentence for each scene without figures
    lasted_s: float = 0.0


def table(figures: Figures) -> str:
    """Return the figures as text."""
    parts = [
        [figures.machine, *_noise(figures.scenes)],
        _sampling(figures),
        _cases(figures),
        _start(
            figures.tenth,
            f"the agent with a tenth of a core ({figures.tenth.name if figures.tenth else ''})",
            MOST_ONLINE_TENTH_S,
        ),
        _start(figures.busy_start, "all figures change from the start", _most_online_s(figures.busy_start)),
        _attaching(figures),
        _requests(figures),
        [f"NOT MEASURED: {sentence}" for sentence in figures.failed],
        [f"{figures.lasted_s:.0f} s"],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _noise(scenes: Sequence[Scene]) -> list[str]:
    spreads = [spread(turns.bare) for seen in scenes for turns in (seen.quiet, seen.busy)]
    if not spreads:
        return []
    return [
        f"noise of this machine: the turns of the bare client differ by {median(spreads):.0%} (median),"
        f" {max(spreads):.0%} (most)"
    ]


# ---- samples ----


def _sampling(figures: Figures) -> list[str]:
    if not figures.scenes:
        return []
    lines = [
        f"processor time per sample of a VM, one a second, agent with MQTT; {figures.window_s:g} s per turn",
        f"  {'VMs':>5}  {'load':5}  {'bare client':>18}  {'agent':>10}  {'ratio':>7}"
        f"  {'bare, in a burst':>16}  {'taken':>6}  {'late p99':>9}  {'longest gap':>11}  {'simulation':>10}",
    ]
    for seen in figures.scenes:
        lines += [_load(seen, "quiet", seen.quiet), _load(seen, "busy", seen.busy)]
    return lines


def _load(seen: Scene, load: str, turns: Turns) -> str:
    bare, agent = cost_us(turns.bare), cost_us(turns.agent)
    start = f"  {seen.vms:>5}  {load:5}  {_us(bare):>10} ±{spread(turns.bare) / 2:>5.0%}"
    if agent is None or bare is None:
        return f"{start}  {_not_online(seen.attach)}"
    most, least_vms = MOST_TIMES_BARE[load]
    verdict = f"   {_verdict(agent / bare <= most, f'{most:g} x')}" if seen.vms >= least_vms else ""
    simulation = median(window.simulation for window in turns.agent)
    burst = seen.burst.cost_us
    at_once = f"{_us(burst)} {agent / burst:>4.1f} x" if burst and turns is seen.quiet else ""
    return (
        f"{start}  {_us(agent):>10}  {agent / bare:>5.1f} x  {at_once:>16}"
        f"  {_late(turns.agent)}  {simulation:>9.0%}{verdict}"
    )


def _cases(figures: Figures) -> list[str]:
    lines = []
    alone = cost_us(figures.neighbours[0].windows) if figures.neighbours else None
    for number, case in enumerate(figures.neighbours):
        start = f"  {case.vms:>5}  {case.name:12}"
        cost = cost_us(case.windows)
        if cost is None or alone is None:
            lines.append(f"{start}  {_not_online(case.attach)}")
            continue
        late = case.windows[0].late_p99_s
        verdicts = [
            _verdict(cost / alone <= MOST_TIMES_ALONE, f"{MOST_TIMES_ALONE:g} x"),
            _verdict(late is not None and late <= MOST_LATE_S, f"{MOST_LATE_S * 1e3:.0f} ms"),
        ]
        online = "" if case.attach.online_s is not None else f"   {_not_online(case.attach)}"
        ending = f"   {', '.join(verdicts)}{online}" if number else ""
        lines.append(f"{start}  {_us(cost):>10}  {cost / alone:>5.1f} x  {_late(case.windows)}{ending}")
    if lines:
        lines.insert(0, "VMs beside others that do not respond: processor time per sample of theirs")
    return lines


def _start(case: Case | None, title: str, most_s: float | None) -> list[str]:
    if case is None:
        return []
    online_s = case.attach.online_s
    verdict = ""
    if most_s is not None:
        verdict = _verdict(online_s is not None and online_s <= most_s, f"{most_s:g} s")
    lines = [
        f"{case.vms} VMs, {title}",
        f"  online {_online(case.attach)}   {verdict}",
    ]
    for number, window in enumerate(case.windows, 1):
        lines.append(f"  window {number}: {_us(window.cost_us):>10}  {_late([window])}")
    return lines


def _most_online_s(case: Case | None) -> float | None:
    return None if case is None else MOST_ONLINE_S.get(case.vms)


def _late(windows: Sequence[Window]) -> str:
    late = max((window.late_p99_s for window in windows if window.late_p99_s is not None), default=None)
    gap = max((window.longest_gap_s for window in windows if window.longest_gap_s is not None), default=None)
    rate = median(window.rate for window in windows)
    return (
        f"{rate:>6.0%}  {'-' if late is None else f'{late * 1e3:.0f} ms':>9}"
        f"  {'-' if gap is None else f'{gap:.2f} s':>11}"
    )


# ---- attaching and memory ----


def _attaching(figures: Figures) -> list[str]:
    lines = []
    if figures.scenes:
        lines += [
            "from the agent's start until every VM is online on MQTT; and its memory",
            f"  {'VMs':>5}  {'start-up':>8}  {'online':>28}  {'processor':>9}  {'RSS':>9}  {'PSS':>9}",
        ]
    if figures.idle is not None:
        lines.append(f"  {0:>5}  {'':8}  {'':28}  {'':9}  {_memory(figures.idle)}")
    for seen in figures.scenes:
        attach = seen.attach
        verdicts = []
        if seen.vms in MOST_ONLINE_S:
            most_s = MOST_ONLINE_S[seen.vms]
            verdicts.append(
                _verdict(attach.online_s is not None and attach.online_s <= most_s, f"{most_s:g} s")
            )
        if seen.vms in MOST_MEMORY:
            most = MOST_MEMORY[seen.vms]
            verdicts.append(_verdict(seen.memory.rss <= most, f"{most // MIB} MiB"))
        lines.append(
            f"  {seen.vms:>5}  {attach.started_s:>6.2f} s  {_online(attach):>28}  {attach.cpu_s:>7.2f} s"
            f"  {_memory(seen.memory)}   {', '.join(verdicts)}".rstrip()
        )
    return lines


def _online(attach: Attach) -> str:
    return _not_online(attach) if attach.online_s is None else f"{attach.online_s:.2f} s"


def _not_online(attach: Attach) -> str:
    return f"not within {attach.limit_s:g} s: {attach.online} of {attach.vms}"


def _memory(memory: Memory) -> str:
    return f"{memory.rss / MIB:>5.1f} MiB  {memory.pss / MIB:>5.1f} MiB"


# ---- requests ----


def _requests(figures: Figures) -> list[str]:
    lines = []
    for seen in figures.latency:
        lines += [
            f"  mosquitto with {seen.broker}; a message to the same client takes {_ms(seen.echo_s)}",
            f"    a target over QMP {_ms(seen.direct_s)}, over MQTT {_ms(seen.mqtt_s)}:"
            f" {seen.added_s * 1e3:.2f} ms added   {_verdict(seen.added_s <= MOST_ADDED_S, '5 ms')}",
            f"    get of a calm VM over MQTT {_ms(seen.get_s)}, most {max(seen.get_s) * 1e3:.0f} ms"
            f"   {_verdict(median(seen.get_s) <= MOST_GET_S, '60 ms')}",
        ]
    if lines:
        rounds = min(len(seen.mqtt_s) for seen in figures.latency)
        lines.insert(0, f"requests, medians of {rounds} or more in turns")
    if figures.help_s:
        help_s, python_s = median(figures.help_s), median(figures.python_s)
        verdict = _verdict(help_s <= MOST_HELP_S, f"{MOST_HELP_S:g} s")
        lines += [
            "",
            f"qmpballoon --help {help_s:.3f} s, python -c pass {python_s:.3f} s: {help_s / python_s:.1f} x"
            f"   {verdict}",
        ]
    return lines if figures.latency else lines[1:]


def _us(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:.0f} µs"


def _ms(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1e3:.2f} ms"


def _verdict(reached: bool, aim: str) -> str:
    return f"aim {aim}: {'reached' if reached else 'MISSED'}"
