"""The table of ``make bench``: every figure with its aim, and rows for what was not reached."""

from __future__ import annotations

from bench_figures import Attach, Case, Scene, Turns, Window
from bench_mqtt import Latency
from bench_processes import Memory
from bench_table import Figures, table

from qmpballoon.units import MIB


def a_window(cost_us: float | None = 50.0, late_p99_s: float = 0.01) -> Window:
    return Window(cost_us, rate=1.0, late_p99_s=late_p99_s, longest_gap_s=1.02, simulation=0.05)


def an_attach(vms: int, online_s: float | None = 0.9) -> Attach:
    return Attach(vms, vms if online_s else 7, limit_s=30.0, started_s=0.2, online_s=online_s, cpu_s=0.5)


def a_scene(vms: int, *, quiet_us: float = 70.0, busy_us: float = 400.0) -> Scene:
    bare = [a_window(48.0), a_window(52.0)]
    return Scene(
        vms,
        quiet=Turns(list(bare), [a_window(quiet_us)]),
        busy=Turns(list(bare), [a_window(busy_us)]),
        burst=a_window(20.0),
        attach=an_attach(vms),
        memory=Memory(rss=59 * MIB, pss=50 * MIB),
    )


def test_each_load_has_its_ratio_its_aim_and_the_noise() -> None:
    text = table(Figures("2 cores", 3.0, scenes=[a_scene(500)]))
    quiet, busy = (line for line in text.splitlines() if " quiet " in line or " busy " in line)
    assert " 1.4 x " in quiet
    assert quiet.endswith("aim 1.5 x: reached")
    assert busy.endswith("aim 5 x: MISSED")
    assert "aim 1 s: reached, aim 60 MiB: reached" in text
    assert "differ by 8% (median), 8% (most)" in text


def test_vms_that_are_not_online_in_time_are_a_row() -> None:
    scene = a_scene(1000)
    late = Scene(
        1000,
        Turns(scene.quiet.bare),
        Turns(scene.busy.bare),
        scene.burst,
        an_attach(1000, None),
        scene.memory,
    )
    text = table(Figures("2 cores", 3.0, scenes=[late], failed=["200 VMs: no time is left"]))
    assert text.count("not within 30 s: 7 of 1000") == 3
    assert "aim 3 s: MISSED" in text
    assert "NOT MEASURED: 200 VMs: no time is left" in text


def test_neighbours_and_a_tenth_of_a_core() -> None:
    cases = [
        Case("alone", 300, an_attach(300), [a_window(100.0)]),
        Case("100 mute", 300, an_attach(300), [a_window(110.0)]),
        Case("100 stopped", 300, an_attach(400), [a_window(150.0, late_p99_s=0.2)]),
    ]
    tenth = Case("a cpu cgroup", 200, an_attach(200, 11.0), [a_window(), a_window(None)])
    lines = table(Figures("2 cores", 3.0, neighbours=cases, tenth=tenth)).splitlines()
    mute, stopped = (line for line in lines if " mute " in line or " stopped " in line)
    assert " 1.1 x " in mute
    assert mute.endswith("aim 1.2 x: reached, aim 100 ms: reached")
    assert stopped.endswith("aim 1.2 x: MISSED, aim 100 ms: MISSED")
    assert "200 VMs, the agent with a tenth of a core (a cpu cgroup)" in lines
    assert any(line.endswith("11.00 s   aim 30 s: reached") for line in lines)


def test_requests_show_what_mqtt_adds() -> None:
    seen = Latency("default settings", [0.001], [0.05, 0.06], [0.01, 0.01], [0.02])
    text = table(Figures("2 cores", 3.0, latency=[seen]))
    assert "45.00 ms added   aim 5 ms: MISSED" in text
    assert "get of a calm VM over MQTT 20.00 ms, most 20 ms   aim 60 ms: reached" in text
