"""Any trace file is a trace or a documented error; on random hosts all invariants hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from qmpballoon.errors import ConfigurationError
from qmpballoon.policy.registry import SIMULATED, simulated
from qmpballoon.sim.guest import Behaviour
from qmpballoon.sim.host import Host, play
from qmpballoon.sim.trace import Demand, Trace, TraceVm, parse_trace
from qmpballoon.units import MIB

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
times = st.floats(0, 100).map(lambda at_s: round(at_s, 3))


@st.composite
def traces(draw: st.DrawFn, most_vms: int = 4) -> Trace:
    vms = []
    for n in range(draw(st.integers(1, most_vms))):
        size = draw(st.integers(64, 2048)) * MIB
        ceiling = draw(st.integers(size // 2, size))
        rows = [
            Demand(at_s, draw(st.integers(0, size)), draw(st.integers(0, size)))
            for at_s in sorted(draw(st.lists(times, min_size=1, max_size=6)))
        ]
        vms.append(
            TraceVm(
                name=f"vm{n}",
                size=size,
                floor=draw(st.integers(0, ceiling)),
                ceiling=ceiling,
                shares=draw(st.integers(1, 10_000)),
                base=draw(st.integers(0, size // 2)),
                deflate_on_oom=draw(st.booleans()),
                inflate_bytes_per_s=draw(st.floats(MIB, 1024 * MIB)),
                deflate_bytes_per_s=draw(st.floats(MIB, 1024 * MIB)),
                stats_interval_s=draw(st.sampled_from([0.5, 1.0, 2.0, 5.0])),
                behaviour=draw(st.sampled_from(list(Behaviour))),
                limit=draw(st.integers(1, size)),
                boots_at_s=draw(st.sampled_from([0.0, 0.0, 3.0])),
                resets_at_s=tuple(sorted(draw(st.lists(times, max_size=2)))),
                demand=tuple(rows),
            )
        )
    budget = max(MIB, int(sum(vm.size for vm in vms) * draw(st.floats(0.1, 1.2))))
    return Trace(name="t", about="", duration_s=25.0, mem_total=2 * budget, budget=budget, vms=tuple(vms))


def parsed(content: bytes) -> Trace | ConfigurationError:
    try:
        return parse_trace(content, source="x.json")
    except ConfigurationError as error:
        return error


@given(content=st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_a_trace_or_a_documented_error(content: bytes) -> None:
    found = parsed(content)
    assert found.vms if isinstance(found, Trace) else found.problems


@settings(max_examples=60)
@given(trace=traces(), data=st.data())
def test_a_trace_with_one_random_value_is_a_trace_or_an_error_with_a_reason(
    trace: Trace, data: st.DataObject
) -> None:
    document = trace.document()
    vms = document["vms"]
    assert isinstance(vms, list)
    places = [document, document["host"], vms[0]]
    where = data.draw(st.sampled_from(places))
    where[data.draw(st.sampled_from(sorted(where)))] = data.draw(anything)
    found = parsed(json.dumps(document).encode())
    if isinstance(found, Trace):
        assert found.duration_s > 0
        assert all(vm.floor <= vm.ceiling <= vm.size for vm in found.vms)
    else:
        assert all(problem.reason for problem in found.problems)


@settings(max_examples=40)
@given(trace=traces())
def test_a_written_trace_is_read_back(trace: Trace) -> None:
    assert parse_trace(json.dumps(trace.document()).encode(), source="x.json") == trace


@settings(max_examples=40)
@given(trace=traces(), name=st.sampled_from(SIMULATED), seed=st.integers(0, 9))
def test_on_any_host_the_invariants_hold_and_the_figures_are_finite(
    trace: Trace, name: str, seed: int
) -> None:
    run = play(trace, simulated(name), host=Host(seed=seed))
    figures = run.figures
    numbers = [value for value in figures.document().values() if isinstance(value, int | float)]
    assert all(math.isfinite(value) and value >= 0 for value in numbers)
    assert figures.shortfall_percent <= 100
    assert figures.vms_killed <= min(figures.oom_kills, len(trace.vms))
    assert figures.starved_vm_s <= trace.duration_s * len(trace.vms) + 1e-6


@settings(max_examples=15)
@given(trace=traces(), name=st.sampled_from(("fixed", "proxmox", "mom", "qubes", "proportional")))
def test_no_guest_that_fits_is_killed_if_memory_is_enough_for_all(trace: Trace, name: str) -> None:
    vms = tuple(
        replace(
            vm,
            floor=vm.size,
            ceiling=vm.size,
            behaviour=Behaviour.IDEAL,
            demand=tuple(replace(row, anonymous=min(row.anonymous, vm.size // 3)) for row in vm.demand),
        )
        for vm in trace.vms
    )
    plenty = replace(trace, vms=vms, budget=2 * sum(vm.size for vm in vms))
    assert play(plenty, simulated(name)).figures.oom_kills == 0
